//! Against a server of the Vault API: the one that `VAULT_ADDR` names, with a root token in `VAULT_TOKEN`, or `rvault`, which
//! `cargo xtask vault` builds and each test starts on a loopback port. That one has neither policies, KV 2 nor wrapping, and
//! renews no role's token; for these there is [`Double`], a double of a server that answers what it is told to.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

use super::super::keeper::{Change, Changes, Current, Issued, Keeper};
use super::super::{Spec, fetch};
use super::*;
use crate::SecretSpec;

const CANARY: &str = "canary-52b1d9e0f7";

/// A server with a secret and a role.
struct Server {
    address: String,
    root: String,
    mount: String,
    approle: String,
    process: Option<Child>,
    unseal: String,
    _dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Server {
    /// With a role whose tokens live so many seconds.
    async fn start(ttl: u32) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let mut server = match std::env::var("VAULT_ADDR") {
            Ok(address) => {
                let root =
                    std::env::var("VAULT_TOKEN").expect("VAULT_TOKEN of a root token, beside VAULT_ADDR");
                Server {
                    address,
                    root,
                    mount: String::new(),
                    approle: String::new(),
                    process: None,
                    unseal: String::new(),
                    _dir: dir,
                }
            }
            Err(_) => Server::rvault(dir).await,
        };
        let unique = format!("chitin-{}-{:x}", std::process::id(), std::ptr::from_ref(&server) as usize);
        (server.mount, server.approle) = (format!("{unique}-kv"), format!("{unique}-role"));
        let (kv, approle) = (server.mount.clone(), server.approle.clone());
        server
            .admin(
                "POST",
                &format!("sys/mounts/{kv}"),
                json!({ "type": "kv", "options": { "version": "1" } }),
            )
            .await;
        let secret = json!({ "api_token": CANARY, "port": 8080, "nested": { "no": "text" } });
        server.admin("POST", &format!("{kv}/creds"), secret).await;
        server.admin("POST", &format!("{kv}/plain"), json!({ "api_token": CANARY, "user": "agent" })).await;
        server.admin("POST", &format!("sys/auth/{approle}"), json!({ "type": "approle" })).await;
        let policy = format!("path \"{kv}/creds\" {{ capabilities = [\"read\"] }}");
        // What has no policies does not know the path.
        let _ = server
            .ask("POST", &format!("sys/policies/acl/{unique}"), Some(json!({ "policy": policy })))
            .await;
        let role = json!({ "token_ttl": ttl, "token_max_ttl": 3600, "token_policies": [unique], "bind_secret_id": true });
        server.admin("POST", &format!("auth/{approle}/role/agents"), role).await;
        server
    }

