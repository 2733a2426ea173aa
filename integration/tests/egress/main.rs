//! Egress of a sandbox without a network: it reaches the allowed endpoints, and published ports
//! reach it. The servers are on the loopback interface of this host, so that runs need
//! `--allow-private`; the client is Python, which every root image has.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use chitin_integration::{
    TierUnderTest, chitin, on_every_tier, program_copy, read_json_lines, write_file,
};
use rustix::net::sockopt;

mod image;
mod library;

on_every_tier!(
    only_allowed_endpoints_are_reachable,
    private_address_requires_allow_private,
    no_endpoint_is_reachable_without_allow,
    faulty_endpoint_yields_standard_socket_error,
    egress_limits_are_enforced_and_audited,
    published_port_reaches_sandbox,
);

/// The connection preface of an HTTP/2 client, with empty settings (RFC 9113, section 3.4).
const HTTP2: &str = r"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

/// Starts a server on this host that passes each connection to `serve`, and returns its port.
fn start_server(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream.unwrap()));
        }
    });
    port
}

/// Answers GET with a page, an upgrade with an echo of later bytes, and other requests with an echo
/// of all bytes.
fn serve_http(mut stream: TcpStream) {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
        request.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&request).into_owned();
    if text.contains("Upgrade: websocket") {
        let _ = stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n");
    } else if text.starts_with("GET ") {
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 300000\r\nConnection: close\r\n\r\n";
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&[b'p'; 300_000]));
        return;
    } else {
        let _ = stream.write_all(&request);
    }
    let mut from = stream.try_clone().unwrap();
    let _ = std::io::copy(&mut from, &mut stream);
}

/// The Python functions that the scripts have in common.
const PRELUDE: &str = "
import socket, sys, time, urllib.request, urllib.error
def error(f):
    try:
        return f()
    except socket.gaierror:
        return 'no such name'
    except urllib.error.URLError as e:
        return error(lambda: (_ for _ in ()).throw(e.reason))
    except OSError as e:
        if type(e) != OSError: return type(e).__name__
        # gVisor reports the other error for the same cause.
        return e.strerror.replace('No route to host', 'Network is unreachable')
def connect(host, port):
    return socket.create_connection((host, port), timeout=60)
";

fn only_allowed_endpoints_are_reachable(tier: TierUnderTest) {
    let port = start_server(serve_http);
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit");
    let script = allowed_and_refused_script(port);
    let outcome = tier
        .run_with(&format!(
            "--allow localhost:{port} --allow *.example.com:443 --allow-private --audit"
        ))
        .arg(&audit)
        .args(["--", "python3", "-c"])
        .arg(script)
        .outcome();
    let expected = "300000\n127.64.0.1\nb'101' b'\\x82\\x03\\x00\\xff\\n'\nTrue\n300008\n\
                    no such name\nno such name\nConnectionRefusedError\n\
                    Network is unreachable Network is unreachable Network is unreachable\n\
                    Network is unreachable";
    assert_eq!(outcome.assert_success(), expected, "{outcome:?}");

    let lines = read_json_lines(&audit).unwrap();
    // A connection is logged when it ends, so that only the number of lines is certain.
    let count = |verdict: &str, host: &str| {
        lines.iter().filter(|line| line["verdict"] == verdict && line["host"] == host).count()
    };
    assert_eq!(count("allowed", "localhost"), 4, "{lines:?}");
    assert_eq!(count("refused", "evil.example"), 1, "{lines:?}");
    assert_eq!(lines.len(), 5);
    let page = lines
        .iter()
        .find(|line| {
            line["sent"].as_u64() < Some(1000) && line["received"].as_u64() > Some(300_000)
        })
        .expect("the page's line");
    assert_eq!(
        (page["address"].as_str(), page["port"].as_u64()),
        (Some("127.0.0.1"), Some(port.into()))
    );
    // The log does not contain transferred data.
    assert!(!fs::read_to_string(&audit).unwrap().contains("canary"));
}

