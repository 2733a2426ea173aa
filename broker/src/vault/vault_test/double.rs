//! Tests of conditions that a server cannot be brought into: invalid responses, delays, AWS keys.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::vault::lease_renewal::{IssuedLease, LeaseRenewer};

/// A double of a server, over TCP.
pub(super) struct ServerDouble {
    pub address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl ServerDouble {
    /// Starts a server whose engine issues a credential for so many seconds. It answers each read
    /// after `delay`, and blocks the other tasks of the test meanwhile.
    async fn issuing(delay: Duration, seconds: u64) -> ServerDouble {
        ServerDouble::start(move |line| match line {
            "GET /v1/db/creds/app" => {
                std::thread::sleep(delay);
                let lease = json!({
                    "lease_id": "l", "lease_duration": seconds, "renewable": seconds > 1,
                    "data": { "p": CANARY },
                });
                (200, lease)
            }
            "PUT /v1/sys/leases/revoke" => (204, Value::Null),
            _ => (404, json!({ "errors": [] })),
        })
        .await
    }

    /// Starts a server that answers each line, of a method and a path, with a status and a body.
    pub async fn start(
        answer: impl Fn(&str) -> (u16, Value) + Send + Sync + 'static,
    ) -> ServerDouble {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let (log, answer) = (requests.clone(), Arc::new(answer));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (log, answer) = (log.clone(), answer.clone());
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    let line = read_request(&mut stream).await;
                    let (status, body) = answer(&line);
                    log.lock().unwrap().push(line);
                    let response = response(status, &body);
                    let _ = stream.get_mut().write_all(response.as_bytes()).await;
                });
            }
        });
        ServerDouble { address, requests }
    }

    fn config(&self) -> VaultConfig {
        config_of(self.address.clone())
    }

    /// Counts the requests that a condition selects.
    pub fn count(&self, condition: impl Fn(&str) -> bool) -> usize {
        self.requests.lock().unwrap().iter().filter(|line| condition(line)).count()
    }

    fn count_revoked_leases(&self) -> usize {
        self.count(|line| line.ends_with("leases/revoke"))
    }
}

/// Reads a request. Returns its method and path.
async fn read_request(stream: &mut BufReader<TcpStream>) -> String {
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
    stream.read_exact(&mut vec![0; length]).await.unwrap();
    head[0].trim_end_matches(" HTTP/1.1").to_owned()
}

fn response(status: u16, body: &Value) -> String {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let location = if status == 307 { "location: http://127.0.0.1:1/\r\n" } else { "" };
    format!(
        "HTTP/1.1 {status} x\r\n{location}connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn config_of(address: String) -> VaultConfig {
    let login = VaultLogin::Token(Zeroizing::new("t-1".into()));
    VaultConfig { address, login, namespace: None, ca: None }
}

#[tokio::test]
async fn requests_carry_token_namespace_and_body() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}/prefix/", listener.local_addr().unwrap());
    let login = VaultLogin::AppRole {
        mount: "team/approle".into(),
        role_id: Zeroizing::new("r".into()),
        secret_id: SecretId::Plain(Zeroizing::new("s".into())),
    };
    let config = VaultConfig { login, namespace: Some("n".into()), ..config_of(address) };
    let serve = async {
        let mut requests = Vec::new();
        let login = json!({ "auth": { "client_token": "t-2" } });
        for answer in [login, json!({}), json!({ "data": { "f": 1 } })] {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let mut len = stream.read(&mut request).await.unwrap();
            if request.starts_with(b"POST") && !request[..len].ends_with(b"}") {
                len += stream.read(&mut request[len..]).await.unwrap();
            }
            requests.push(String::from_utf8(request[..len].to_vec()).unwrap());
            stream.write_all(response(200, &answer).as_bytes()).await.unwrap();
        }
        requests
    };
    let read = async {
        let client = VaultClient::log_in(&config).await.unwrap();
        client.read_secret(&"vault://kv/a/b".parse().unwrap()).await.unwrap()
    };
    let (requests, secret) = tokio::join!(serve, read);
    assert_eq!(secret.fields.len(), 1);
    let [login, mount, secret] = &requests[..] else { panic!("{requests:?}") };
    assert!(login.starts_with("POST /prefix/v1/auth/team/approle/login HTTP/1.1\r\n"), "{login}");
    assert!(login.ends_with("\r\n\r\n{\"role_id\":\"r\",\"secret_id\":\"s\"}"), "{login}");
    assert!(!login.contains("x-vault-token"), "{login}");
    assert!(mount.starts_with("GET /prefix/v1/sys/internal/ui/mounts/kv HTTP/1.1\r\n"), "{mount}");
    assert!(secret.starts_with("GET /prefix/v1/kv/a/b HTTP/1.1\r\n"), "{secret}");
    for request in &requests {
        assert!(request.contains("x-vault-namespace: n\r\n"), "{request}");
        assert!(request.contains("x-vault-request: true\r\n"), "{request}");
    }
    for request in [mount, secret] {
        assert!(request.contains("x-vault-token: t-2\r\n"), "{request}");
    }
}

