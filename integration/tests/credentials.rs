//! Proxied credentials: the workload has a placeholder, the endpoint gets the value, and the value
//! is not in the sandbox, on a command line or in a log. The endpoint is a TLS server of this host.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use chitin_integration::{
    Chitin, TierKind, TierUnderTest, canary, chitin, on_every_tier, program_copy, program_path,
    read_json_lines,
};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use tempfile::TempDir;

const CANARY: &str = "canary-71be0d5c+f4/93a";

/// A TLS server that responds with the request, or with files.
struct Endpoint {
    host: &'static str,
    port: u16,
    /// The heads of the requests.
    seen: Arc<Mutex<Vec<String>>>,
    /// The path of its certificate, for `SSL_CERT_FILE`.
    certificate: PathBuf,
    dir: TempDir,
}

impl Endpoint {
    fn start() -> Endpoint {
        Endpoint::start_with("localhost", None)
    }

    /// Starts a server of this name, which responds with the files below a directory if given.
    fn start_with(host: &'static str, files: Option<PathBuf>) -> Endpoint {
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
                let connection = rustls::ServerConnection::new(config).unwrap();
                let stream = rustls::StreamOwned::new(connection, socket);
                thread::spawn(move || serve_request(stream, files.as_deref(), &log));
            }
        });
        Endpoint { host, port, seen, certificate, dir }
    }

    /// Returns `chitin run` with the endpoint's credential and an audit log.
    fn run(&self, tier: TierUnderTest, options: &str) -> Chitin {
        tier.run_with(&format!(
            "--allow-private --secret API_KEY=env:API_KEY_HERE@{}:{} {options} --audit",
            self.host, self.port
        ))
        .arg(self.audit_path())
        .env("API_KEY_HERE", CANARY)
        .env("SSL_CERT_FILE", &self.certificate)
    }

    fn audit_path(&self) -> PathBuf {
        self.dir.path().join("audit")
    }

    /// Reads the audit log, and asserts that it does not contain the value.
    fn read_audit(&self) -> Vec<Value> {
        canary::assert_no_file_contains(&[&self.audit_path()], CANARY);
        read_json_lines(&self.audit_path()).unwrap()
    }

    /// Returns the heads of the requests so far.
    fn requests(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

/// Reads the head of a request, logs it, and responds with a file or with the head.
fn serve_request(
    mut stream: rustls::StreamOwned<rustls::ServerConnection, TcpStream>,
    files: Option<&Path>,
    log: &Mutex<Vec<String>>,
) {
    let (mut request, mut byte) = (Vec::new(), [0]);
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => request.push(byte[0]),
            _ => return,
        }
    }
    let text = String::from_utf8(request).unwrap();
    log.lock().unwrap().push(text.clone());
    let path = text.split([' ', '?']).nth(1).unwrap_or_default();
    let path = path.trim_start_matches('/').to_owned();
    let found = files.map_or(Ok(text.into_bytes()), |dir| fs::read(dir.join(path)));
    let status = if found.is_ok() { "200 OK" } else { "404 Not Found" };
    let body = found.unwrap_or_default();
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nX-Echo: {CANARY}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n"
    );
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
    stream.conn.send_close_notify();
    let _ = stream.flush();
}

const MICROVM: TierUnderTest = TierUnderTest::new(TierKind::Ironclaw);

on_every_tier!(
    python_uses_credential_absent_from_sandbox,
    unmodified_clients_use_proxied_credential,
    java_trusts_sandbox_ca_and_uses_credential
);