/// Returns a script that connects to allowed and other endpoints and prints the results.
fn allowed_and_refused_script(port: u16) -> String {
    format!(
        "{PRELUDE}
print(len(urllib.request.urlopen('http://localhost:{port}/canary-4f1c').read()))
# The resolver answers direct queries for an allowed name too.
q = b'\\xab\\xcd\\x01\\0\\0\\x01\\0\\0\\0\\0\\0\\0\\x09localhost\\0\\0\\x01\\0\\x01'
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.sendto(q, ('127.0.0.53', 53))
address = socket.inet_ntoa(u.recv(512)[-4:])
print(address)
s = connect(address, {port})
s.sendall(b'GET /ws HTTP/1.1\\r\\nUpgrade: websocket\\r\\n\\r\\n')
head = b''
while not head.endswith(b'\\r\\n\\r\\n'):
    head += s.recv(1)
s.sendall(b'\\x82\\x03\\x00\\xff\\n')
print(head.split()[1], s.recv(5, socket.MSG_WAITALL))
s = connect('localhost', {port})
s.sendall(b'{HTTP2}')
s.shutdown(socket.SHUT_WR)
print(b''.join(iter(lambda: s.recv(100), b'')) == b'{HTTP2}')
s = connect('localhost', {port})
s.sendall(b'POST\\r\\n\\r\\n' + b'x' * 300000)
s.shutdown(socket.SHUT_WR)
print(sum(len(d) for d in iter(lambda: s.recv(65536), b'')))
print(error(lambda: connect('evil.example', {port})))
print(error(lambda: urllib.request.urlopen('http://evil.example:{port}/')))
# `localhost` may have a second address with another error.
print(error(lambda: connect('127.0.0.1', {port} ^ 1)))
print(*[error(lambda: connect(*end)) for end in
        (('1.1.1.1', 443), ('10.0.2.2', 80), ('169.254.169.254', 80))])
print(error(lambda: u.sendto(b'x', ('1.1.1.1', 53))))
"
    )
}

fn private_address_requires_allow_private(tier: TierUnderTest) {
    let port = start_server(serve_http);
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit");
    let script = format!(
        "{PRELUDE}
for attempt in range(3):
    print(error(lambda: connect('localhost', {port}).recv(1)), end=' ')"
    );
    let outcome = tier
        .run_with(&format!("--allow localhost:{port} --audit"))
        .arg(&audit)
        .args(["--", "python3", "-c"])
        .arg(script)
        .outcome();
    assert_eq!(outcome.assert_success(), "ConnectionResetError ".repeat(3));
    // One line for the user, however often the workload tries.
    let notices = outcome.stderr.lines().filter(|line| line.contains("was refused"));
    let notices: Vec<&str> = notices.collect();
    let [notice] = notices.as_slice() else { panic!("{outcome:?}") };
    let endpoint = format!("localhost:{port}");
    assert!(notice.contains(&endpoint) && notice.contains("--allow-private"), "{notice}");
    let lines = read_json_lines(&audit).unwrap();
    let reason = lines[0]["reason"].as_str().unwrap();
    assert!(reason.contains("loopback") && reason.contains("--allow-private"), "{reason}");
    assert_eq!((lines.len(), &lines[0]["verdict"]), (3, &"refused".into()));
}

fn no_endpoint_is_reachable_without_allow(tier: TierUnderTest) {
    let port = start_server(serve_http);
    let script = format!(
        "{PRELUDE}
print(error(lambda: connect('127.0.0.1', {port})), error(lambda: connect('a.example', {port})))
print(sum(len(open('/proc/net/' + kind).readlines()) - 1 for kind in ('tcp', 'udp')))"
    );
    let outcome = tier.run_python(&script).outcome();
    assert_eq!(outcome.assert_success(), "ConnectionRefusedError no such name\n0");
}

fn faulty_endpoint_yields_standard_socket_error(tier: TierUnderTest) {
    let silent = start_server(|stream| {
        thread::sleep(Duration::from_secs(600));
        drop(stream);
    });
    let reset =
        start_server(|stream| sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap());
    let endless = start_server(|mut stream| while stream.write_all(&[0; 65536]).is_ok() {});
    let closed = {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.local_addr().unwrap().port()
    };
    let script = format!(
        "{PRELUDE}
def read(port, timeout):
    s = connect('localhost', port)
    s.settimeout(timeout)
    return s.recv(1)
print(*[error(lambda: read(*end)) for end in (({silent}, 1), ({reset}, 60), ({closed}, 60))])
s = connect('localhost', {endless})
n = 0
while n < 3000000:
    n += len(s.recv(65536))
s.close()
# A name that does not exist.
print(error(lambda: connect('chitin.invalid', 80).recv(1)))
print('alive')"
    );
    let mut command = tier.run_with("--allow-private --allow chitin.invalid:80");
    for port in [silent, reset, endless, closed] {
        command = command.arg(format!("--allow=localhost:{port}"));
    }
    let outcome = command.args(["--", "python3", "-c"]).arg(script).outcome();
    assert_eq!(
        outcome.assert_success(),
        "TimeoutError ConnectionResetError ConnectionResetError\nConnectionResetError\nalive"
    );
}