    async fn rvault(dir: tempfile::TempDir) -> Server {
        let binary = std::env::var_os("CHITIN_RVAULT").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/artifacts/rvault"),
            Into::into,
        );
        assert!(binary.exists(), "no {}: `cargo xtask vault` builds it, or set VAULT_ADDR", binary.display());
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = json!({
            "storage": { "file": { "path": dir.path().join("data") } },
            "listener": { "tcp": { "address": format!("127.0.0.1:{port}"), "tls_disable": "true" } },
            "work_dir": dir.path(),
            "daemon": false,
        });
        let path = dir.path().join("config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let process = Command::new(binary)
            .args(["server", "--config"])
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let address = format!("http://127.0.0.1:{port}");
        let (root, unseal) = Default::default();
        let mut server = Server {
            address,
            root,
            mount: String::new(),
            approle: String::new(),
            process: Some(process),
            unseal,
            _dir: dir,
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        while server.ask("GET", "sys/seal-status", None).await.is_err() {
            assert!(Instant::now() < deadline, "rvault does not come up");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let init = json!({ "secret_shares": 1, "secret_threshold": 1 });
        let init = server.ask("PUT", "sys/init", Some(init)).await.unwrap().1;
        server.root = init["root_token"].as_str().unwrap().into();
        server.unseal = init["keys"][0].as_str().unwrap().into();
        server.unseal().await;
        server
    }

    async fn unseal(&self) {
        let (code, _) = self.ask("PUT", "sys/unseal", Some(json!({ "key": self.unseal }))).await.unwrap();
        assert_eq!(code, 200);
    }

    async fn ask(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> Result<(u16, Value), reqwest::Error> {
        let client =
            reqwest::Client::builder().tls_backend_preconfigured(tls::client(tls::system_roots())).no_proxy();
        let mut request = client
            .build()?
            .request(method.parse().unwrap(), format!("{}/v1/{path}", self.address))
            .header("X-Vault-Token", &self.root);
        if let Some(body) = body {
            request = request.body(body.to_string());
        }
        let response = request.send().await?;
        let code = response.status().as_u16();
        Ok((code, serde_json::from_slice(&response.bytes().await?).unwrap_or_default()))
    }

    async fn admin(&self, method: &str, path: &str, body: Value) -> Value {
        let (code, answer) = self.ask(method, path, Some(body)).await.unwrap();
        assert!((200..300).contains(&code), "{method} {path}: {code} {answer}");
        answer
    }

    async fn config(&self) -> VaultConfig {
        let role = format!("auth/{}/role/agents", self.approle);
        let (_, role_id) = self.ask("GET", &format!("{role}/role-id"), None).await.unwrap();
        let secret_id = self.admin("POST", &format!("{role}/secret-id"), json!({})).await;
        let text = |value: &Value| Zeroizing::new(value.as_str().unwrap().to_owned());
        VaultConfig {
            address: self.address.clone(),
            login: VaultLogin::AppRole {
                mount: self.approle.clone(),
                role_id: text(&role_id["data"]["role_id"]),
                secret_id: SecretId::Plain(text(&secret_id["data"]["secret_id"])),
            },
            namespace: None,
            ca: None,
        }
    }

    fn source(&self, rest: &str) -> VaultSource {
        format!("vault://{}/{rest}", self.mount).parse().unwrap()
    }

    fn secret(&self, name: &str, rest: &str) -> SecretSpec {
        format!("{name}=vault://{}/{rest}", self.mount).parse().unwrap()
    }
}

fn exposed(fetched: &super::super::Fetched) -> Vec<(String, String)> {
    let text =
        |value: &super::super::Value| String::from_utf8(value.value.to_bytes().expose().to_vec()).unwrap();
    fetched.values.iter().map(|value| (value.name.clone(), text(value))).collect()
}

async fn refusal(secrets: &[SecretSpec], spec: &Spec) -> String {
    let error = fetch(secrets, spec).await.expect_err("is refused").to_string();
    assert!(!error.contains(CANARY) && error.lines().count() == 1, "{error}");
    error
}

#[tokio::test]
async fn a_role_reads_fields_and_its_token_is_revoked_at_the_end() {
    let server = Server::start(600).await;
    let config = server.config().await;
    let spec = Spec { vault: Some(config.clone()), ..Spec::default() };
    let secrets = [server.secret("TOKEN", "creds#api_token"), server.secret("PORT", "creds#port")];
    let fetched = fetch(&secrets, &spec).await.unwrap();
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(exposed(&fetched), [pair("TOKEN", CANARY), pair("PORT", "8080")]);
    assert_eq!(fetched.keeper.unwrap().end().await, Vec::<String>::new());

    // The same by hand, to see the token before and after.
    let mut session = Session::begin(&config).await.unwrap();
    let token = session.middleware.token.clone();
    session.revoke().await.unwrap();
    let login = VaultLogin::Token(Zeroizing::new(token));
    let spec = Spec { vault: Some(VaultConfig { login, ..config }), ..Spec::default() };
    let error = refusal(&secrets, &spec).await;
    assert!(error.contains("the token has expired, or its policies"), "{error}");
}

#[tokio::test]
async fn each_field_of_a_credential_source_is_a_credential() {
    let server = Server::start(600).await;
    let login = VaultLogin::Token(Zeroizing::new(server.root.clone()));
    let config = VaultConfig { address: server.address.clone(), login, namespace: None, ca: None };
    let mut spec = Spec { vault: Some(config), source: Some(server.source("plain")), ..Spec::default() };
    // One that is asked for by name stays what it was asked to be.
    let own = ["user=exec:echo me".parse().unwrap()];
    let mut found = exposed(&fetch(&own, &spec).await.unwrap());
    found.sort();
    assert_eq!(found, [("api_token".into(), CANARY.into()), ("user".into(), "me".into())]);

    spec.source = Some(server.source("plain#user"));
    assert_eq!(exposed(&fetch(&[], &spec).await.unwrap()), [("user".to_owned(), "agent".to_owned())]);
    spec.source = Some(server.source("creds"));
    assert!(refusal(&[], &spec).await.contains("field `nested`"), "an object is no credential");
    spec.source = Some(server.source("none"));
    assert!(refusal(&[], &spec).await.contains("has nothing at vault://"));
    spec.source = None;
    for (rest, words) in
        [("plain#pass", "no field `pass`"), ("plain", "has 2 fields"), ("creds#nested", "is no text")]
    {
        assert!(refusal(&[server.secret("A", rest)], &spec).await.contains(words), "{rest}");
    }
}

#[tokio::test]
async fn a_wrong_role_is_refused_in_words_that_do_not_repeat_it() {
    let server = Server::start(600).await;
    let mut config = server.config().await;
    let VaultLogin::AppRole { secret_id, .. } = &mut config.login else { panic!() };
    *secret_id = SecretId::Plain(Zeroizing::new(CANARY.into()));
    let spec = Spec { vault: Some(config), ..Spec::default() };
    let error = refusal(&[server.secret("A", "creds#port")], &spec).await;
    assert_eq!(
        error,
        "secret A: the vault refuses the login: role id or secret id are wrong, used up or expired"
    );
}

#[tokio::test]
async fn a_token_ends_with_its_term_unless_its_role_renews_it_or_logs_in_again() {
    let server = Server::start(3).await;
    let config = server.config().await;
    let source = server.source("creds");
    let forgotten = Session::begin(&config).await.unwrap();
    let kept = Session::begin(&config).await.unwrap();
    assert_eq!(kept.lease.unwrap().ttl, Duration::from_secs(3));
    let login = VaultLogin::Token(Zeroizing::new(kept.middleware.token.clone()));
    let first = Session::begin(&VaultConfig { login, ..config }).await.unwrap();
    let keeper = Keeper::start(kept, Vec::new(), BTreeMap::new());
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(matches!(forgotten.read(&source).await, Err(VaultError::Denied { .. })));
    // rvault takes the renewal of a role's token, says nothing, and does nothing: there is a second one by now.
    assert_eq!(first.read(&source).await.is_err(), server.process.is_some());
    // And a third.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let reader = keeper.reader();
    let current = reader.current(&source, true).await.unwrap();
    let Current::Read(fields, _) = current else { panic!("it was read") };
    assert!(fields.iter().any(|(name, value)| name == "api_token"
        && value.as_ref().is_some_and(|value| value.as_slice() == CANARY.as_bytes())));
    assert_eq!(keeper.end().await, Vec::<String>::new());
    assert!(reader.current(&source, true).await.is_err(), "it has ended");
    assert!(matches!(first.read(&source).await, Err(VaultError::Denied { .. })), "revoked at the end");
}

/// A double whose role's tokens are good for 5 s, are renewed for 3 and 2 more, and are followed by another so often as `logins`
/// says. Each token has its own credentials.
async fn short_lived(logins: u32) -> Double {
    let state = Mutex::new((0, 3));
    Double::start(move |asked| {
        let mut state = state.lock().unwrap();
        let (login, term) = &mut *state;
        let current = format!("t-{login}");
        let auth =
            |token: &str, term: u32| json!({ "auth": { "client_token": token, "lease_duration": term, "renewable": true } });
        match asked.line.as_str() {
            "POST /v1/auth/approle/login" if *login >= logins => {
                // Nobody's token is good any more.
                *login = u32::MAX;
                (400, json!({ "errors": [CANARY] }))
            }
            "POST /v1/auth/approle/login" => {
                assert_eq!(asked.token, "", "none is needed to log in");
                (*login, *term) = (*login + 1, 3);
                (200, auth(&format!("t-{login}"), 5))
            }
            "POST /v1/auth/token/renew-self" if asked.token == current => {
                let given = *term;
                *term -= 1;
                (200, auth(&asked.token, given))
            }
            "GET /v1/db/creds/app" if asked.token == current => (
                200,
                json!({ "lease_id": format!("l-{login}"), "lease_duration": 60, "renewable": true,
                        "data": { "p": format!("password-{login}") } }),
            ),
            "POST /v1/auth/token/revoke-self" => (204, Value::Null),
            _ => (403, json!({ "errors": [CANARY] })),
        }
    })
    .await
}

fn role() -> VaultLogin {
    let (role_id, secret_id) = (Zeroizing::new("r".to_owned()), SecretId::Plain(Zeroizing::new("s".into())));
    VaultLogin::AppRole { mount: "approle".into(), role_id, secret_id }
}

/// The next change: what the field `p` is now.
async fn next(changes: &mut Changes) -> Option<String> {
    let change = tokio::time::timeout(Duration::from_secs(30), changes.recv()).await.expect("in time");
    let Change { what, fields } = change.expect("the keeper is there");
    assert_eq!(what, "vault://db/creds/app");
    let value = fields?.into_iter().find(|(name, _)| name == "p").unwrap().1.unwrap();
    Some(String::from_utf8(value.to_vec()).unwrap())
}

#[tokio::test]
async fn a_token_is_renewed_until_its_longest_term_and_then_followed_with_all_that_was_issued_to_it() {
    let double = short_lived(u32::MAX).await;
    let spec = Spec { vault: Some(double.config(role())), ..Spec::default() };
    let mut fetched = fetch(&["DB=vault://db/creds/app#p".parse().unwrap()], &spec).await.unwrap();
    assert_eq!(exposed(&fetched), [("DB".to_owned(), "password-1".to_owned())]);
    let mut changes = fetched.changes.take().unwrap();
    assert_eq!(next(&mut changes).await.unwrap(), "password-2");
    // After 3.3 s for 3 more, after 2 s more for 2, which is less than half.
    let renewals = double.lines().iter().filter(|line| line.ends_with("renew-self")).count();
    assert_eq!(renewals, 2, "{:?}", double.lines());
    assert_eq!(fetched.keeper.take().unwrap().end().await, Vec::<String>::new());
    // The former is not over yet.
    let asked = double.asked.lock().unwrap();
    let revoked: Vec<&str> = asked
        .iter()
        .filter(|asked| asked.line.ends_with("revoke-self"))
        .map(|asked| asked.token.as_str())
        .collect();
    assert_eq!(revoked, ["t-2", "t-1"]);
}

#[tokio::test]
async fn what_was_issued_to_a_token_is_over_with_it() {
    let double = short_lived(1).await;
    let spec = Spec { vault: Some(double.config(role())), ..Spec::default() };
    let mut fetched = fetch(&["DB=vault://db/creds/app#p".parse().unwrap()], &spec).await.unwrap();
    let mut changes = fetched.changes.take().unwrap();
    assert_eq!(next(&mut changes).await, None);
    let troubles = fetched.keeper.take().unwrap().end().await;
    let [renew, denied, over, token] = &troubles[..] else { panic!("{troubles:?}") };
    assert!(renew.starts_with("renew the vault's token, which is good for "), "{renew}");
    assert!(
        renew.ends_with("the vault refuses the login: role id or secret id are wrong, used up or expired")
    );
    assert!(denied.starts_with("renew vault://db/creds/app, which is good for 0 s more: "), "{denied}");
    assert!(over.starts_with("vault://db/creds/app was good until 0 s before the end"), "{over}");
    assert!(token.starts_with("the vault's token was good until 0 s before the end"), "{token}");
}

#[tokio::test]
async fn what_is_issued_for_a_term_is_issued_anew_and_over_when_it_is_no_longer() {
    let issued = Mutex::new(0);
    let double = Double::start(move |asked| match asked.line.as_str() {
        "GET /v1/db/creds/app" => {
            let mut issued = issued.lock().unwrap();
            *issued += 1;
            let data = json!({ "p": format!("password-{issued}") });
            let lease = json!({ "lease_id": format!("l-{issued}"), "lease_duration": 3, "renewable": *issued == 1, "data": data });
            if *issued < 4 { (200, lease) } else { (403, json!({ "errors": [CANARY] })) }
        }
        // Not by this role.
        "PUT /v1/sys/leases/renew" => (403, json!({ "errors": [CANARY] })),
        "PUT /v1/sys/leases/revoke" => (204, Value::Null),
        _ => (404, json!({ "errors": [] })),
    })
    .await;
    let spec = Spec { vault: Some(double.config(token())), ..Spec::default() };
    let secrets = ["A=vault://db/creds/app#p", "B=vault://db/creds/app"].map(|text| text.parse().unwrap());
    let began = Instant::now();
    let mut fetched = fetch(&secrets, &spec).await.unwrap();
    assert_eq!(fetched.bound.len(), 2);
    let mut changes = fetched.changes.take().unwrap();
    assert_eq!(next(&mut changes).await.unwrap(), "password-2");
    assert_eq!(next(&mut changes).await.unwrap(), "password-3");
    assert_eq!(next(&mut changes).await, None);
    // Two thirds of two terms, and the whole third, during which it was tried again.
    let lasted = began.elapsed();
    assert!((Duration::from_millis(6900)..Duration::from_secs(9)).contains(&lasted), "{lasted:?}");
    let troubles = fetched.keeper.take().unwrap().end().await;
    assert_eq!(troubles.len(), 2, "{troubles:?}");
    assert!(
        troubles[0].contains("which is good for 0 s more: the vault refuses vault://db/creds/app"),
        "{troubles:?}"
    );
    // What has been followed is over as well, and nothing is left to be given back but the last.
    assert_eq!(double.lines().iter().filter(|line| line.ends_with("leases/revoke")).count(), 1);
}

#[tokio::test]
async fn a_sealed_server_and_one_that_goes_away_are_told_apart() {
    let mut server = Server::start(3).await;
    let config = server.config().await;
    let spec = Spec { vault: Some(config), ..Spec::default() };
    let secret = [server.secret("A", "creds#port")];
    let keeper = fetch(&secret, &spec).await.unwrap().keeper.unwrap();
    // A real server is somebody's, and is left as it is.
    if server.process.is_none() {
        keeper.end().await;
        return;
    }
    server.admin("PUT", "sys/seal", json!({})).await;
    assert!(refusal(&secret, &spec).await.contains("is sealed"));
    server.unseal().await;

    let process = server.process.as_mut().unwrap();
    process.kill().unwrap();
    process.wait().unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    let troubles = tokio::time::timeout(Duration::from_secs(15), keeper.end()).await.expect("does not hang");
    assert!(troubles[0].starts_with("renew the vault's token"), "{troubles:?}");
    assert!(troubles.last().unwrap().starts_with("give credentials back"), "{troubles:?}");
    let error = refusal(&secret, &spec).await;
    assert!(error.contains("cannot be reached: nobody listens there"), "{error}");
}

/// What a [`Double`] was asked: method and path, the named headers, the body.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    line: String,
    token: String,
    namespace: String,
    body: String,
}

/// A double of a server: answers what it is told to, over real HTTP.
struct Double {
    address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Double {
    /// One whose engine issues a credential for so many seconds, after it has stood still, with all else, for `pause`.
    async fn issuing(pause: Duration, seconds: u64) -> Double {
        Double::start(move |asked| match asked.line.as_str() {
            "GET /v1/db/creds/app" => {
                std::thread::sleep(pause);
                let data = json!({ "p": CANARY });
                let lease = json!({ "lease_id": "l", "lease_duration": seconds, "renewable": seconds > 1, "data": data });
                (200, lease)
            }
            "PUT /v1/sys/leases/revoke" => (204, Value::Null),
            _ => (404, json!({ "errors": [] })),
        })
        .await
    }

    async fn start(answer: impl Fn(&Asked) -> (u16, Value) + Send + Sync + 'static) -> Double {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (log, answer) = (asked.clone(), Arc::new(answer));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (log, answer) = (log.clone(), answer.clone());
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    let (mut head, mut length) = (Vec::new(), 0);
                    loop {
                        let mut line = String::new();
                        if stream.read_line(&mut line).await.unwrap_or(0) <= 2 {
                            break;
                        }
                        if let Some(rest) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                            length = rest.trim().parse().unwrap();
                        }
                        head.push(line.trim_end().to_owned());
                    }
                    let mut body = vec![0; length];
                    stream.read_exact(&mut body).await.unwrap();
                    let header = |name: &str| {
                        let line = head.iter().find(|line| line.to_ascii_lowercase().starts_with(name));
                        line.and_then(|line| line.split_once(": "))
                            .map(|(_, value)| value.to_owned())
                            .unwrap_or_default()
                    };
                    let asked = Asked {
                        line: head[0].trim_end_matches(" HTTP/1.1").trim_end_matches('?').into(),
                        token: header("x-vault-token"),
                        namespace: header("x-vault-namespace"),
                        body: String::from_utf8(body).unwrap(),
                    };
                    let (code, body) = answer(&asked);
                    log.lock().unwrap().push(asked);
                    let body = if body.is_null() { String::new() } else { body.to_string() };
                    let location = if code == 307 { "location: http://127.0.0.1:1/\r\n" } else { "" };
                    let reply = format!(
                        "HTTP/1.1 {code} x\r\n{location}connection: close\r\ncontent-length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    let _ = stream.get_mut().write_all(reply.as_bytes()).await;
                });
            }
        });
        Double { address, asked }
    }

    fn config(&self, login: VaultLogin) -> VaultConfig {
        VaultConfig { address: self.address.clone(), login, namespace: Some("team/a".into()), ca: None }
    }

    fn lines(&self) -> Vec<String> {
        self.asked.lock().unwrap().iter().map(|asked| asked.line.clone()).collect()
    }
}

