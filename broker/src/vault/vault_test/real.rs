//! Cases that a real server decides: OpenBao, or the Vault that the environment names.

use std::collections::BTreeMap;

use super::double::Double;
use super::server::Server;
use super::*;
use crate::vault::lease_renewal::{Current, LeaseRenewer};

#[tokio::test]
async fn a_role_reads_fields_and_its_token_is_revoked_at_the_end() {
    let server = Server::start().await;
    let config = server.reader(json!({ "token_ttl": 600 })).await;
    let spec = from(config.clone());
    let secrets = [server.secret("TOKEN", "creds#api_token"), server.secret("PORT", "creds#port")];
    let fetched = fetch(&secrets, &spec).await.unwrap();
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(exposed(&fetched), [pair("TOKEN", CANARY), pair("PORT", "8080")]);
    assert_eq!(fetched.lease_renewer.unwrap().revoke_all().await, Vec::<String>::new());

    // The same by hand, to see the token before and after.
    let mut session = Session::begin(&config).await.unwrap();
    let token = session.middleware.token.clone();
    session.revoke().await.unwrap();
    let login = VaultLogin::Token(Zeroizing::new(token));
    let error = refusal(&secrets, &from(VaultConfig { login, ..config })).await;
    assert!(error.contains("the token has expired, or its policies"), "{error}");
}

#[tokio::test]
async fn each_field_of_a_credential_source_is_a_credential() {
    let server = Server::start().await;
    let mut spec = CredentialSpec { source: Some(server.source("plain")), ..from(server.root()) };
    // One that is asked for by name stays what it was asked to be.
    let own = ["user=exec:echo me".parse().unwrap()];
    let mut found = exposed(&fetch(&own, &spec).await.unwrap());
    found.sort();
    assert_eq!(found, [("api_token".into(), CANARY.into()), ("user".into(), "me".into())]);

    spec.source = Some(server.source("plain#user"));
    assert_eq!(
        exposed(&fetch(&[], &spec).await.unwrap()),
        [("user".to_owned(), "agent".to_owned())]
    );
    spec.source = Some(server.source("creds"));
    assert!(refusal(&[], &spec).await.contains("field `nested`"), "an object is no credential");
    spec.source = Some(server.source("none"));
    assert!(refusal(&[], &spec).await.contains("has nothing at vault://"));
    spec.source = None;
    for (rest, words) in [
        ("plain#pass", "no field `pass`"),
        ("plain", "has 2 fields"),
        ("creds#nested", "is no text"),
    ] {
        assert!(refusal(&[server.secret("A", rest)], &spec).await.contains(words), "{rest}");
    }
}

#[tokio::test]
async fn a_wrong_role_is_refused_in_words_that_do_not_repeat_it() {
    let server = Server::start().await;
    let terms = json!({ "token_ttl": 600, "secret_id_num_uses": 1 });
    let config = server.reader(terms).await;
    let refused =
        async |change: fn(&mut String, &mut Zeroizing<String>, &mut Zeroizing<String>)| {
            let mut config = config.clone();
            let VaultLogin::AppRole { mount, role_id, secret_id: SecretId::Plain(secret_id) } =
                &mut config.login
            else {
                panic!("no role")
            };
            change(mount, role_id, secret_id);
            let why = "role id or secret id are wrong, used up or expired, or no AppRole is there";
            let words = format!("secret A: the vault refuses the login at auth/{mount}: {why}");
            assert_eq!(refusal(&[server.secret("A", "creds#port")], &from(config)).await, words);
        };
    refused(|_, role_id, _| *role_id = Zeroizing::new(CANARY.into())).await;
    refused(|_, _, secret_id| *secret_id = Zeroizing::new(CANARY.into())).await;
    refused(|mount, _, _| *mount = "nowhere".into()).await;
    Session::begin(&config).await.unwrap();
    // It was good for one login.
    refused(|_, _, _| {}).await;
}