#[tokio::test]
async fn unrenewable_secret_is_reissued_until_refused() {
    let issued = Mutex::new(0);
    let double = ServerDouble::start(move |line| match line {
        "GET /v1/db/creds/app" => {
            let mut issued = issued.lock().unwrap();
            *issued += 1;
            let lease = json!({
                "lease_id": format!("l-{issued}"), "lease_duration": 3, "renewable": *issued == 1,
                "data": { "p": format!("password-{issued}") },
            });
            if *issued < 4 { (200, lease) } else { (403, json!({ "errors": [CANARY] })) }
        }
        // The role may not renew.
        "PUT /v1/sys/leases/renew" => (403, json!({ "errors": [CANARY] })),
        "PUT /v1/sys/leases/revoke" => (204, Value::Null),
        _ => (404, json!({ "errors": [] })),
    })
    .await;
    let log = crate::log_test::LogCapture::start();
    let spec = spec_of(double.config());
    let secrets =
        ["A=vault://db/creds/app#p", "B=vault://db/creds/app"].map(|text| text.parse().unwrap());
    let began = Instant::now();
    let mut fetched = fetch(&secrets, &spec).await.unwrap();
    assert_eq!(fetched.rotating.len(), 2);
    let (mut changes, location) = (fetched.changes.take().unwrap(), "vault://db/creds/app");
    assert_eq!(next_change(&mut changes, location, "p").await.unwrap(), "password-2");
    assert_eq!(next_change(&mut changes, location, "p").await.unwrap(), "password-3");
    assert_eq!(next_change(&mut changes, location, "p").await, None);
    // Two thirds of two TTLs, and a whole third one with retries.
    let lasted = began.elapsed();
    assert!((Duration::from_millis(6900)..Duration::from_secs(9)).contains(&lasted), "{lasted:?}");
    let messages = fetched.lease_renewer.take().unwrap().revoke_all().await;
    assert_eq!(messages.len(), 2, "{messages:?}");
    let denied = VaultError::Denied { operation: location.into() };
    assert!(messages[0].contains(&denied.to_string()), "{messages:?}");
    // The superseded leases have expired: only the last is revoked.
    assert_eq!(double.count_revoked_leases(), 1);
    log.assert(&["secret read again", "lease not renewed"], &["password-", CANARY]);
}

#[tokio::test]
async fn lease_expired_before_the_end_is_reported() {
    let double = ServerDouble::issuing(Duration::ZERO, 1).await;
    let source: VaultSource = "vault://db/creds/app#p".parse().unwrap();
    let start = async || {
        let client = VaultClient::log_in(&double.config()).await.unwrap();
        let (id, lease) = client.read_secret(&source).await.unwrap().lease.unwrap();
        let issued = vec![IssuedLease { location: source.location(), id, lease }];
        // Not reissuable, like the keys of an endpoint, which are read on request.
        LeaseRenewer::start(client, issued, BTreeMap::new(), &closed_tracker())
    };
    assert_eq!(start().await.revoke_all().await, Vec::<String>::new());
    let late = start().await;
    tokio::time::sleep(Duration::from_millis(2200)).await;
    let messages = late.revoke_all().await;
    assert!(messages.len() == 1 && messages[0].starts_with(&source.location()), "{messages:?}");
    // The lease is not renewable.
    assert_eq!(double.count(|line| line.ends_with("leases/renew")), 0);
}

#[tokio::test]
async fn cancelled_fetch_revokes_issued_leases() {
    let double = ServerDouble::issuing(Duration::ZERO, 60).await;
    let spec = spec_of(double.config());
    let cleanup = closed_tracker();
    // While another credential is fetched.
    let secrets =
        ["P=vault://db/creds/app#p", "Q=exec:exec sleep 60"].map(|text| text.parse().unwrap());
    let fetching = fetch_credentials(&secrets, &spec, &cleanup);
    assert!(tokio::time::timeout(Duration::from_secs(1), fetching).await.is_err());
    let limit = Duration::from_secs(5);
    tokio::time::timeout(limit, cleanup.wait()).await.expect("in time");
    assert_eq!(double.count_revoked_leases(), 1);
    // After all credentials were fetched.
    drop(fetch_credentials(&secrets[..1], &spec, &cleanup).await.unwrap());
    tokio::time::timeout(limit, cleanup.wait()).await.expect("in time");
    assert_eq!(double.count_revoked_leases(), 2);
}