fn token() -> VaultLogin {
    VaultLogin::Token(Zeroizing::new("t-1".into()))
}

#[tokio::test]
async fn kv_2_is_noticed_and_a_namespace_goes_with_every_request() {
    let double = Double::start(|asked| match asked.line.as_str() {
        "GET /v1/sys/internal/ui/mounts/kv" => (200, json!({ "data": { "options": { "version": "2" } } })),
        "GET /v1/kv/data/app/db" => {
            (200, json!({ "data": { "data": { "password": CANARY }, "metadata": { "version": 3 } } }))
        }
        _ => (404, json!({ "errors": [] })),
    })
    .await;
    let spec = Spec { vault: Some(double.config(token())), ..Spec::default() };
    let fetched = fetch(&["DB=vault://kv/app/db#password".parse().unwrap()], &spec).await.unwrap();
    assert_eq!(exposed(&fetched), [("DB".to_owned(), CANARY.to_owned())]);
    let asked = double.asked.lock().unwrap().clone();
    assert!(asked.iter().all(|asked| asked.namespace == "team/a" && asked.token == "t-1"), "{asked:?}");
}

#[tokio::test]
async fn a_wrapped_secret_id_is_unwrapped_and_logs_in() {
    let double = Double::start(|asked| match (asked.line.as_str(), asked.token.as_str()) {
        ("POST /v1/sys/wrapping/unwrap", "w-1") => (200, json!({ "data": { "secret_id": "s-1" } })),
        ("POST /v1/auth/approle/login", "") => {
            assert!(asked.body.contains("\"r-1\"") && asked.body.contains("\"s-1\""), "{asked:?}");
            (200, json!({ "auth": { "client_token": "t-2", "lease_duration": 60, "renewable": true } }))
        }
        ("GET /v1/kv/a", "t-2") => (200, json!({ "data": { "x": CANARY } })),
        ("POST /v1/auth/token/revoke-self", "t-2") => (204, Value::Null),
        ("POST /v1/sys/wrapping/unwrap", _) => {
            (400, json!({ "errors": ["wrapping token is not valid: ", CANARY] }))
        }
        _ => (404, json!({ "errors": [] })),
    })
    .await;
    let login = |wrapped: &str| VaultLogin::AppRole {
        mount: "approle".into(),
        role_id: Zeroizing::new("r-1".into()),
        secret_id: SecretId::Wrapped(Zeroizing::new(wrapped.into())),
    };
    let secret = ["A=vault://kv/a".parse().unwrap()];
    let spec = Spec { vault: Some(double.config(login("w-1"))), ..Spec::default() };
    let fetched = fetch(&secret, &spec).await.unwrap();
    assert_eq!(fetched.keeper.unwrap().end().await, Vec::<String>::new());
    assert_eq!(double.lines().last().unwrap(), "POST /v1/auth/token/revoke-self");
    let spec = Spec { vault: Some(double.config(login("w-2"))), ..Spec::default() };
    assert!(refusal(&secret, &spec).await.contains("wrapping token is not valid"));
}