fn python_uses_credential_absent_from_sandbox(tier: TierUnderTest) {
    let endpoint = Endpoint::start();
    let script = format!(
        "
import base64, os, sys, urllib.request, urllib.error
key = os.environ['API_KEY']
print(key)
def get(path, header):
    try:
        url, headers = 'https://localhost:{}' + path, {{'Authorization': header}}
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers))
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
    let mut running = endpoint.run(tier, "").args(["--", "python3", "-c"]).arg(script).spawn();
    let placeholder = running.read_line();
    assert!(placeholder.starts_with("chitin-") && placeholder.len() == 47, "{placeholder}");
    assert_eq!(running.read_line(), "200 {'*'} False True False");
    assert_eq!(running.read_line(), "200");
    let blocked = running.read_line();
    assert!(blocked.starts_with("403 chitin: ") && blocked.contains("API_KEY"), "{blocked}");
    assert!(blocked.contains("the query"), "{blocked}");
    // The value was sent and reflected by now.
    canary::assert_absent(&running, CANARY, &placeholder);
    drop(running.child.stdin.take());
    let stderr = running.read_stderr();
    assert_eq!(running.wait(), 0);
    // The refused request is reported once, with its remedy and without the value.
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("--secret-query API_KEY") && !stderr.contains(CANARY), "{stderr}");
    running.assert_no_process_left();

    let seen = endpoint.requests();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(
        seen[0].contains(&format!("Bearer {CANARY}")) && seen[1].contains("Basic "),
        "{seen:?}"
    );
    let lines = endpoint.read_audit();
    assert!(
        lines.iter().any(|line| line["credentials"][0] == "API_KEY" && line["requests"] == 1),
        "{lines:?}"
    );
    let refused = |line: &&Value| {
        line["verdict"] == "refused" && line["reason"].as_str().unwrap().contains("the query")
    };
    // The request, and the connection on which nothing else was sent.
    assert_eq!(lines.iter().filter(refused).count(), 2, "{lines:?}");
}

