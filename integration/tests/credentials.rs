//! A credential that never enters: the workload has a placeholder, the endpoint gets the value, and nothing in the sandbox, on
//! the command line or in what is written down has it. The endpoint is a TLS server of this host.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
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
    host: &'static str,
    port: u16,
    /// The requests, without their bodies.
    seen: Arc<Mutex<Vec<String>>>,
    /// Its certificate, for who is to trust it.
    certificate: PathBuf,
    dir: TempDir,
}

impl Endpoint {
    fn start() -> Endpoint {
        Endpoint::with("localhost", None)
    }

    /// One that gives the files below a directory instead.
    fn with(host: &'static str, files: Option<PathBuf>) -> Endpoint {
        let dir = tempfile::tempdir().unwrap();
        let key = rcgen::generate_simple_self_signed(vec![host.to_owned()]).unwrap();
        let certificate = dir.path().join("endpoint.pem");
        fs::write(&certificate, key.cert.pem()).unwrap();
        let private =
            PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()));
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
                let files = files.clone();
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
                    log.lock().unwrap().push(text.clone());
                    let path = text
                        .split([' ', '?'])
                        .nth(1)
                        .unwrap_or_default()
                        .trim_start_matches('/')
                        .to_owned();
                    let found = files.map_or(Ok(text.into_bytes()), |dir| fs::read(dir.join(path)));
                    let status = if found.is_ok() { "200 OK" } else { "404 Not Found" };
                    let body = found.unwrap_or_default();
                    let length = body.len();
                    let head = format!(
                        "HTTP/1.1 {status}\r\nX-Echo: {CANARY}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
                    );
                    let _ =
                        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
                    stream.conn.send_close_notify();
                    let _ = stream.flush();
                });
            }
        });
        Endpoint { host, port, seen, certificate, dir }
    }

    /// `chitin run` with the credential for it, and an audit.
    fn run(&self, on: On, options: &str) -> Chitin {
        on.with(&format!(
            "--allow-private --secret API_KEY=env:API_KEY_HERE@{}:{} {options} --audit",
            self.host, self.port
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

const MICROVM: On = On { tier: chitin::TierKind::Ironclaw };

on_every_tier!(
    python_uses_a_credential_that_never_enters,
    curl_git_requests_and_go_use_one_unmodified,
    java_uses_one_and_trusts_the_authority_of_its_sandbox
);

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
        "403 chitin: the placeholder of API_KEY is in the query, where it is not replaced"
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
    assert!(
        seen[0].contains(&format!("Bearer {CANARY}")) && seen[1].contains("Basic "),
        "{seen:?}"
    );
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

fn program(name: &str) -> PathBuf {
    let path = fs::canonicalize(workspace().join("target/programs").join(name));
    path.unwrap_or_else(|_| panic!("no target/programs/{name}: `cargo xtask programs` fetches it"))
}

/// Runs a program of this host, as it would run in the sandbox.
fn here(dir: &Path, words: &[&str]) {
    let debian = program("debian");
    let status = Command::new(words[0])
        .args(&words[1..])
        .current_dir(dir)
        .env("PATH", format!("{}/bin:/usr/bin:/bin", debian.display()))
        .env("LD_LIBRARY_PATH", debian.join("lib"))
        .env("GIT_EXEC_PATH", debian.join("git-core"))
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("HOME", dir)
        .status();
    assert!(status.unwrap().success(), "{words:?}");
}

fn curl_git_requests_and_go_use_one_unmodified(on: On) {
    let files = tempfile::tempdir().unwrap();
    let dir = files.path();
    fs::write(dir.join("page"), "a page").unwrap();
    fs::write(dir.join("a.proto"), "syntax = \"proto3\";\npackage a;\nmessage Seen {}\n").unwrap();
    here(dir, &["tar", "-czf", "a.tar.gz", "a.proto"]);
    here(dir, &["git", "init", "--quiet", "--template=", "repo"]);
    fs::write(dir.join("repo/file"), "a file of the repository\n").unwrap();
    let repo = dir.join("repo");
    here(&repo, &["git", "add", "file"]);
    let who = ["-c", "user.name=a", "-c", "user.email=a@example.com"];
    here(&repo, &[&["git"], &who[..], &["commit", "--quiet", "--message", "first"]].concat());
    here(&repo, &["git", "update-server-info"]);
    let endpoint = Endpoint::with("localhost", Some(dir.to_owned()));

    let script = format!(
        "export PATH=/work/debian/bin:$PATH LD_LIBRARY_PATH=/work/debian/lib GIT_EXEC_PATH=/work/debian/git-core HOME=/work
at=https://localhost:{}
curl --silent --show-error --header \"Authorization: Bearer $API_KEY\" $at/page; echo
curl --silent --show-error --user \"me:$API_KEY\" $at/page; echo
git -c http.extraHeader=\"Authorization: Bearer $API_KEY\" clone --quiet --template= $at/repo/.git clone && cat clone/file
PYTHONPATH=/work/python python3 -c \"import os, requests; print(requests.get('$at/page', auth=('me', os.environ['API_KEY'])).text)\"
BUF_INPUT_HTTPS_USERNAME=me BUF_INPUT_HTTPS_PASSWORD=$API_KEY ./buf export $at/a.tar.gz --output out && cat out/a.proto | grep -c Seen
curl --silent http://localhost:{}/page || echo refused
",
        endpoint.port, endpoint.port
    );
    let copy = |name: &str| format!("{}:{name}", program(name).display());
    let outcome = endpoint
        .run(on, "--memory 768")
        .args([
            "--copy-in",
            &copy("debian"),
            "--copy-in",
            &copy("python"),
            "--copy-in",
            &copy("buf"),
        ])
        .args(["--", "sh", "-c", &script])
        .outcome();
    let lines: Vec<&str> = outcome.ok().lines().collect();
    let expected = ["a page", "a page", "a file of the repository", "a page", "1"];
    assert_eq!(lines[..5], expected, "{outcome:?}");
    // What is no TLS does not come through to a credential's host.
    assert_eq!(lines[5..], ["refused"], "{outcome:?}");
    let seen = endpoint.seen();
    // Each came with the value, also inside Base64, which was made of the placeholder.
    let bearer = format!("Bearer {CANARY}");
    let basic = "Basic bWU6Y2FuYXJ5LTcxYmUwZDVjK2Y0LzkzYQ==";
    assert!(
        seen.iter().all(|request| request.contains(&bearer) || request.contains(basic)),
        "{seen:?}"
    );
    assert!(seen.iter().any(|request| request.contains("User-Agent: git/")), "{seen:?}");
    assert!(
        seen.iter().any(|request| request.contains("user-agent: Go-http-client")
            || request.contains("User-Agent: Go-http-client")),
        "{seen:?}"
    );
}

fn java_uses_one_and_trusts_the_authority_of_its_sandbox(on: On) {
    // To a name without a dot, as servers of this host have, Java sends no SNI, so that it cannot be let to connect to one. This
    // one has a name with a dot, for this run.
    let endpoint = Endpoint::with("localhost.chitin.test", None);
    let hosts = endpoint.dir.path().join("hosts");
    fs::write(&hosts, format!("127.0.0.1 localhost {}\n", endpoint.host)).unwrap();
    // What of Java's own programs connects to whom Java trusts, and to nobody else: it fetches a list of revoked certificates, and
    // what comes is none.
    let script = format!(
        "java/bin/keytool -printcrl -file \"https://{}:{}/list?key=$API_KEY\" </dev/null 2>&1 | grep -c -e PKIX -e SSL -e IOException
java/bin/keytool -list -v -keystore ${{JAVA_TOOL_OPTIONS#*=}} </dev/null >list
grep -c 'Owner:.*CN=Chitin sandbox' list; grep -c trustedCertEntry list",
        endpoint.host, endpoint.port
    );
    let named = ["unshare", "--mount", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""];
    let words: Vec<&OsStr> = named.iter().map(OsStr::new).chain([hosts.as_os_str()]).collect();
    let outcome = endpoint
        .run(on, "--memory 1024 --secret-query API_KEY")
        .args([
            "--copy-in",
            &format!("{}:java", program("java").display()),
            "--",
            "sh",
            "-c",
            &script,
        ])
        .by(&words)
        .outcome();
    let lines: Vec<&str> = outcome.ok().lines().collect();
    assert_eq!(lines[..2], ["0", "1"], "{outcome:?}");
    // Beside those of the image.
    assert!(lines[2].parse::<usize>().unwrap() > 100, "{outcome:?}");
    let seen = endpoint.seen();
    let [request] = &seen[..] else { panic!("{seen:?}") };
    assert!(request.starts_with("GET /list?key=canary-71be0d5c%2Bf4%2F93a "), "{request}");
    assert!(request.contains("User-Agent: Java/"), "{request}");
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
    assert_eq!(
        (&lines[0]["verdict"], &lines[0]["delivery"]),
        (&"delivered".into(), &"proxy".into())
    );
    let reason = lines[1]["reason"].as_str().unwrap();
    assert!(reason.starts_with("the TLS handshake with the endpoint failed"), "{reason}");
}

#[test]
fn what_no_proxy_can_deliver_is_refused_before_anything_is_booted() {
    let refused = |value: &str, args: &str, words: &str| {
        chitin(&format!("run {args} -- true")).env("KEY", value).outcome().refused(words);
    };
    refused(
        "short",
        "--secret K=env:KEY@api.example.com",
        "secret K: a value of less than 8 bytes",
    );
    refused(
        "two\nlines and more",
        "--secret K=env:KEY@api.example.com",
        "the value has characters that an HTTP header cannot hold",
    );
    refused(
        CANARY,
        "--secret K=env:KEY --secret-query K",
        "--secret-query K: there is no --secret K=SRC@HOST",
    );
    refused(CANARY, "--secret K=env:KEY@api.example.com --secret-env K", "--secret-env K");
}