#[tokio::test]
async fn what_an_engine_issues_is_renewed_and_revoked() {
    let double = Double::start(|asked| match asked.line.as_str() {
        "GET /v1/database/creds/app" => (
            200,
            json!({ "lease_id": "database/creds/app/x", "lease_duration": 3, "renewable": true,
                    "data": { "username": "u", "password": CANARY } }),
        ),
        "PUT /v1/sys/leases/renew" => {
            (200, json!({ "lease_id": "database/creds/app/x", "lease_duration": 3, "renewable": true }))
        }
        "PUT /v1/sys/leases/revoke" => (204, Value::Null),
        _ => (404, json!({ "errors": [] })),
    })
    .await;
    let spec = Spec { vault: Some(double.config(token())), ..Spec::default() };
    let secrets = ["U=vault://database/creds/app#username", "P=vault://database/creds/app#password"];
    let fetched = fetch(&secrets.map(|text| text.parse().unwrap()), &spec).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2800)).await;
    assert_eq!(fetched.keeper.unwrap().end().await, Vec::<String>::new());
    let count = |line: &str| double.lines().iter().filter(|other| *other == line).count();
    // Read once for both, or there would be two users.
    assert_eq!((count("GET /v1/database/creds/app"), count("PUT /v1/sys/leases/renew")), (1, 1));
    assert_eq!(count("PUT /v1/sys/leases/revoke"), 1);
    // A token that somebody else got is not ours to revoke.
    assert_eq!(count("POST /v1/auth/token/revoke-self"), 0);
}

