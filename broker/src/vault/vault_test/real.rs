//! Tests against a server: OpenBao, or the Vault that the environment names.

use std::collections::BTreeMap;

use super::double::ServerDouble;
use super::server::VaultServer;
use super::*;
use crate::vault::lease_renewal::{CurrentSecret, LeaseRenewer};

fn pair(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

/// Revokes the leases. Asserts that no renewal and no revocation failed.
async fn revoke_cleanly(fetched: FetchedCredentials) {
    assert_eq!(fetched.lease_renewer.unwrap().revoke_all().await, Vec::<String>::new());
}

#[tokio::test]
async fn role_reads_fields_and_its_token_is_revoked() {
    let server = VaultServer::start().await;
    let config = server.create_reader_role(json!({ "token_ttl": 600 })).await;
    let spec = spec_of(config.clone());
    let secrets = [server.secret("TOKEN", "creds#api_token"), server.secret("PORT", "creds#port")];
    let fetched = fetch(&secrets, &spec).await.unwrap();
    assert_eq!(exposed(&fetched), [pair("TOKEN", CANARY), pair("PORT", "8080")]);
    revoke_cleanly(fetched).await;

    // The same by hand, with the token before and after.
    let mut client = VaultClient::log_in(&config).await.unwrap();
    let login = VaultLogin::Token(client.token.clone());
    client.revoke_tokens().await.unwrap();
    let (_, error) = fetch_error(&secrets, &spec_of(VaultConfig { login, ..config })).await;
    assert!(matches!(error, VaultError::Denied { .. }), "{error:?}");
}

#[tokio::test]
async fn each_field_of_a_credential_source_is_fetched() {
    let server = VaultServer::start().await;
    let spec = spec_of(server.root_login());
    let spec = |rest: &str| CredentialSpec { source: Some(server.source(rest)), ..spec.clone() };
    // A named credential takes precedence over a field.
    let named = ["user=exec:echo me".parse().unwrap()];
    let mut found = exposed(&fetch(&named, &spec("plain")).await.unwrap());
    found.sort();
    assert_eq!(found, [pair("api_token", CANARY), pair("user", "me")]);
    let fetched = fetch(&[], &spec("plain#user")).await.unwrap();
    assert_eq!(exposed(&fetched), [pair("user", "agent")]);

    let (_, error) = fetch_error(&[], &spec("creds")).await;
    assert!(
        matches!(&error, VaultError::NotScalar { field, .. } if field == "nested"),
        "{error:?}"
    );
    let (_, error) = fetch_error(&[], &spec("none")).await;
    assert!(matches!(error, VaultError::NotFound { .. }), "{error:?}");
}

#[tokio::test]
async fn field_of_a_secret_must_be_unambiguous() {
    let server = VaultServer::start().await;
    let spec = spec_of(server.root_login());
    let error = async |rest| fetch_error(&[server.secret("A", rest)], &spec).await.1;
    let missing = error("plain#pass").await;
    assert!(
        matches!(&missing, VaultError::MissingField { field, .. } if field == "pass"),
        "{missing:?}"
    );
    let several = error("plain").await;
    assert!(matches!(several, VaultError::AmbiguousField { count: 2, .. }), "{several:?}");
    let nested = error("creds#nested").await;
    assert!(matches!(nested, VaultError::NotScalar { .. }), "{nested:?}");
}

#[tokio::test]
async fn wrong_role_is_refused_without_repeating_it() {
    let server = VaultServer::start().await;
    let options = json!({ "token_ttl": 600, "secret_id_num_uses": 1 });
    let config = server.create_reader_role(options).await;
    let refused =
        async |change: fn(&mut String, &mut Zeroizing<String>, &mut Zeroizing<String>)| {
            let mut config = config.clone();
            let VaultLogin::AppRole { mount, role_id, secret_id: SecretId::Plain(secret_id) } =
                &mut config.login
            else {
                panic!("not a role")
            };
            change(mount, role_id, secret_id);
            let expected = mount.clone();
            let secrets = [server.secret("A", "creds#port")];
            let (name, error) = fetch_error(&secrets, &spec_of(config)).await;
            assert!(
                matches!(&error, VaultError::LoginRefused { mount } if *mount == expected),
                "{error:?}"
            );
            assert_eq!(name, "A");
        };
    refused(|_, role_id, _| *role_id = Zeroizing::new(CANARY.into())).await;
    refused(|_, _, secret_id| *secret_id = Zeroizing::new(CANARY.into())).await;
    refused(|mount, _, _| *mount = "nowhere".into()).await;
    VaultClient::log_in(&config).await.unwrap();
    // The secret id was valid for one login.
    refused(|_, _, _| {}).await;
}

#[tokio::test]
async fn token_of_a_role_outlives_its_ttl_by_renewal() {
    let server = VaultServer::start().await;
    let config = server.create_reader_role(json!({ "token_ttl": 3 })).await;
    let source = server.source("creds");
    let unrenewed = VaultClient::log_in(&config).await.unwrap();
    let renewed = VaultClient::log_in(&config).await.unwrap();
    assert_eq!(renewed.token_lease.unwrap().ttl, Duration::from_secs(3));
    let login = VaultLogin::Token(renewed.token.clone());
    let first = VaultClient::log_in(&VaultConfig { login, ..config }).await.unwrap();
    let renewer = LeaseRenewer::start(renewed, Vec::new(), BTreeMap::new(), &closed_tracker());
    // By now, the token was renewed twice.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(matches!(unrenewed.read_secret(&source).await, Err(VaultError::Denied { .. })));
    assert!(first.read_secret(&source).await.is_ok());
    let reader = renewer.reader();
    let current = reader.read_current(&source, true).await.unwrap();
    let CurrentSecret::Read { fields, .. } = current else { panic!("not read") };
    assert!(fields.iter().any(|(name, value)| name == "api_token"
        && value.as_ref().is_some_and(|value| value.as_slice() == CANARY.as_bytes())));
    assert_eq!(renewer.revoke_all().await, Vec::<String>::new());
    assert!(matches!(reader.read_current(&source, true).await, Err(VaultError::Revoked)));
    let revoked = first.read_secret(&source).await;
    assert!(matches!(revoked, Err(VaultError::Denied { .. })));
}

#[tokio::test]
async fn sealed_and_unreachable_servers_are_distinguished() {
    let mut server = VaultServer::start_private().await;
    let config = server.create_reader_role(json!({ "token_ttl": 6 })).await;
    let spec = spec_of(config);
    let secret = [server.secret("A", "creds#port")];
    let began = Instant::now();
    let renewer = fetch(&secret, &spec).await.unwrap().lease_renewer.unwrap();
    server.expect_ok("PUT", "sys/seal", json!({})).await;
    let (_, error) = fetch_error(&secret, &spec).await;
    assert!(matches!(error, VaultError::Sealed { .. }), "{error:?}");
    server.unseal().await;

    server.kill();
    // The renewal was due, and the token has not expired.
    tokio::time::sleep_until(began + Duration::from_secs(5)).await;
    let messages = tokio::time::timeout(Duration::from_secs(15), renewer.revoke_all())
        .await
        .expect("does not hang");
    let [renewal, revocation] = &messages[..] else { panic!("{messages:?}") };
    assert!(renewal.starts_with("renew the token of the vault"), "{renewal}");
    assert!(revocation.starts_with("revoke credentials: "), "{revocation}");
    let (_, error) = fetch_error(&secret, &spec).await;
    let VaultError::Unreachable { failure, .. } = error else { panic!("{error:?}") };
    assert_eq!(failure, ConnectionFailure::Connect);
}

#[tokio::test]
async fn policy_of_one_path_denies_all_others() {
    let server = VaultServer::start().await;
    let config = server.create_reader_role(json!({ "token_ttl": 600 })).await;
    let spec = spec_of(config.clone());
    let fetched = fetch(&[server.secret("A", "creds#api_token")], &spec).await.unwrap();
    assert_eq!(exposed(&fetched), [pair("A", CANARY)]);
    fetched.revoke().await;
    let elsewhere = server.mount_engine("kv", json!({ "version": "1" })).await;
    for path in [
        format!("{}/plain", server.kv),
        format!("{}/none", server.kv),
        format!("{elsewhere}/creds"),
    ] {
        let secrets =
            [server.secret("A", "creds#port"), format!("B=vault://{path}#user").parse().unwrap()];
        let (name, error) = fetch_error(&secrets, &spec).await;
        assert_eq!(name, "B");
        assert!(
            matches!(&error, VaultError::Denied { operation }
                if *operation == format!("vault://{path}")),
            "{error:?}"
        );
        // The token is revoked after a failure as well.
        assert_eq!(server.count_tokens(&config).await, 0);
    }
    let spec = CredentialSpec { source: Some(server.source("plain")), ..spec };
    let (_, error) = fetch_error(&[], &spec).await;
    assert!(matches!(error, VaultError::Denied { .. }), "{error:?}");
}

#[tokio::test]
async fn kv_2_path_is_written_without_data() {
    let server = VaultServer::start().await;
    let kv = server.mount_engine("kv", json!({ "version": "2" })).await;
    for (path, value) in [("db", "yesterday's"), ("db", CANARY), ("web", CANARY)] {
        let body = json!({ "data": { "password": value } });
        server.expect_ok("POST", &format!("{kv}/data/app/{path}"), body).await;
    }
    let paths = [&*format!("{kv}/data/app/db")];
    let spec = spec_of(server.create_role(&paths, json!({ "token_ttl": 600 })).await);
    let secret = |path: &str| [format!("DB=vault://{kv}/app/{path}#password").parse().unwrap()];
    assert_eq!(exposed(&fetch(&secret("db"), &spec).await.unwrap()), [pair("DB", CANARY)]);
    let (_, error) = fetch_error(&secret("web"), &spec).await;
    assert!(matches!(error, VaultError::Denied { .. }), "{error:?}");
    // The newest version counts, also if it is deleted.
    server.expect_ok("DELETE", &format!("{kv}/data/app/db"), json!({})).await;
    let (_, error) = fetch_error(&secret("db"), &spec).await;
    assert!(matches!(error, VaultError::NotFound { .. }), "{error:?}");
}

#[tokio::test]
async fn wrapped_secret_id_is_valid_for_one_login() {
    let server = VaultServer::start().await;
    let config = server.create_reader_role(json!({ "token_ttl": 600 })).await;
    let secret = [server.secret("A", "creds#api_token")];
    let spec = spec_of(server.wrap_secret_id(&config).await);
    let fetched = fetch(&secret, &spec).await.unwrap();
    assert_eq!(exposed(&fetched), [pair("A", CANARY)]);
    revoke_cleanly(fetched).await;
    assert_eq!(server.count_tokens(&config).await, 0);
    let (_, error) = fetch_error(&secret, &spec).await;
    assert!(matches!(error, VaultError::InvalidWrappingToken), "{error:?}");
}

#[tokio::test]
async fn secret_is_found_in_its_namespace_only() {
    let mut server = VaultServer::start_private().await;
    server.enter_namespace("team").await;
    server.enter_namespace("a").await;
    let config = server.create_reader_role(json!({ "token_ttl": 600 })).await;
    assert_eq!(config.namespace.as_deref(), Some("team/a"));
    let secret = [server.secret("A", "creds#api_token")];
    let fetched = fetch(&secret, &spec_of(config.clone())).await.unwrap();
    assert_eq!(exposed(&fetched), [pair("A", CANARY)]);
    assert_eq!(server.count_tokens(&config).await, 1);
    revoke_cleanly(fetched).await;
    assert_eq!(server.count_tokens(&config).await, 0);
    for namespace in [None, Some("team"), Some("team/b")] {
        let is_missing = namespace == Some("team/b");
        let namespace = namespace.map(str::to_owned);
        let spec = spec_of(VaultConfig { namespace, ..config.clone() });
        let (_, error) = fetch_error(&secret, &spec).await;
        match error {
            VaultError::NotFound { .. } => assert!(is_missing),
            VaultError::LoginRefused { .. } => assert!(!is_missing),
            error => panic!("{error:?}"),
        }
    }
}

/// A secrets engine that creates users of a message broker, and a double of that broker.
struct Engine {
    broker: ServerDouble,
    /// The path of a request for a new user.
    path: String,
}

impl Engine {
    /// Mounts an engine whose users are leased for so many seconds.
    async fn mount(server: &VaultServer, ttl: u32) -> Engine {
        let broker = ServerDouble::start(|_| (204, Value::Null)).await;
        let mount = server.mount_engine("rabbitmq", json!({})).await;
        let connection = json!({
            "connection_uri": broker.address, "username": "a", "password": "b",
            "verify_connection": false,
        });
        let options = [
            ("config/connection", connection),
            ("roles/app", json!({ "tags": "agent" })),
            ("config/lease", json!({ "ttl": ttl, "max_ttl": 3600 })),
        ];
        for (path, body) in options {
            server.expect_ok("POST", &format!("{mount}/{path}"), body).await;
        }
        Engine { broker, path: format!("{mount}/creds/app") }
    }

    fn location(&self) -> String {
        format!("vault://{}", self.path)
    }

    fn secret(&self, name: &str, field: &str) -> SecretSpec {
        format!("{name}={}#{field}", self.location()).parse().unwrap()
    }

    /// Counts the users that were created, and the users that were deleted.
    fn count_users(&self) -> (usize, usize) {
        let count = |start: &str| self.broker.count(|line| line.starts_with(start));
        (count("PUT /api/users/"), count("DELETE /api/users/"))
    }

    /// Waits for the counts: a vault deletes a user after it has confirmed the revocation.
    async fn wait_for_users(&self, users: (usize, usize)) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.count_users() != users {
            assert!(Instant::now() < deadline, "{:?}, not {users:?}", self.count_users());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn dynamic_secret_is_read_once_and_renewed() {
    let server = VaultServer::start().await;
    let engine = Engine::mount(&server, 3).await;
    let role = server.create_role(&[&engine.path], json!({ "token_ttl": 600 })).await;
    let secrets = [engine.secret("U", "username"), engine.secret("P", "password")];
    let fetched = fetch(&secrets, &spec_of(role)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    // Two reads would create two users, and without a renewal the user would be deleted.
    assert_eq!(engine.count_users(), (1, 0));
    revoke_cleanly(fetched).await;
}

#[tokio::test]
async fn dynamic_secret_is_revoked_for_every_login() {
    let server = VaultServer::start().await;
    let engine = Engine::mount(&server, 600).await;
    let role = server.create_role(&[&engine.path], json!({ "token_ttl": 600 })).await;
    let secret = engine.secret("P", "password");
    // With the token of a role, which is revoked.
    revoke_cleanly(fetch(std::slice::from_ref(&secret), &spec_of(role)).await.unwrap()).await;
    engine.wait_for_users((1, 1)).await;
    // With a token of the caller, which is not.
    let spec = spec_of(server.root_login());
    revoke_cleanly(fetch(std::slice::from_ref(&secret), &spec).await.unwrap()).await;
    engine.wait_for_users((2, 2)).await;
    // After the failure of another credential.
    let secrets = [secret, "Q=env:CHITIN_NO_SUCH".parse().unwrap()];
    assert!(fetch(&secrets, &spec).await.is_err());
    engine.wait_for_users((3, 3)).await;
}

#[tokio::test]
async fn secrets_are_reissued_with_a_new_token() {
    let server = VaultServer::start().await;
    let engine = Engine::mount(&server, 60).await;
    let options = json!({ "token_ttl": 3, "token_max_ttl": 5 });
    let config = server.create_role(&[&engine.path], options).await;
    let began = Instant::now();
    let mut fetched =
        fetch(&[engine.secret("P", "password")], &spec_of(config.clone())).await.unwrap();
    let mut changes = fetched.changes.take().unwrap();
    let password = next_change(&mut changes, &engine.location(), "password").await.unwrap();
    assert_ne!(exposed(&fetched), [pair("P", &password)]);
    // The renewal after 2 s grants 3 s, and that after 4 s only 1 s: less than half.
    let lasted = began.elapsed();
    assert!((Duration::from_millis(3900)..Duration::from_secs(5)).contains(&lasted), "{lasted:?}");
    // The first token has not expired yet.
    assert_eq!((server.count_tokens(&config).await, engine.count_users()), (2, (2, 0)));
    revoke_cleanly(fetched).await;
    assert_eq!(server.count_tokens(&config).await, 0);
    engine.wait_for_users((2, 2)).await;
}

#[tokio::test]
async fn secrets_expire_with_a_token_that_is_final() {
    let server = VaultServer::start().await;
    let engine = Engine::mount(&server, 60).await;
    let options = json!({ "token_ttl": 3, "token_max_ttl": 4, "secret_id_num_uses": 1 });
    let spec = spec_of(server.create_role(&[&engine.path], options).await);
    let mut fetched = fetch(&[engine.secret("P", "password")], &spec).await.unwrap();
    let mut changes = fetched.changes.take().unwrap();
    assert_eq!(next_change(&mut changes, &engine.location(), "password").await, None);
    engine.wait_for_users((1, 1)).await;
    let messages = fetched.lease_renewer.take().unwrap().revoke_all().await;
    let [renewal, reissue, expiry, token_expiry] = &messages[..] else { panic!("{messages:?}") };
    let location = engine.location();
    assert!(renewal.starts_with("renew the token of the vault"), "{renewal}");
    assert!(renewal.contains("auth/"), "{renewal}");
    assert!(reissue.starts_with(&format!("renew {location}")), "{reissue}");
    assert!(expiry.starts_with(&location), "{expiry}");
    assert!(token_expiry.starts_with("the token of the vault"), "{token_expiry}");
}
