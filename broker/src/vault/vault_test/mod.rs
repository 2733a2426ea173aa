//! Tests of the vault client: against servers ([`real`]), and against a [`double::ServerDouble`]
//! for conditions that a server cannot be brought into.

mod double;
mod real;
mod server;

use std::time::Duration;

use chitin_spec::{SecretId, SecretSpec, VaultConfig, VaultLogin, VaultSource};
use chitin_text::error_chain;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use zeroize::Zeroizing;

use super::config::config_from;
use super::*;
use crate::credentials::{CredentialSpec, CredentialValue, FetchedCredentials, fetch_credentials};
use crate::error::{Error, SecretError};

const CANARY: &str = "canary-52b1d9e0f7";

/// Returns a tracker that counts clean-ups and can be waited for.
fn closed_tracker() -> TaskTracker {
    let tracker = TaskTracker::new();
    tracker.close();
    tracker
}

/// Fetches credentials without waiting for clean-ups.
async fn fetch(secrets: &[SecretSpec], spec: &CredentialSpec) -> Result<FetchedCredentials, Error> {
    fetch_credentials(secrets, spec, &closed_tracker()).await
}

fn spec_of(config: VaultConfig) -> CredentialSpec {
    CredentialSpec { vault: Some(config), ..CredentialSpec::default() }
}

/// Returns the names and values of the credentials.
fn exposed(fetched: &FetchedCredentials) -> Vec<(String, String)> {
    let text = |value: &CredentialValue| {
        String::from_utf8(value.value.to_bytes().expose().to_vec()).unwrap()
    };
    fetched.values.iter().map(|value| (value.name.clone(), text(value))).collect()
}

/// Asserts that the credentials cannot be fetched, for a reason in one line without a secret.
/// Returns the name in the error, and the error of the vault.
async fn fetch_error(secrets: &[SecretSpec], spec: &CredentialSpec) -> (String, VaultError) {
    let error = fetch(secrets, spec).await.expect_err("the fetch must fail");
    let line = error_chain(&error);
    assert!(!line.contains(CANARY) && line.lines().count() == 1, "{line}");
    assert!(!format!("{error:?}").contains(CANARY), "{error:?}");
    match error {
        Error::Secret { name, source: SecretError::Vault(error) } => (name, error),
        other => panic!("not an error of the vault: {other:?}"),
    }
}

/// Waits for the next change, of the secret at this location. Returns the new value of a field.
async fn next_change(changes: &mut Changes, location: &str, field: &str) -> Option<String> {
    let change =
        tokio::time::timeout(Duration::from_secs(30), changes.recv()).await.expect("in time");
    let change = change.expect("the renewer runs");
    assert_eq!(change.location, location);
    let value = change.fields?.into_iter().find(|(name, _)| name == field).unwrap().1.unwrap();
    Some(String::from_utf8(value.to_vec()).unwrap())
}

#[test]
fn environment_names_the_vault_and_the_login() {
    let from = |pairs: &[(&str, &str)]| {
        let pairs: Vec<(String, String)> =
            pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        config_from(move |name| {
            pairs.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone())
        })
    };
    let address = ("VAULT_ADDR", "https://vault:8200");
    assert!(matches!(from(&[]), Err(VaultError::MissingAddress)));
    assert!(matches!(from(&[address]), Err(VaultError::MissingLogin)));
    assert!(matches!(from(&[address, ("VAULT_ROLE_ID", "r")]), Err(VaultError::MissingLogin)));
    assert!(matches!(
        from(&[address, ("VAULT_TOKEN", "t"), ("VAULT_SKIP_VERIFY", "1")]),
        Err(VaultError::SkipVerify)
    ));
    let role = [
        address,
        ("VAULT_ROLE_ID", "r"),
        ("VAULT_WRAPPED_SECRET_ID", CANARY),
        ("VAULT_NAMESPACE", "n"),
    ];
    let config = from(&role).unwrap();
    let VaultLogin::AppRole { mount, secret_id: SecretId::Wrapped(_), .. } = &config.login else {
        panic!("{config:?}")
    };
    assert_eq!(mount, "approle");
    let shown = format!("{config:?}");
    assert!(shown.contains("AppRole") && !shown.contains(CANARY), "{shown}");
}
