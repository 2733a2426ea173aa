//! What a real server cannot be made to do: answer nonsense, stand still, issue keys of a cloud.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

use super::*;
use crate::vault::lease_renewal::{Issued, LeaseRenewer};

/// A double of a server: answers what it is told to, over real HTTP.
pub(super) struct Double {
    pub address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Double {
    /// One whose engine issues a credential for so many seconds, after it has stood still, with all else, for `pause`.
    async fn issuing(pause: Duration, seconds: u64) -> Double {
        Double::start(move |line| match line {
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

    /// Answers each line, of a method and a path, with a status and a body.
    pub async fn start(answer: impl Fn(&str) -> (u16, Value) + Send + Sync + 'static) -> Double {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
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
                        if let Some(rest) =
                            line.to_ascii_lowercase().strip_prefix("content-length:")
                        {
                            length = rest.trim().parse().unwrap();
                        }
                        head.push(line.trim_end().to_owned());
                    }
                    stream.read_exact(&mut vec![0; length]).await.unwrap();
                    let line = head[0].trim_end_matches(" HTTP/1.1").trim_end_matches('?');
                    let (code, body) = answer(line);
                    log.lock().unwrap().push(line.to_owned());
                    let body = if body.is_null() { String::new() } else { body.to_string() };
                    let location =
                        if code == 307 { "location: http://127.0.0.1:1/\r\n" } else { "" };
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

    fn config(&self) -> VaultConfig {
        VaultConfig { address: self.address.clone(), login: token(), namespace: None, ca: None }
    }

    /// How many of the lines that it was asked are such.
    pub fn count(&self, asked: impl Fn(&str) -> bool) -> usize {
        self.asked.lock().unwrap().iter().filter(|line| asked(line)).count()
    }
}

fn token() -> VaultLogin {
    VaultLogin::Token(Zeroizing::new("t-1".into()))
}

#[tokio::test]
async fn what_is_issued_for_a_term_is_issued_anew_and_over_when_it_is_no_longer() {
    let issued = Mutex::new(0);
    let double = Double::start(move |line| match line {
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
    let log = crate::log_test::LogCapture::start();
    let spec = from(double.config());
    let secrets =
        ["A=vault://db/creds/app#p", "B=vault://db/creds/app"].map(|text| text.parse().unwrap());
    let began = Instant::now();
    let mut fetched = fetch(&secrets, &spec).await.unwrap();
    assert_eq!(fetched.rotating.len(), 2);
    let (mut changes, place) = (fetched.changes.take().unwrap(), "vault://db/creds/app");
    assert_eq!(next(&mut changes, place, "p").await.unwrap(), "password-2");
    assert_eq!(next(&mut changes, place, "p").await.unwrap(), "password-3");
    assert_eq!(next(&mut changes, place, "p").await, None);
    // Two thirds of two terms, and the whole third, during which it was tried again.
    let lasted = began.elapsed();
    assert!((Duration::from_millis(6900)..Duration::from_secs(9)).contains(&lasted), "{lasted:?}");
    let troubles = fetched.lease_renewer.take().unwrap().revoke_all().await;
    assert_eq!(troubles.len(), 2, "{troubles:?}");
    assert!(
        troubles[0].contains("which is good for 0 s more: the vault refuses vault://db/creds/app"),
        "{troubles:?}"
    );
    // What has been followed is over as well, and nothing is left to be given back but the last.
    assert_eq!(double.count(|line| line.ends_with("leases/revoke")), 1);
    log.assert(&["secret read again", "lease not renewed"], &["password-", CANARY]);
}

#[tokio::test]
async fn what_ends_before_the_sandbox_and_cannot_be_renewed_is_said() {
    let double = Double::issuing(Duration::ZERO, 1).await;
    let source: VaultSource = "vault://db/creds/app#p".parse().unwrap();
    let keep = async || {
        let session = Session::begin(&double.config()).await.unwrap();
        let (id, lease) = session.read(&source).await.unwrap().lease.unwrap();
        // Nobody follows it: so are keys that an endpoint reads again when it is asked for them.
        LeaseRenewer::start(
            session,
            vec![Issued { what: source.location(), id, lease }],
            BTreeMap::new(),
            &tracker(),
        )
    };
    assert_eq!(keep().await.revoke_all().await, Vec::<String>::new());
    let late = keep().await;
    tokio::time::sleep(Duration::from_millis(2200)).await;
    let over = "vault://db/creds/app was good until 1 s before the end, and could not be renewed";
    assert_eq!(late.revoke_all().await, [over]);
    // It is nobody's to renew.
    assert_eq!(double.count(|line| line.ends_with("leases/renew")), 0);
}

#[tokio::test]
async fn who_gives_up_waiting_leaves_nothing_issued() {
    let double = Double::issuing(Duration::ZERO, 60).await;
    let spec = from(double.config());
    let count = || double.count(|line| line.ends_with("leases/revoke"));
    let cleanup = tracker();
    // While something else is fetched.
    let secrets =
        ["P=vault://db/creds/app#p", "Q=exec:exec sleep 60"].map(|text| text.parse().unwrap());
    let fetching =
        tokio::time::timeout(Duration::from_secs(1), fetch_credentials(&secrets, &spec, &cleanup))
            .await;
    assert!(fetching.is_err());
    let limit = Duration::from_secs(5);
    tokio::time::timeout(limit, cleanup.wait()).await.expect("in time");
    assert_eq!(count(), 1);
    // After all was fetched.
    drop(fetch_credentials(&secrets[..1], &spec, &cleanup).await.unwrap());
    tokio::time::timeout(limit, cleanup.wait()).await.expect("in time");
    assert_eq!(count(), 2);
}

#[tokio::test]
async fn what_is_issued_while_whoever_asked_goes_is_given_back() {
    // All stand still, so that whoever asked goes before it has read the answer.
    let double = Double::issuing(Duration::from_millis(500), 60).await;
    let cleanup = tracker();
    let spec = from(double.config());
    let secrets =
        ["P=vault://db/creds/app#p", "Q=exec:exec sleep 60"].map(|text| text.parse().unwrap());
    assert!(
        tokio::time::timeout(
            Duration::from_millis(200),
            fetch_credentials(&secrets, &spec, &cleanup)
        )
        .await
        .is_err()
    );
    tokio::time::timeout(Duration::from_secs(5), cleanup.wait()).await.expect("in time");
    assert_eq!(double.count(|line| line.ends_with("leases/revoke")), 1);
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
        let config = VaultConfig {
            address: format!("http://{address}"),
            login: token(),
            namespace: None,
            ca: None,
        };
        let spec = from(config);
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
    let double = Double::start(move |line| match line {
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
    let spec = from(double.config());
    let secret: SecretSpec = "AWS=vault://aws/creds/deploy".parse().unwrap();
    let secret = SecretSpec { delivery: chitin_spec::Delivery::Endpoint, ..secret };
    let fetched = fetch(std::slice::from_ref(&secret), &spec).await.unwrap();
    let names: Vec<&str> = fetched.values.iter().map(|value| value.name.as_str()).collect();
    assert!(names.iter().all(|name| name.starts_with("AWS_")) && names.len() == 4, "{names:?}");
    assert!(exposed(&fetched).iter().all(|(_, value)| !value.contains(CANARY)));
    let endpoint = fetched.aws_server.clone().unwrap();
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
    assert_eq!(fetched.lease_renewer.unwrap().revoke_all().await, Vec::<String>::new());
    // The first are not over yet, and given back as well.
    assert_eq!(double.count(|line| line.ends_with("leases/revoke")), 2);
    // Then there is nobody to ask any more: what there is goes on until it is over.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(
        endpoint.document().await.unwrap().1.unwrap(),
        "what the vault had issued was given back"
    );
    tokio::time::sleep(Duration::from_millis(3000)).await;
    assert!(endpoint.document().await.is_err());

    let more = [secret.clone(), SecretSpec { name: "AWS2".into(), ..secret }];
    assert!(refusal(&more, &spec).await.contains("secret AWS2: there is one endpoint"));
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
        let double = Double::start(move |line| match (line, code) {
            ("GET /v1/kv/a", 299) => (200, json!([CANARY])),
            ("GET /v1/kv/a", code) => {
                (code, if code == 204 { Value::Null } else { json!({ "errors": [CANARY] }) })
            }
            _ => (404, Value::Null),
        })
        .await;
        let spec = from(double.config());
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
        let spec = from(config);
        let error = refusal(&["A=vault://kv/a#x".parse().unwrap()], &spec).await;
        assert!(error.contains(words), "{error}");
    }
    let config = VaultConfig {
        address: "http://user:canary-52b1d9e0f7@127.0.0.1:1".into(),
        login: VaultLogin::Token(Zeroizing::new("t\n".into())),
        namespace: None,
        ca: None,
    };
    let spec = |config: &VaultConfig| from(config.clone());
    let secret = ["A=vault://kv/a#x".parse().unwrap()];
    assert!(refusal(&secret, &spec(&config)).await.contains("was a newline copied with it?"));
    let config = VaultConfig { login: token(), ..config };
    assert!(
        refusal(&secret, &spec(&config)).await.contains("http://127.0.0.1:1 cannot be reached")
    );
    let config = VaultConfig { ca: Some("/dev/null".into()), ..config };
    assert!(
        refusal(&secret, &spec(&config))
            .await
            .contains("VAULT_CACERT, /dev/null: there is none in it")
    );
}
