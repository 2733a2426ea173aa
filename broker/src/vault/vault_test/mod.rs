//! What a vault is asked, by whom, and what becomes of its answers: on servers that are real ([`real`]), and with a
//! [`double::Double`] of one for what these cannot be made to do.

mod double;
mod real;
mod server;

use chitin_spec::SecretSpec;
use tokio_util::task::TaskTracker;

use super::*;
use crate::Error;
use crate::credentials::{CredentialSpec, CredentialValue, FetchedCredentials, fetch_credentials};

const CANARY: &str = "canary-52b1d9e0f7";

/// Counts clean-ups, and can be waited for.
fn tracker() -> TaskTracker {
    let tracker = TaskTracker::new();
    tracker.close();
    tracker
}

/// Fetches, where nobody asks whether what was issued is given back.
async fn fetch(secrets: &[SecretSpec], spec: &CredentialSpec) -> Result<FetchedCredentials, Error> {
    fetch_credentials(secrets, spec, &tracker()).await
}

/// What is fetched from this vault.
fn from(config: VaultConfig) -> CredentialSpec {
    CredentialSpec { vault: Some(config), ..CredentialSpec::default() }
}

/// Names and values of what was fetched.
fn exposed(fetched: &FetchedCredentials) -> Vec<(String, String)> {
    let text = |value: &CredentialValue| {
        String::from_utf8(value.value.to_bytes().expose().to_vec()).unwrap()
    };
    fetched.values.iter().map(|value| (value.name.clone(), text(value))).collect()
}

/// The one line that says why it is not to be had.
async fn refusal(secrets: &[SecretSpec], spec: &CredentialSpec) -> String {
    let error = fetch(secrets, spec).await.expect_err("is refused").to_string();
    assert!(!error.contains(CANARY) && error.lines().count() == 1, "{error}");
    error
}

/// The next change of what was read at a place: what a field is now.
async fn next(changes: &mut Changes, place: &str, field: &str) -> Option<String> {
    let change =
        tokio::time::timeout(Duration::from_secs(30), changes.recv()).await.expect("in time");
    let Change { what, fields } = change.expect("the keeper is there");
    assert_eq!(what, place);
    let value = fields?.into_iter().find(|(name, _)| name == field).unwrap().1.unwrap();
    Some(String::from_utf8(value.to_vec()).unwrap())
}

#[test]
fn the_environment_says_which_vault_and_who_we_are() {
    let from = |pairs: &[(&str, &str)]| {
        let pairs: Vec<(String, String)> =
            pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        config_from(move |name| {
            pairs.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone())
        })
    };
    let address = ("VAULT_ADDR", "https://vault:8200");
    assert_eq!(from(&[]).unwrap_err(), VaultError::NoAddress);
    assert_eq!(from(&[address]).unwrap_err(), VaultError::NoLogin);
    assert_eq!(from(&[address, ("VAULT_ROLE_ID", "r")]).unwrap_err(), VaultError::NoLogin);
    assert_eq!(
        from(&[address, ("VAULT_TOKEN", "t"), ("VAULT_SKIP_VERIFY", "1")]).unwrap_err(),
        VaultError::Unverified
    );
    let role = [
        address,
        ("VAULT_ROLE_ID", "r"),
        ("VAULT_WRAPPED_SECRET_ID", CANARY),
        ("VAULT_NAMESPACE", "n"),
    ];
    let config = from(&role).unwrap();
    assert!(
        matches!(&config.login, VaultLogin::AppRole { mount, secret_id: SecretId::Wrapped(_), .. } if mount == "approle")
    );
    let shown = format!("{config:?}");
    assert!(shown.contains("AppRole") && !shown.contains(CANARY), "{shown}");
}

#[test]
fn a_term_may_be_none_or_longer_than_time() {
    assert_eq!(Lease::new(0, true), None);
    assert!(Lease::new(u64::MAX, true).is_some());
}
