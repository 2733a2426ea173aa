use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use chitin_protocol::SecretBytes;
use tempfile::TempDir;

use super::*;

/// Returns no credentials, and the directory of their files.
fn no_secrets() -> (Secrets, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let directory = CredentialDirectory::at(std::fs::File::open(dir.path()).unwrap().into());
    (Secrets { directory, ..Secrets::default() }, dir)
}

fn secret(name: &str, value: &[u8], delivery: Delivery) -> Secret {
    Secret { request: 1, name: name.into(), value: SecretBytes::new(value.to_vec()), delivery }
}

fn environment(secrets: &Secrets) -> Vec<String> {
    secrets.environment().map(|entry| String::from_utf8(entry.to_vec()).unwrap()).collect()
}

#[test]
fn secret_name_is_an_environment_variable_name() {
    for good in ["A", "_", "API_TOKEN", "a1", &"x".repeat(MAX_NAME_LEN)] {
        assert!(is_valid_name(good), "{good}");
    }
    for bad in ["", "1A", "A-B", "A=B", "A B", "Ä", "A\0", &"x".repeat(MAX_NAME_LEN + 1)] {
        assert!(!is_valid_name(bad), "{bad}");
    }
}

#[test]
fn later_secret_replaces_earlier_within_the_limit() {
    let (mut secrets, dir) = no_secrets();
    secrets.insert(&secret("A", b"1", Delivery::Env)).unwrap();
    secrets.insert(&secret("A", b"2", Delivery::Env)).unwrap();
    assert_eq!(environment(&secrets), ["A=2"]);
    assert!(secrets.sets_variable(b"A") && !secrets.sets_variable(b"A_FILE"));

    secrets.insert(&secret("A", b"3", Delivery::Memory)).unwrap();
    assert_eq!(environment(&secrets), ["A_FILE=/run/credentials/A"]);
    assert!(!secrets.sets_variable(b"A") && secrets.sets_variable(b"A_FILE"));

    for number in 1..MAX_SECRETS {
        secrets.insert(&secret(&format!("N{number}"), b"", Delivery::Env)).unwrap();
    }
    assert!(secrets.insert(&secret("ONE_MORE", b"", Delivery::Env)).is_err());
    // Another delivery removes the file, and a later one creates it again.
    secrets.insert(&secret("A", b"4", Delivery::Env)).unwrap();
    assert!(!dir.path().join("A").exists());
    secrets.insert(&secret("A", b"5", Delivery::Memory)).unwrap();
    assert_eq!(std::fs::read(dir.path().join("A")).unwrap(), b"5");
}

#[test]
fn undeliverable_secret_is_refused() {
    let (mut secrets, _dir) = no_secrets();
    assert!(secrets.insert(&secret("A", b"a\0b", Delivery::Env)).is_err());
    assert!(secrets.insert(&secret("A", b"a\0b", Delivery::Memory)).is_ok());
    assert!(secrets.insert(&secret("B", &[0; MAX_SECRET + 1], Delivery::Memory)).is_err());
    assert!(secrets.insert(&secret("B", &[1; MAX_SECRET], Delivery::Memory)).is_ok());
}

#[test]
fn open_file_follows_rotation_and_revocation() {
    let (mut secrets, dir) = no_secrets();
    assert!(secrets.was_always_empty());
    secrets.insert(&secret("A", b"the first value", Delivery::Memory)).unwrap();
    let path: PathBuf = dir.path().join("A");
    let opened = std::fs::File::open(&path).unwrap();
    let seen = || {
        let mut bytes = [0; 10_000];
        let count = opened.read_at(&mut bytes, 0).unwrap();
        String::from_utf8(bytes[..count].to_vec()).unwrap()
    };
    assert_eq!(seen(), "the first value");
    let mode = std::os::unix::fs::PermissionsExt::mode(&opened.metadata().unwrap().permissions());
    assert_eq!(mode & 0o7777, 0o444);

    for next in ["short", "", &"longer than the first value ".repeat(300), "short"] {
        secrets.insert(&secret("A", next.as_bytes(), Delivery::Memory)).unwrap();
        assert_eq!(seen(), next);
    }
    secrets.revoke("B").unwrap();
    secrets.revoke("A").unwrap();
    assert_eq!(seen(), "");
    assert!(environment(&secrets).is_empty() && !secrets.sets_variable(b"A_FILE"));
    assert!(!secrets.was_always_empty() && path.exists());
    secrets.insert(&secret("A", b"again", Delivery::Memory)).unwrap();
    assert_eq!(seen(), "again");

    secrets.insert(&secret("E", b"1", Delivery::Env)).unwrap();
    secrets.revoke("E").unwrap();
    assert!(!secrets.sets_variable(b"E") && secrets.sets_variable(b"A_FILE"));
    // The end of the agent clears the file.
    drop(secrets);
    assert_eq!(seen(), "");
}