#[tokio::test]
async fn what_ends_before_the_sandbox_and_cannot_be_renewed_is_said() {
    let double = Double::issuing(Duration::ZERO, 1).await;
    let source: VaultSource = "vault://db/creds/app#p".parse().unwrap();
    let keep = async || {
        let session = Session::begin(&double.config(token())).await.unwrap();
        let (id, lease) = session.read(&source).await.unwrap().lease.unwrap();
        // Nobody follows it: so are keys that an endpoint reads again when it is asked for them.
        Keeper::start(session, vec![Issued { what: source.place(), id, lease }], BTreeMap::new())
    };
    assert_eq!(keep().await.end().await, Vec::<String>::new());
    let late = keep().await;
    tokio::time::sleep(Duration::from_millis(2200)).await;
    let over = "vault://db/creds/app was good until 1 s before the end, and could not be renewed";
    assert_eq!(late.end().await, [over]);
    // It is nobody's to renew.
    assert!(double.lines().iter().all(|line| !line.ends_with("leases/renew")));
}

#[tokio::test]
async fn who_gives_up_waiting_leaves_nothing_issued() {
    let double = Double::issuing(Duration::ZERO, 60).await;
    let spec = Spec { vault: Some(double.config(token())), ..Spec::default() };
    let count = || double.lines().iter().filter(|line| line.ends_with("leases/revoke")).count();
    // While something else is fetched.
    let secrets = ["P=vault://db/creds/app#p", "Q=exec:exec sleep 60"].map(|text| text.parse().unwrap());
    let fetching = tokio::time::timeout(Duration::from_secs(1), fetch(&secrets, &spec)).await;
    assert!(fetching.is_err());
    let limit = Duration::from_secs(5);
    tokio::time::timeout(limit, crate::given_back()).await.expect("in time");
    assert_eq!(count(), 1);
    // After all was fetched.
    drop(fetch(&secrets[..1], &spec).await.unwrap());
    tokio::time::timeout(limit, crate::given_back()).await.expect("in time");
    assert_eq!(count(), 2);
}

