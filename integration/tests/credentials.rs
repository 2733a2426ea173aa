//! A credential that never enters: the workload has a placeholder, the endpoint gets the value, and nothing in the sandbox, on
//! the command line or in what is written down has it. The endpoint is a TLS server of this host.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use chitin_integration::{Chitin, On, canary, chitin, on_every_tier, workspace};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use tempfile::TempDir;

const CANARY: &str = "canary-71be0d5c+f4/93a";

/// A TLS server that says back what it is told.
struct Endpoint {
    port: u16,
    /// The requests, without their bodies.
    seen: Arc<Mutex<Vec<String>>>,
    /// Its certificate, for who is to trust it.
    certificate: PathBuf,
    dir: TempDir,
}

impl Endpoint {
    fn start() -> Endpoint {
        let dir = tempfile::tempdir().unwrap();
        let key = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let certificate = dir.path().join("endpoint.pem");
        fs::write(&certificate, key.cert.pem()).unwrap();
        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![key.cert.der().clone()], private)
            .unwrap();
        let config = Arc::new(config);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = seen.clone();
        thread::spawn(move || {
            for socket in listener.incoming() {
                let (config, log, socket) = (config.clone(), log.clone(), socket.unwrap());
                thread::spawn(move || {
                    let connection = rustls::ServerConnection::new(config).unwrap();
                    let mut stream = rustls::StreamOwned::new(connection, socket);
                    let (mut request, mut byte) = (Vec::new(), [0]);
                    while !request.ends_with(b"\r\n\r\n") {
                        match stream.read(&mut byte) {
                            Ok(1) => request.push(byte[0]),
                            _ => return,
                        }
                    }
                    let text = String::from_utf8(request).unwrap();
                    let length = text.len();
                    log.lock().unwrap().push(text.clone());
                    let head = format!(
                        "HTTP/1.1 200 OK\r\nX-Echo: {CANARY}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
                    );
                    let _ =
                        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(text.as_bytes()));
                    stream.conn.send_close_notify();
                    let _ = stream.flush();
                });
            }
        });
        Endpoint { port, seen, certificate, dir }
    }

    /// `chitin run` with the credential for it, and an audit.
    fn run(&self, on: On, options: &str) -> Chitin {
        on.with(&format!(
            "--allow-private --secret API_KEY=env:API_KEY_HERE@localhost:{} {options} --audit",
            self.port
        ))
        .arg(self.audit())
        .env("API_KEY_HERE", CANARY)
        .env("SSL_CERT_FILE", &self.certificate)
    }

    fn audit(&self) -> PathBuf {
        self.dir.path().join("audit")
    }

    fn lines(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.audit()).unwrap();
        assert!(!text.contains(CANARY), "{text}");
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

const MICROVM: On = On { tier: chitin::Runtime::Ironclaw };

on_every_tier!(python_uses_a_credential_that_never_enters);

fn python_uses_a_credential_that_never_enters(on: On) {
    let endpoint = Endpoint::start();
    let script = format!(
        "
import base64, os, sys, urllib.request, urllib.error
key = os.environ['API_KEY']
print(key)
def get(path, header):
    try:
        answer = urllib.request.urlopen(urllib.request.Request('https://localhost:{}' + path, headers={{'Authorization': header}}))
        return answer.status, answer.headers['X-Echo'], answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()
status, echo, body = get('/a', 'Bearer ' + key)
print(status, set(echo), b'canary' in body, b'****' in body, key.encode() in body)
status, echo, body = get('/b', 'Basic ' + base64.b64encode(('user:' + key).encode()).decode())
print(status)
print(*get('/c?key=' + key, 'x'))
sys.stdout.flush()
sys.stdin.read()
",
        endpoint.port
    );
    let mut running = endpoint.run(on, "").args(["--", "python3", "-c"]).arg(script).spawn();
    let placeholder = running.line();
    assert!(placeholder.starts_with("chitin-") && placeholder.len() == 47, "{placeholder}");
    assert_eq!(running.line(), "200 {'*'} False True False");
    assert_eq!(running.line(), "200");
    assert_eq!(
        running.line(),
        "403 chitin: the placeholder of API_KEY stands in the query, where it is not replaced"
    );
    // After the value went out and came back.
    canary::assert_absent(&running, CANARY, &placeholder);
    drop(running.child.stdin.take());
    let mut stderr = String::new();
    running.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!((running.wait(), stderr.as_str()), (0, ""));
    running.assert_nothing_left();

    let seen = endpoint.seen();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(seen[0].contains(&format!("Bearer {CANARY}")) && seen[1].contains("Basic "), "{seen:?}");
    let lines = endpoint.lines();
    assert!(
        lines.iter().any(|line| line["credentials"][0] == "API_KEY" && line["requests"] == 1),
        "{lines:?}"
    );
    let stopped = |line: &&Value| {
        line["verdict"] == "refused" && line["reason"].as_str().unwrap().contains("the query")
    };
    assert_eq!(lines.iter().filter(stopped).count(), 1, "{lines:?}");
}

#[test]
fn node_fetches_with_a_credential_that_never_enters() {
    let node = fs::canonicalize(workspace().join("target/programs/node"));
    let node = node.expect("no target/programs: `cargo xtask test` fetches them");
    let endpoint = Endpoint::start();
    let script = format!(
        "(async () => {{
  const answer = await fetch('https://localhost:{}/', {{ headers: {{ 'x-api-key': process.env.API_KEY }} }});
  const text = await answer.text();
  console.log(answer.status, text.includes('canary'), text.includes('*'.repeat({})));
}})()",
        endpoint.port,
        CANARY.len()
    );
    let outcome = endpoint
        .run(MICROVM, "--memory 1024")
        .args(["--copy-in", &format!("{}:node", node.display()), "--", "./node", "-e"])
        .arg(script)
        .outcome();
    assert_eq!(outcome.ok(), "200 false true", "{outcome:?}");
    assert!(endpoint.seen()[0].contains(CANARY), "{:?}", endpoint.seen());
}

#[test]
fn an_endpoint_that_this_host_does_not_trust_gets_nothing() {
    let endpoint = Endpoint::start();
    let script = format!(
        "import os, urllib.request
try:
    urllib.request.urlopen(urllib.request.Request('https://localhost:{}/', headers={{'X': os.environ['API_KEY']}}))
except OSError as e:
    print('no')",
        endpoint.port
    );
    let outcome = endpoint
        .run(MICROVM, "")
        .env("SSL_CERT_FILE", "/dev/null")
        .args(["--", "python3", "-c"])
        .arg(script)
        .outcome();
    assert_eq!(outcome.ok(), "no", "{outcome:?}");
    assert!(endpoint.seen().is_empty(), "{:?}", endpoint.seen());
    let lines = endpoint.lines();
    let reason = lines[0]["reason"].as_str().unwrap();
    assert!(reason.starts_with("the TLS handshake with the endpoint failed"), "{reason}");
}

#[test]
fn what_no_proxy_can_deliver_is_refused_before_anything_is_booted() {
    let refused = |value: &str, args: &str, words: &str| {
        chitin(&format!("run {args} -- true")).env("KEY", value).outcome().refused(words);
    };
    refused("short", "--secret K=env:KEY@api.example.com", "secret K: a value of less than 8 bytes");
    refused("two\nlines and more", "--secret K=env:KEY@api.example.com", "no HTTP header can hold its value");
    refused(
        CANARY,
        "--secret K=env:KEY --secret-query K",
        "--secret-query K: there is no --secret K=SRC@HOST",
    );
    refused(CANARY, "--secret K=env:KEY@api.example.com --secret-env K", "--secret-env K");
}