#[tokio::test]
async fn lease_issued_during_cancellation_is_revoked() {
    // The server blocks all tasks, so that the caller is gone before the response is read.
    let double = ServerDouble::issuing(Duration::from_millis(500), 60).await;
    let cleanup = closed_tracker();
    let spec = spec_of(double.config());
    let secrets =
        ["P=vault://db/creds/app#p", "Q=exec:exec sleep 60"].map(|text| text.parse().unwrap());
    let fetching = fetch_credentials(&secrets, &spec, &cleanup);
    assert!(tokio::time::timeout(Duration::from_millis(200), fetching).await.is_err());
    tokio::time::timeout(Duration::from_secs(5), cleanup.wait()).await.expect("in time");
    assert_eq!(double.count_revoked_leases(), 1);
}

/// Accepts connections and resets them.
async fn reset_connections(listener: TcpListener) {
    use rustix::net::sockopt::set_socket_linger;
    while let Ok((stream, _)) = listener.accept().await {
        set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    }
}

/// Sends a response that never ends, byte by byte.
async fn send_endless_responses(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let body = format!("{{\"data\": \"{CANARY}");
            let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
            let first = format!("{head}{:x}\r\n{body}\r\n", body.len());
            let _ = stream.write_all(first.as_bytes()).await;
            while stream.write_all(b"1\r\na\r\n").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }
}

#[tokio::test]
async fn silent_resetting_and_endless_servers_time_out() {
    let reset = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endless = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = [&reset, &silent, &endless].map(|listener| listener.local_addr().unwrap());
    tokio::spawn(reset_connections(reset));
    tokio::spawn(send_endless_responses(endless));
    let failure = |address: SocketAddr| async move {
        let spec = spec_of(config_of(format!("http://{address}")));
        let secrets = ["A=vault://kv/a#x".parse().unwrap()];
        let fetching = fetch_error(&secrets, &spec);
        match tokio::time::timeout(Duration::from_secs(15), fetching).await.expect("in time").1 {
            VaultError::Unreachable { failure, .. } => failure,
            error => panic!("{error:?}"),
        }
    };
    let [reset, mute, endless] = addresses.map(failure);
    let (reset, mute, endless) = tokio::join!(reset, mute, endless);
    drop(silent);
    // The reset may come before or after the connection is established.
    assert!(matches!(reset, ConnectionFailure::Connect | ConnectionFailure::Broken), "{reset}");
    assert_eq!((mute, endless), (ConnectionFailure::Timeout, ConnectionFailure::Timeout));
}

#[tokio::test]
async fn aws_keys_are_reissued_before_they_expire() {
    let issued = Arc::new(Mutex::new(0));
    let count = issued.clone();
    let double = ServerDouble::start(move |line| match line {
        "GET /v1/aws/creds/deploy" => {
            let mut issued = count.lock().unwrap();
            *issued += 1;
            let data = json!({
                "access_key": format!("ASIA{issued}"), "secret_key": CANARY, "security_token": "t",
            });
            let lease_id = format!("aws/{issued}");
            let lease = json!({
                "lease_id": lease_id, "lease_duration": 4, "renewable": false, "data": data,
            });
            (200, lease)
        }
        "PUT /v1/sys/leases/revoke" => (204, Value::Null),
        _ => (404, json!({ "errors": [] })),
    })
    .await;
    let spec = spec_of(double.config());
    let secret: SecretSpec = "AWS=vault://aws/creds/deploy".parse().unwrap();
    let secret = SecretSpec { delivery: chitin_spec::Delivery::Endpoint, ..secret };
    let fetched = fetch(std::slice::from_ref(&secret), &spec).await.unwrap();
    let names: Vec<&str> = fetched.values.iter().map(|value| value.name.as_str()).collect();
    assert!(names.iter().all(|name| name.starts_with("AWS_")) && names.len() == 4, "{names:?}");
    assert!(exposed(&fetched).iter().all(|(_, value)| !value.contains(CANARY)));
    let server = fetched.aws_server.clone().unwrap();
    let id = async || {
        let (document, error) = server.read_document().await.unwrap();
        assert!(error.is_none(), "{error:?}");
        let document: Value = serde_json::from_slice(&document).unwrap();
        document["AccessKeyId"].as_str().unwrap().to_owned()
    };
    // As long as the keys are fresh, all requests get the same.
    assert_eq!(id().await, "ASIA1");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(id().await, "ASIA1");
    tokio::time::sleep(Duration::from_millis(1700)).await;
    assert_eq!(id().await, "ASIA2");
    assert_eq!(*issued.lock().unwrap(), 2);
    assert_eq!(fetched.lease_renewer.unwrap().revoke_all().await, Vec::<String>::new());
    // The first keys have not expired yet, and are revoked as well.
    assert_eq!(double.count_revoked_leases(), 2);
    // Without a renewer, the last keys are served until they expire.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let error = server.read_document().await.unwrap().1;
    assert!(matches!(error, Some(SecretError::Vault(VaultError::Revoked))), "{error:?}");
    tokio::time::sleep(Duration::from_millis(3000)).await;
    assert!(server.read_document().await.is_err());

    let more = [secret.clone(), SecretSpec { name: "AWS2".into(), ..secret }];
    let error = fetch(&more, &spec).await.unwrap_err();
    assert!(
        matches!(&error, Error::Secret { name, source: SecretError::SecondEndpoint }
            if name == "AWS2"),
        "{error:?}"
    );
}