#[tokio::test]
async fn what_is_issued_while_whoever_asked_goes_is_given_back() {
    // All stand still, so that whoever asked goes before it has read the answer.
    let double = Double::issuing(Duration::from_millis(500), 60).await;
    let spec = Spec { vault: Some(double.config(token())), ..Spec::default() };
    let secrets = ["P=vault://db/creds/app#p", "Q=exec:exec sleep 60"].map(|text| text.parse().unwrap());
    assert!(tokio::time::timeout(Duration::from_millis(200), fetch(&secrets, &spec)).await.is_err());
    tokio::time::timeout(Duration::from_secs(5), crate::given_back()).await.expect("in time");
    assert!(double.lines().iter().any(|line| line.ends_with("leases/revoke")), "{:?}", double.lines());
}

#[tokio::test]
async fn a_server_that_says_nothing_breaks_off_or_never_ends_is_given_up() {
    use rustix::net::sockopt::set_socket_linger;
    let reset = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endless = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = [&reset, &silent, &endless].map(|listener| listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = reset.accept().await {
            set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = endless.accept().await {
            tokio::spawn(async move {
                let body = format!("{{\"data\": \"{CANARY}");
                let head = format!(
                    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n",
                    body.len()
                );
                let _ = stream.write_all(head.as_bytes()).await;
                while stream.write_all(b"1\r\na\r\n").await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            });
        }
    });
    let asked = |address: std::net::SocketAddr| async move {
        let config =
            VaultConfig { address: format!("http://{address}"), login: token(), namespace: None, ca: None };
        let spec = Spec { vault: Some(config), ..Spec::default() };
        let limit = Duration::from_secs(15);
        tokio::time::timeout(limit, refusal(&["A=vault://kv/a#x".parse().unwrap()], &spec))
            .await
            .expect("in time")
    };
    let [reset, mute, endless] = addresses.map(asked);
    let (reset, mute, endless) = tokio::join!(reset, mute, endless);
    drop(silent);
    // Whether the connection was there before it was reset is not always to be told.
    assert!(reset.contains("cannot be reached: "), "{reset}");
    assert!(mute.ends_with("cannot be reached: it does not answer within 10 s"), "{mute}");
    assert!(endless.ends_with("cannot be reached: it does not answer within 10 s"), "{endless}");
}