#[tokio::test]
async fn a_token_ends_with_its_term_unless_its_role_renews_it_or_logs_in_again() {
    let server = Server::start().await;
    let config = server.reader(json!({ "token_ttl": 3 })).await;
    let source = server.source("creds");
    let forgotten = Session::begin(&config).await.unwrap();
    let kept = Session::begin(&config).await.unwrap();
    assert_eq!(kept.lease.unwrap().ttl, Duration::from_secs(3));
    let login = VaultLogin::Token(Zeroizing::new(kept.middleware.token.clone()));
    let first = Session::begin(&VaultConfig { login, ..config }).await.unwrap();
    let keeper = LeaseRenewer::start(kept, Vec::new(), BTreeMap::new(), &tracker());
    // By now it has been renewed twice, or there is a third one.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(matches!(forgotten.read(&source).await, Err(VaultError::Denied { .. })));
    assert!(first.read(&source).await.is_ok());
    let reader = keeper.reader();
    let current = reader.current(&source, true).await.unwrap();
    let Current::Read(fields, _) = current else { panic!("it was read") };
    assert!(fields.iter().any(|(name, value)| name == "api_token"
        && value.as_ref().is_some_and(|value| value.as_slice() == CANARY.as_bytes())));
    assert_eq!(keeper.revoke_all().await, Vec::<String>::new());
    assert!(reader.current(&source, true).await.is_err(), "it has ended");
    assert!(
        matches!(first.read(&source).await, Err(VaultError::Denied { .. })),
        "revoked at the end"
    );
}

#[tokio::test]
async fn a_sealed_server_and_one_that_goes_away_are_told_apart() {
    let mut server = Server::start_own().await;
    let config = server.reader(json!({ "token_ttl": 6 })).await;
    let spec = from(config);
    let secret = [server.secret("A", "creds#port")];
    let began = Instant::now();
    let keeper = fetch(&secret, &spec).await.unwrap().lease_renewer.unwrap();
    server.admin("PUT", "sys/seal", json!({})).await;
    assert!(refusal(&secret, &spec).await.contains("is sealed"));
    server.unseal().await;

    server.kill();
    // When it was to be renewed, and is not over.
    tokio::time::sleep_until(began + Duration::from_secs(5)).await;
    let troubles = tokio::time::timeout(Duration::from_secs(15), keeper.revoke_all())
        .await
        .expect("does not hang");
    let [renew, revoke] = &troubles[..] else { panic!("{troubles:?}") };
    assert!(renew.starts_with("renew the vault's token, which is good for "), "{renew}");
    assert!(
        revoke.starts_with("give credentials back: the vault at http://127.0.0.1:"),
        "{revoke}"
    );
    let error = refusal(&secret, &spec).await;
    assert!(error.contains("cannot be reached: nobody listens there"), "{error}");
}

#[tokio::test]
async fn a_policy_that_only_allows_a_path_allows_no_other() {
    let server = Server::start().await;
    let config = server.reader(json!({ "token_ttl": 600 })).await;
    let spec = from(config.clone());
    let fetched = fetch(&[server.secret("A", "creds#api_token")], &spec).await.unwrap();
    assert_eq!(exposed(&fetched), [("A".to_owned(), CANARY.to_owned())]);
    fetched.revoke().await;
    let denied = |place: &str| {
        format!(
            "the vault refuses vault://{place}: the token has expired, or its policies do not allow this"
        )
    };
    let elsewhere = server.mount("kv", json!({ "version": "1" })).await;
    for place in [
        format!("{}/plain", server.kv),
        format!("{}/none", server.kv),
        format!("{elsewhere}/creds"),
    ] {
        let secrets =
            [server.secret("A", "creds#port"), format!("B=vault://{place}#user").parse().unwrap()];
        assert_eq!(refusal(&secrets, &spec).await, format!("secret B: {}", denied(&place)));
        // The token is given back all the same.
        assert_eq!(server.tokens(&config).await, 0);
    }
    let spec = CredentialSpec { source: Some(server.source("plain")), ..spec };
    assert!(refusal(&[], &spec).await.ends_with(&denied(&format!("{}/plain", server.kv))));
}