#[tokio::test]
async fn vault_errors_do_not_repeat_the_response() {
    // Status 0 is a valid response that is not an object, and 204 a response without data.
    for status in [307, 403, 404, 429, 500, 503, 0, 204] {
        let double = ServerDouble::start(move |line| match (line, status) {
            ("GET /v1/kv/a", 0) => (200, json!([CANARY])),
            ("GET /v1/kv/a", 204) => (204, Value::Null),
            ("GET /v1/kv/a", status) => (status, json!({ "errors": [CANARY] })),
            _ => (404, Value::Null),
        })
        .await;
        let spec = spec_of(double.config());
        let (name, error) = fetch_error(&["A=vault://kv/a#x".parse().unwrap()], &spec).await;
        let expected = match (status, &error) {
            (307, VaultError::Redirect { address })
            | (429 | 503, VaultError::Sealed { address }) => *address == double.address,
            (403, VaultError::Denied { operation })
            | (404 | 204, VaultError::NotFound { operation })
            | (500, VaultError::Status { operation, code: 500 })
            | (0, VaultError::InvalidResponse { operation }) => operation == "vault://kv/a",
            _ => false,
        };
        assert!(expected && name == "A", "{status}: {error:?}");
    }
}

#[tokio::test]
async fn server_without_http_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"220 smtp\r\n").await;
        }
    });
    for scheme in ["http", "https"] {
        let spec = spec_of(config_of(format!("{scheme}://{address}")));
        let (_, error) = fetch_error(&["A=vault://kv/a#x".parse().unwrap()], &spec).await;
        let VaultError::Unreachable { failure, .. } = error else { panic!("{error:?}") };
        assert!(scheme == "https" || failure == ConnectionFailure::Broken, "{failure}");
    }
}

#[tokio::test]
async fn invalid_configuration_is_refused_without_secrets() {
    let secret = ["A=vault://kv/a#x".parse().unwrap()];
    let refused =
        async |config: &VaultConfig| fetch_error(&secret, &spec_of(config.clone())).await.1;
    for address in ["ftp://x", "x"] {
        let error = refused(&config_of(address.into())).await;
        assert!(matches!(error, VaultError::InvalidAddress), "{error:?}");
    }
    let config = VaultConfig {
        login: VaultLogin::Token(Zeroizing::new("t\n".into())),
        ..config_of(format!("http://user:{CANARY}@127.0.0.1:1"))
    };
    let error = refused(&config).await;
    assert!(matches!(error, VaultError::InvalidHeader(_)), "{error:?}");
    let config = config_of(config.address);
    let error = refused(&config).await;
    assert!(
        matches!(&error, VaultError::Unreachable { address, .. }
            if address == "http://127.0.0.1:1"),
        "{error:?}"
    );
    let config = VaultConfig { ca: Some("/dev/null".into()), ..config };
    let error = refused(&config).await;
    assert!(
        matches!(&error, VaultError::NoCertificates { path } if path.ends_with("null")),
        "{error:?}"
    );
    let config = VaultConfig { ca: Some("/nonexistent".into()), ..config };
    let error = refused(&config).await;
    assert!(matches!(error, VaultError::ReadCertificates { .. }), "{error:?}");
}