/// Runs a program on this host with the files that the sandbox gets.
fn run_on_host(dir: &Path, words: &[&str]) {
    let debian = program_path("debian");
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

/// Fills a directory with a page, an archive and a repository for the clients to fetch.
fn create_served_files(dir: &Path) {
    fs::write(dir.join("page"), "a page").unwrap();
    fs::write(dir.join("a.proto"), "syntax = \"proto3\";\npackage a;\nmessage Seen {}\n").unwrap();
    run_on_host(dir, &["tar", "-czf", "a.tar.gz", "a.proto"]);
    run_on_host(dir, &["git", "init", "--quiet", "--template=", "repo"]);
    fs::write(dir.join("repo/file"), "a file of the repository\n").unwrap();
    let repo = dir.join("repo");
    run_on_host(&repo, &["git", "add", "file"]);
    let author = ["-c", "user.name=a", "-c", "user.email=a@example.com"];
    run_on_host(
        &repo,
        &[&["git"], &author[..], &["commit", "--quiet", "--message", "first"]].concat(),
    );
    run_on_host(&repo, &["git", "update-server-info"]);
}

fn unmodified_clients_use_proxied_credential(tier: TierUnderTest) {
    let files = tempfile::tempdir().unwrap();
    let dir = files.path();
    create_served_files(dir);
    let endpoint = Endpoint::start_with("localhost", Some(dir.to_owned()));

    let script = format!(
        "export PATH=/work/debian/bin:$PATH LD_LIBRARY_PATH=/work/debian/lib HOME=/work
export GIT_EXEC_PATH=/work/debian/git-core
at=https://localhost:{}
curl --silent --show-error --header \"Authorization: Bearer $API_KEY\" $at/page; echo
curl --silent --show-error --user \"me:$API_KEY\" $at/page; echo
git -c http.extraHeader=\"Authorization: Bearer $API_KEY\" clone --quiet --template= \
    $at/repo/.git clone && cat clone/file
PYTHONPATH=/work/python python3 -c \"import os, requests
print(requests.get('$at/page', auth=('me', os.environ['API_KEY'])).text)\"
BUF_INPUT_HTTPS_USERNAME=me BUF_INPUT_HTTPS_PASSWORD=$API_KEY \
    ./buf export $at/a.tar.gz --output out && cat out/a.proto | grep -c Seen
curl --silent http://localhost:{}/page || echo refused
",
        endpoint.port, endpoint.port
    );
    let copies =
        ["debian", "python", "buf"].map(|name| format!("--copy-in={}", program_copy(name)));
    let outcome =
        endpoint.run(tier, "--memory 768").args(copies).args(["--", "sh", "-c", &script]).outcome();
    let lines: Vec<&str> = outcome.assert_success().lines().collect();
    let expected = ["a page", "a page", "a file of the repository", "a page", "1"];
    assert_eq!(lines[..5], expected, "{outcome:?}");
    // Connections without TLS to a credential's host are refused.
    assert_eq!(lines[5..], ["refused"], "{outcome:?}");
    let seen = endpoint.requests();
    // Each request has the value, also in Base64 that the client made of the placeholder.
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

fn java_trusts_sandbox_ca_and_uses_credential(tier: TierUnderTest) {
    // Java sends no SNI for a name without a dot, such as `localhost`, and the proxy would refuse
    // the connection. This server has a name with a dot, in a private `/etc/hosts`.
    let endpoint = Endpoint::start_with("localhost.chitin.test", None);
    let hosts = endpoint.dir.path().join("hosts");
    fs::write(&hosts, format!("127.0.0.1 localhost {}\n", endpoint.host)).unwrap();
    // keytool connects to servers that Java trusts: it fetches a revocation list, and rejects the
    // response, which is not one.
    let script = format!(
        "java/bin/keytool -printcrl -file \"https://{}:{}/list?key=$API_KEY\" </dev/null 2>&1 |
    grep -c -e PKIX -e SSL -e IOException
java/bin/keytool -list -v -keystore ${{JAVA_TOOL_OPTIONS#*=}} </dev/null >list
grep -c 'Owner:.*CN=Chitin sandbox' list; grep -c trustedCertEntry list",
        endpoint.host, endpoint.port
    );
    let mount = ["unshare", "--mount", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""];
    let words: Vec<&OsStr> = mount.iter().map(OsStr::new).chain([hosts.as_os_str()]).collect();
    let outcome = endpoint
        .run(tier, "--memory 1024 --secret-query API_KEY")
        .args(["--copy-in", &program_copy("java"), "--", "sh", "-c", &script])
        .run_through(&words)
        .outcome();
    let lines: Vec<&str> = outcome.assert_success().lines().collect();
    assert_eq!(lines[..2], ["0", "1"], "{outcome:?}");
    // The CA certificates of the image are trusted too.
    assert!(lines[2].parse::<usize>().unwrap() > 100, "{outcome:?}");
    let seen = endpoint.requests();
    let [request] = &seen[..] else { panic!("{seen:?}") };
    assert!(request.starts_with("GET /list?key=canary-71be0d5c%2Bf4%2F93a "), "{request}");
    assert!(request.contains("User-Agent: Java/"), "{request}");
}

#[test]
fn node_uses_credential_absent_from_sandbox() {
    let endpoint = Endpoint::start();
    let script = format!(
        "(async () => {{
  const headers = {{ 'x-api-key': process.env.API_KEY }};
  const answer = await fetch('https://localhost:{}/', {{ headers }});
  const text = await answer.text();
  console.log(answer.status, text.includes('canary'), text.includes('*'.repeat({})));
}})()",
        endpoint.port,
        CANARY.len()
    );
    let outcome = endpoint
        .run(MICROVM, "--memory 1024")
        .args(["--copy-in", &program_copy("node"), "--", "./node", "-e"])
        .arg(script)
        .outcome();
    assert_eq!(outcome.assert_success(), "200 false true", "{outcome:?}");
    assert!(endpoint.requests()[0].contains(CANARY), "{:?}", endpoint.requests());
}

#[test]
fn untrusted_endpoint_receives_no_credential() {
    let endpoint = Endpoint::start();
    let script = format!(
        "import os, urllib.request
try:
    headers = {{'Authorization': os.environ['API_KEY']}}
    urllib.request.urlopen(urllib.request.Request('https://localhost:{}/', headers=headers))
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
    assert_eq!(outcome.assert_success(), "no", "{outcome:?}");
    assert!(endpoint.requests().is_empty(), "{:?}", endpoint.requests());
    let lines = endpoint.read_audit();
    assert_eq!(
        (&lines[0]["verdict"], &lines[0]["delivery"]),
        (&"delivered".into(), &"proxy".into())
    );
    let reason = lines[1]["reason"].as_str().unwrap();
    assert!(reason.starts_with("the TLS handshake with the endpoint failed"), "{reason}");
}

#[test]
fn undeliverable_credential_is_rejected_before_boot() {
    let refused = |value: &str, args: &str, words: &str| {
        chitin(&format!("run {args} -- true")).env("KEY", value).outcome().assert_refused(words);
    };
    refused("short", "--secret K=env:KEY@api.example.com", "less than 8 bytes");
    refused("two\nlines and more", "--secret K=env:KEY@api.example.com", "HTTP header");
    for (args, words) in [
        ("--secret K=env:KEY --secret-query K", "--secret K=SRC@HOST"),
        ("--secret K=env:KEY@api.example.com --secret-env K", "--secret-env K"),
    ] {
        let run = chitin(&format!("run {args} -- true")).env("KEY", CANARY);
        run.outcome().assert_usage_error(words);
    }
}