#[tokio::test]
async fn kv_2_is_read_by_the_path_without_data() {
    let server = Server::start().await;
    let kv = server.mount("kv", json!({ "version": "2" })).await;
    for value in ["yesterday's", CANARY] {
        server
            .admin("POST", &format!("{kv}/data/app/db"), json!({ "data": { "password": value } }))
            .await;
    }
    server
        .admin("POST", &format!("{kv}/data/app/web"), json!({ "data": { "password": CANARY } }))
        .await;
    let spec =
        from(server.role(&[&format!("{kv}/data/app/db")], json!({ "token_ttl": 600 })).await);
    let secret = |path: &str| [format!("DB=vault://{kv}/app/{path}#password").parse().unwrap()];
    assert_eq!(
        exposed(&fetch(&secret("db"), &spec).await.unwrap()),
        [("DB".to_owned(), CANARY.to_owned())]
    );
    assert!(refusal(&secret("web"), &spec).await.contains("its policies do not allow this"));
    // The newest version is what is there, or is not.
    server.admin("DELETE", &format!("{kv}/data/app/db"), json!({})).await;
    assert!(
        refusal(&secret("db"), &spec)
            .await
            .contains(&format!("has nothing at vault://{kv}/app/db"))
    );
}

#[tokio::test]
async fn a_wrapped_secret_id_is_good_for_one_sandbox() {
    let server = Server::start().await;
    let config = server.reader(json!({ "token_ttl": 600 })).await;
    let secret = [server.secret("A", "creds#api_token")];
    let spec = from(server.wrapped(&config).await);
    let fetched = fetch(&secret, &spec).await.unwrap();
    assert_eq!(exposed(&fetched), [("A".to_owned(), CANARY.to_owned())]);
    assert_eq!(fetched.lease_renewer.unwrap().revoke_all().await, Vec::<String>::new());
    assert_eq!(server.tokens(&config).await, 0);
    assert_eq!(
        refusal(&secret, &spec).await,
        "secret A: the vault's wrapping token is not valid: it was used before, or has expired"
    );
}

#[tokio::test]
async fn what_is_in_a_namespace_is_found_in_no_other() {
    let mut server = Server::start_own().await;
    server.enter("team").await;
    server.enter("a").await;
    let config = server.reader(json!({ "token_ttl": 600 })).await;
    assert_eq!(config.namespace.as_deref(), Some("team/a"));
    let secret = [server.secret("A", "creds#api_token")];
    let fetched = fetch(&secret, &from(config.clone())).await.unwrap();
    assert_eq!(exposed(&fetched), [("A".to_owned(), CANARY.to_owned())]);
    assert_eq!(server.tokens(&config).await, 1);
    assert_eq!(fetched.lease_renewer.unwrap().revoke_all().await, Vec::<String>::new());
    assert_eq!(server.tokens(&config).await, 0);
    // The role is not there, or the namespace is not.
    for (namespace, words) in [
        (None, "no AppRole is there"),
        (Some("team"), "no AppRole is there"),
        (Some("team/b"), "has nothing at auth/"),
    ] {
        let namespace = namespace.map(str::to_owned);
        let error = refusal(&secret, &from(VaultConfig { namespace, ..config.clone() })).await;
        assert!(error.contains(words), "{error}");
    }
}

/// An engine that makes users of a message broker, and a broker that makes and removes whatever it is told to.
struct Engine {
    broker: Double,
    /// Where users are made.
    path: String,
}

impl Engine {
    /// With users for so many seconds.
    async fn mount(server: &Server, ttl: u32) -> Engine {
        let broker = Double::start(|_| (204, Value::Null)).await;
        let mount = server.mount("rabbitmq", json!({})).await;
        let connection = json!({ "connection_uri": broker.address, "username": "a", "password": "b", "verify_connection": false });
        server.admin("POST", &format!("{mount}/config/connection"), connection).await;
        server.admin("POST", &format!("{mount}/roles/app"), json!({ "tags": "agent" })).await;
        server
            .admin("POST", &format!("{mount}/config/lease"), json!({ "ttl": ttl, "max_ttl": 3600 }))
            .await;
        Engine { broker, path: format!("{mount}/creds/app") }
    }

    fn location(&self) -> String {
        format!("vault://{}", self.path)
    }

    fn secret(&self, name: &str, field: &str) -> SecretSpec {
        format!("{name}={}#{field}", self.location()).parse().unwrap()
    }

    /// How many users were made, and how many of them are no more.
    fn users(&self) -> (usize, usize) {
        let count = |what: &str| self.broker.count(|line| line.starts_with(what));
        (count("PUT /api/users/"), count("DELETE /api/users/"))
    }