#[tokio::test]
async fn keys_of_an_engine_are_followed_by_others_before_they_are_over() {
    let made = Arc::new(Mutex::new(0));
    let count = made.clone();
    let double = Double::start(move |asked| match asked.line.as_str() {
        "GET /v1/aws/creds/deploy" => {
            let mut made = count.lock().unwrap();
            *made += 1;
            (
                200,
                json!({ "lease_id": format!("aws/{made}"), "lease_duration": 4, "renewable": false,
                        "data": { "access_key": format!("ASIA{made}"), "secret_key": CANARY, "security_token": "t" } }),
            )
        }
        "PUT /v1/sys/leases/revoke" => (204, Value::Null),
        _ => (404, json!({ "errors": [] })),
    })
    .await;
    let spec = Spec { vault: Some(double.config(token())), ..Spec::default() };
    let secret: SecretSpec = "AWS=vault://aws/creds/deploy".parse().unwrap();
    let secret = SecretSpec { delivery: crate::Delivery::Endpoint, ..secret };
    let fetched = fetch(std::slice::from_ref(&secret), &spec).await.unwrap();
    let names: Vec<&str> = fetched.values.iter().map(|value| value.name.as_str()).collect();
    assert!(names.iter().all(|name| name.starts_with("AWS_")) && names.len() == 4, "{names:?}");
    assert!(exposed(&fetched).iter().all(|(_, value)| !value.contains(CANARY)));
    let endpoint = fetched.endpoint.clone().unwrap();
    let id = async || {
        let (document, trouble) = endpoint.document().await.unwrap();
        assert_eq!(trouble, None);
        let document: Value = serde_json::from_slice(&document).unwrap();
        document["AccessKeyId"].as_str().unwrap().to_owned()
    };
    // As long as they are good they are the same, however often they are asked for.
    assert_eq!(id().await, "ASIA1");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(id().await, "ASIA1");
    tokio::time::sleep(Duration::from_millis(1700)).await;
    assert_eq!(id().await, "ASIA2");
    assert_eq!(*made.lock().unwrap(), 2);
    assert_eq!(fetched.keeper.unwrap().end().await, Vec::<String>::new());
    // The first are not over yet, and given back as well.
    let revoked =
        double.asked.lock().unwrap().iter().filter(|asked| asked.line.ends_with("leases/revoke")).count();
    assert_eq!(revoked, 2);
    // Then there is nobody to ask any more: what there is goes on until it is over.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(endpoint.document().await.unwrap().1.unwrap(), "what the vault had issued was given back");
    tokio::time::sleep(Duration::from_millis(3000)).await;
    assert!(endpoint.document().await.is_err());

    let more = [secret.clone(), SecretSpec { name: "AWS2".into(), ..secret }];
    assert!(refusal(&more, &spec).await.contains("secret AWS2: there is one endpoint"));
}