fn egress_limits_are_enforced_and_audited(tier: TierUnderTest) {
    let endless = start_server(|mut stream| while stream.write_all(&[0; 65536]).is_ok() {});
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit");
    let script = format!(
        "{PRELUDE}
s = connect('localhost', {endless})
s.recv(1)
print(error(lambda: connect('localhost', {endless}).recv(1)))
began, n = time.monotonic(), 0
def drain():
    global n
    while d := s.recv(65536):
        n += len(d)
print(error(drain), 2500000 < n <= 3145728, time.monotonic() - began > 1)
print(error(lambda: connect('localhost', {endless}).recv(1)))"
    );
    let limits = "--egress-connections 1 --egress-bytes 3M --egress-rate 1M";
    let outcome = tier
        .run_with(&format!("--allow-private --allow localhost:{endless} {limits} --audit"))
        .arg(&audit)
        .args(["--", "python3", "-c"])
        .arg(script)
        .outcome();
    let reset = "ConnectionResetError";
    assert_eq!(
        outcome.assert_success(),
        format!("{reset}\n{reset} True True\n{reset}"),
        "{outcome:?}"
    );
    let lines = read_json_lines(&audit).unwrap();
    let reasons: Vec<&str> = lines.iter().map(|line| line["reason"].as_str().unwrap()).collect();
    // The connection that exceeded the limit, a later one, and one too many.
    let mut bytes: Vec<_> = reasons.iter().filter(|reason| reason.contains("bytes")).collect();
    bytes.retain(|reason| !reason.contains("3145728 bytes"));
    assert_eq!((reasons.len(), bytes.len()), (3, 1), "{lines:?}");
    let connections = reasons.iter().filter(|reason| reason.contains("connections"));
    assert_eq!(connections.count(), 1, "{lines:?}");
}

#[test]
fn invalid_endpoint_is_rejected_in_one_line() {
    for (endpoint, words) in [
        ("api.example.com", "the port is missing"),
        ("api.example.com:0", "from 1 to 65535"),
        ("api.example.com:70000", "from 1 to 65535"),
        ("127.0.0.1:80", "IP address"),
        ("[fd00::1]:80", "IP address"),
        ("*.com:443", "top-level"),
        ("a\u{1b}b:443", "letters, digits"),
        (&format!("{}:443", "a".repeat(65_536)), "253 bytes"),
    ] {
        chitin("run --allow").arg(endpoint).args(["--", "true"]).outcome().assert_refused(words);
    }
    chitin("run --allow a.test:1 --audit /nonexistent/x -- true")
        .outcome()
        .assert_refused("/nonexistent/x");
    for ports in ["0:80", "80:0", "70000:80", "80", "a:b"] {
        chitin("run -p").arg(ports).args(["--", "true"]).outcome().assert_usage_error("HOST:GUEST");
    }
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    chitin(&format!("run -p {port}:80 -- true"))
        .outcome()
        .assert_refused(&format!("127.0.0.1:{port}"));
}

fn published_port_reaches_sandbox(tier: TierUnderTest) {
    let port = {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        free.local_addr().unwrap().port()
    };
    let script = "
import socket, sys, time
time.sleep(1)
l = socket.socket(); l.bind(('127.0.0.1', 8000)); l.listen(); print('up', flush=True)
for _ in range(2):
    c, _ = l.accept()
    n = sum(len(d) for d in iter(lambda: c.recv(65536), b''))
    c.sendall(b'got %d' % n); c.close()
sys.stdin.read()";
    let mut running = tier.run_with(&format!("-p {port}:8000 -- python3 -c")).arg(script).spawn();
    // The port listens from the start, and resets connections until the workload listens.
    assert_eq!(running.read_line(), "up");
    for count in [5, 1_000_000] {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.write_all(&vec![7; count]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("got {count}"));
    }
    // The workload ends last, because data that it sends just before its end may be lost.
    drop(running.child.stdin.take());
    assert_eq!(running.wait(), 0);
    running.assert_no_process_left();
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
}

#[test]
fn node_reaches_only_endpoints_of_its_policy() {
    let port = start_server(serve_http);
    let dir = tempfile::tempdir().unwrap();
    let policy = format!(
        "sandbox:\n  syscall_filter: default_deny\n  \
         network: {{allowed_egress: ['localhost:{port}', '*.example.com:443']}}\n\
         resources: {{memory_mib: 1024, disk_mib: 400, timeout: 10m}}\n"
    );
    let policy = write_file(dir.path(), "p.yaml", policy).unwrap();
    let script = format!(
        "const dns = require('dns').promises;
(async () => {{
  console.log((await (await fetch('http://localhost:{port}/')).text()).length);
  console.log(await dns.resolve4('a.example.com'), (await dns.lookup('b.example.com')).address);
  for (const name of ['evil.example', 'example.com']) {{
    const fetched = await fetch('http://' + name + ':{port}/').catch(e => e.cause.code);
    console.log(fetched, await dns.resolve4(name).catch(e => e.code));
  }}
}})()"
    );
    let outcome = chitin("run --allow-private --policy")
        .arg(policy)
        .args(["--copy-in", &program_copy("node"), "--", "./node", "-e"])
        .arg(script)
        .outcome();
    let none = "ENOTFOUND ENOTFOUND";
    assert_eq!(
        outcome.assert_success(),
        format!("300000\n[ '127.64.0.1' ] 127.64.0.2\n{none}\n{none}")
    );
}