    /// A vault says that it has revoked, and then does.
    async fn sees(&self, users: (usize, usize)) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.users() != users {
            assert!(Instant::now() < deadline, "{:?}, not {users:?}", self.users());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn what_an_engine_issues_is_renewed_and_given_back() {
    let server = Server::start().await;
    let engine = Engine::mount(&server, 3).await;
    let spec = from(server.role(&[&engine.path], json!({ "token_ttl": 600 })).await);
    let secrets = [engine.secret("U", "username"), engine.secret("P", "password")];
    let fetched = fetch(&secrets, &spec).await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    // Read once for both, or there would be two, and renewed, or there would be none.
    assert_eq!(engine.users(), (1, 0));
    assert_eq!(fetched.lease_renewer.unwrap().revoke_all().await, Vec::<String>::new());

    // With the token of a role, with one that somebody else got and that is not ours to revoke, and when something else fails.
    let engine = Engine::mount(&server, 600).await;
    let spec = from(server.role(&[&engine.path], json!({ "token_ttl": 600 })).await);
    let secret = engine.secret("P", "password");
    let fetched = fetch(std::slice::from_ref(&secret), &spec).await.unwrap();
    assert_eq!(fetched.lease_renewer.unwrap().revoke_all().await, Vec::<String>::new());
    engine.sees((1, 1)).await;
    let spec = from(server.root());
    let fetched = fetch(std::slice::from_ref(&secret), &spec).await.unwrap();
    assert_eq!(fetched.lease_renewer.unwrap().revoke_all().await, Vec::<String>::new());
    engine.sees((2, 2)).await;
    refusal(&[secret, "Q=env:CHITIN_NO_SUCH".parse().unwrap()], &spec).await;
    engine.sees((3, 3)).await;
}

#[tokio::test]
async fn a_token_is_renewed_until_its_longest_term_and_then_followed_with_all_that_was_issued_to_it()
 {
    let server = Server::start().await;
    let engine = Engine::mount(&server, 60).await;
    let config = server.role(&[&engine.path], json!({ "token_ttl": 3, "token_max_ttl": 5 })).await;
    let began = Instant::now();
    let mut fetched =
        fetch(&[engine.secret("P", "password")], &from(config.clone())).await.unwrap();
    let mut changes = fetched.changes.take().unwrap();
    let password = next(&mut changes, &engine.location(), "password").await.unwrap();
    assert_ne!(exposed(&fetched), [("P".to_owned(), password)]);
    // After 2 s for 3 more, after 2 s more for 1, which is less than half.
    let lasted = began.elapsed();
    assert!((Duration::from_millis(3900)..Duration::from_secs(5)).contains(&lasted), "{lasted:?}");
    // The former is not over yet.
    assert_eq!((server.tokens(&config).await, engine.users()), (2, (2, 0)));
    assert_eq!(fetched.lease_renewer.take().unwrap().revoke_all().await, Vec::<String>::new());
    assert_eq!(server.tokens(&config).await, 0);
    engine.sees((2, 2)).await;
}

#[tokio::test]
async fn what_was_issued_to_a_token_is_over_with_it() {
    let server = Server::start().await;
    let engine = Engine::mount(&server, 60).await;
    let terms = json!({ "token_ttl": 3, "token_max_ttl": 4, "secret_id_num_uses": 1 });
    let spec = from(server.role(&[&engine.path], terms).await);
    let mut fetched = fetch(&[engine.secret("P", "password")], &spec).await.unwrap();
    let mut changes = fetched.changes.take().unwrap();
    assert_eq!(next(&mut changes, &engine.location(), "password").await, None);
    engine.sees((1, 1)).await;
    let troubles = fetched.lease_renewer.take().unwrap().revoke_all().await;
    let [renew, denied, over, token] = &troubles[..] else { panic!("{troubles:?}") };
    assert!(renew.starts_with("renew the vault's token, which is good for "), "{renew}");
    assert!(renew.contains("the vault refuses the login at auth/"), "{renew}");
    let place = engine.location();
    assert!(
        denied.starts_with(&format!("renew {place}, which is good for 0 s more: ")),
        "{denied}"
    );
    assert!(over.starts_with(&format!("{place} was good until ")), "{over}");
    assert!(token.starts_with("the vault's token was good until "), "{token}");
}