#[tokio::test]
async fn what_was_issued_is_given_back_when_something_else_fails() {
    let double = Double::issuing(Duration::ZERO, 60).await;
    let spec = Spec { vault: Some(double.config(token())), ..Spec::default() };
    let secrets = ["P=vault://db/creds/app#p".parse().unwrap(), "Q=env:CHITIN_NO_SUCH".parse().unwrap()];
    refusal(&secrets, &spec).await;
    assert_eq!(double.lines().last().unwrap(), "PUT /v1/sys/leases/revoke");
}

#[tokio::test]
async fn every_class_of_error_is_one_line_without_what_the_server_said() {
    let cases = [
        (307, "redirect"),
        (403, "refuses vault://kv/a: the token has expired, or its policies do not allow this"),
        (404, "nothing at vault://kv/a"),
        (429, "sealed, or not ready"),
        (500, "answers vault://kv/a with status 500"),
        (503, "sealed, or not ready"),
        // Not an answer, and an answer without data.
        (299, "answer to vault://kv/a is none"),
        (204, "nothing at vault://kv/a"),
    ];
    for (code, words) in cases {
        let double = Double::start(move |asked| match (asked.line.as_str(), code) {
            ("GET /v1/kv/a", 299) => (200, json!([CANARY])),
            ("GET /v1/kv/a", code) => {
                (code, if code == 204 { Value::Null } else { json!({ "errors": [CANARY] }) })
            }
            _ => (404, Value::Null),
        })
        .await;
        let spec = Spec { vault: Some(double.config(token())), ..Spec::default() };
        let error = refusal(&["A=vault://kv/a#x".parse().unwrap()], &spec).await;
        assert!(error.contains(words), "{code}: {error}");
    }
}

#[tokio::test]
async fn a_server_that_is_none_is_named() {
    // Accepts, and says nothing that is HTTP.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"220 smtp\r\n").await;
        }
    });
    for (address, words) in [
        (format!("http://{address}"), "cannot be reached: the connection broke off"),
        (format!("https://{address}"), "cannot be reached: "),
        ("ftp://x".into(), "VAULT_ADDR is no http:// or https:// address"),
        ("x".into(), "VAULT_ADDR is no http:// or https:// address"),
    ] {
        let config = VaultConfig { address, login: token(), namespace: None, ca: None };
        let spec = Spec { vault: Some(config), ..Spec::default() };
        let error = refusal(&["A=vault://kv/a#x".parse().unwrap()], &spec).await;
        assert!(error.contains(words), "{error}");
    }
    let config = VaultConfig {
        address: "http://user:canary-52b1d9e0f7@127.0.0.1:1".into(),
        login: VaultLogin::Token(Zeroizing::new("t\n".into())),
        namespace: None,
        ca: None,
    };
    let spec = |config: &VaultConfig| Spec { vault: Some(config.clone()), ..Spec::default() };
    let secret = ["A=vault://kv/a#x".parse().unwrap()];
    assert!(refusal(&secret, &spec(&config)).await.contains("was a newline copied with it?"));
    let config = VaultConfig { login: token(), ..config };
    assert!(refusal(&secret, &spec(&config)).await.contains("http://127.0.0.1:1 cannot be reached"));
    let config = VaultConfig { ca: Some("/dev/null".into()), ..config };
    assert!(refusal(&secret, &spec(&config)).await.contains("VAULT_CACERT, /dev/null: there is none in it"));
}

#[test]
fn the_environment_says_which_vault_and_who_we_are() {
    let from = |pairs: &[(&str, &str)]| {
        let pairs: Vec<(String, String)> =
            pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        VaultConfig::from(move |name| {
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
    let role =
        [address, ("VAULT_ROLE_ID", "r"), ("VAULT_WRAPPED_SECRET_ID", CANARY), ("VAULT_NAMESPACE", "n")];
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
