//! A sandbox without a network reaches what it was allowed, and can be reached where it was asked for. Servers are this host's
//! and at loopback, so every run says `--allow-private`; the client is Python, which every root image has.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use chitin_integration::{On, builder, chitin, file, on_every_tier, workspace};
use rustix::net::sockopt;
use serde_json::Value;

on_every_tier!(
    what_is_allowed_is_reached_and_what_is_not_is_not_there,
    an_allowed_name_that_is_not_public_is_refused_unless_that_was_asked_for,
    without_it_nothing_is_reached_and_nothing_listens,
    endpoints_that_misbehave_are_errors_a_program_knows,
    limits_that_were_asked_for_are_kept_and_written_down,
    a_published_port_leads_into_the_sandbox,
);

/// What an HTTP/2 client sends before anything else, with empty settings.
const HTTP2: &str = r"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

/// A server of this host that treats each connection as `serve` does.
fn server(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> u16 {
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

/// Answers GET with a page, an upgrade with an echo of all that follows, and anything else with an echo from the start.
fn http(mut stream: TcpStream) {
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

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The Python of all of these.
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
        # gVisor's word for the same.
        return type(e).__name__ if type(e) != OSError else e.strerror.replace('No route to host', 'Network is unreachable')
def connect(host, port):
    return socket.create_connection((host, port), timeout=60)
";

fn what_is_allowed_is_reached_and_what_is_not_is_not_there(on: On) {
    let port = server(http);
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit");
    let script = format!(
        "{PRELUDE}
print(len(urllib.request.urlopen('http://localhost:{port}/canary-4f1c').read()))
# By a name that is asked for: the resolver knows this one too.
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
# Of `localhost` there may be a second address, whose error is another.
print(error(lambda: connect('127.0.0.1', {port} ^ 1)))
print(error(lambda: connect('1.1.1.1', 443)), error(lambda: connect('10.0.2.2', 80)), error(lambda: connect('169.254.169.254', 80)))
print(error(lambda: u.sendto(b'x', ('1.1.1.1', 53))))
"
    );
    let outcome = on
        .with(&format!(
            "--allow localhost:{port} --allow *.example.com:443 --allow-private --audit"
        ))
        .arg(&audit)
        .args(["--", "python3", "-c"])
        .arg(script)
        .outcome();
    let expected = "300000\n127.64.0.1\nb'101' b'\\x82\\x03\\x00\\xff\\n'\nTrue\n300008\nno such name\nno such name\nConnectionRefusedError\n\
                    Network is unreachable Network is unreachable Network is unreachable\nNetwork is unreachable";
    assert_eq!(outcome.ok(), expected, "{outcome:?}");

    let lines = lines(&audit);
    let verdicts: Vec<_> = lines
        .iter()
        .map(|line| (line["verdict"].as_str().unwrap(), line["host"].as_str().unwrap()))
        .collect();
    // A connection is written down when it ends, so only their number is certain.
    assert_eq!(
        verdicts.iter().filter(|verdict| **verdict == ("allowed", "localhost")).count(),
        4,
        "{lines:?}"
    );
    assert_eq!(
        verdicts.iter().filter(|verdict| **verdict == ("refused", "evil.example")).count(),
        1,
        "{lines:?}"
    );
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
    // What was sent is nobody's business.
    assert!(!fs::read_to_string(&audit).unwrap().contains("canary"));
}

fn an_allowed_name_that_is_not_public_is_refused_unless_that_was_asked_for(on: On) {
    let port = server(http);
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit");
    let script = format!("{PRELUDE}\nprint(error(lambda: connect('localhost', {port}).recv(1)))");
    let outcome = on
        .with(&format!("--allow localhost:{port} --audit"))
        .arg(&audit)
        .args(["--", "python3", "-c"])
        .arg(script)
        .outcome();
    assert_eq!(outcome.ok(), "ConnectionResetError");
    let lines = lines(&audit);
    assert_eq!(
        lines[0]["reason"],
        "the name resolves to a loopback address, which needs --allow-private"
    );
    assert_eq!((lines.len(), &lines[0]["verdict"]), (1, &"refused".into()));
}

fn without_it_nothing_is_reached_and_nothing_listens(on: On) {
    let port = server(http);
    let script = format!(
        "{PRELUDE}
print(error(lambda: connect('127.0.0.1', {port})), error(lambda: connect('a.example', {port})))
print(sum(len(open('/proc/net/' + kind).readlines()) - 1 for kind in ('tcp', 'udp')))"
    );
    let outcome = on.python(&script).outcome();
    assert_eq!(outcome.ok(), "ConnectionRefusedError no such name\n0");
}

fn endpoints_that_misbehave_are_errors_a_program_knows(on: On) {
    let silent = server(|stream| {
        thread::sleep(Duration::from_secs(600));
        drop(stream);
    });
    let reset = server(|stream| sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap());
    let endless = server(|mut stream| while stream.write_all(&[0; 65536]).is_ok() {});
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
print(error(lambda: read({silent}, 1)), error(lambda: read({reset}, 60)), error(lambda: read({closed}, 60)))
s = connect('localhost', {endless})
n = 0
while n < 3000000:
    n += len(s.recv(65536))
s.close()
# A name that nobody has.
print(error(lambda: connect('chitin.invalid', 80).recv(1)))
print('alive')"
    );
    let mut command = on.with("--allow-private --allow chitin.invalid:80");
    for port in [silent, reset, endless, closed] {
        command = command.arg(format!("--allow=localhost:{port}"));
    }
    let outcome = command.args(["--", "python3", "-c"]).arg(script).outcome();
    assert_eq!(
        outcome.ok(),
        "TimeoutError ConnectionResetError ConnectionResetError\nConnectionResetError\nalive"
    );
}

fn limits_that_were_asked_for_are_kept_and_written_down(on: On) {
    let endless = server(|mut stream| while stream.write_all(&[0; 65536]).is_ok() {});
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
    let outcome = on
        .with(&format!("--allow-private --allow localhost:{endless} {limits} --audit"))
        .arg(&audit)
        .args(["--", "python3", "-c"])
        .arg(script)
        .outcome();
    let reset = "ConnectionResetError";
    assert_eq!(outcome.ok(), format!("{reset}\n{reset} True True\n{reset}"), "{outcome:?}");
    let lines = lines(&audit);
    let mut reasons: Vec<&str> =
        lines.iter().map(|line| line["reason"].as_str().unwrap()).collect();
    reasons.sort_unstable();
    let expected = [
        "the sandbox's limit of 3145728 bytes was reached",
        "the sandbox reached its limit of bytes",
        "too many concurrent connections",
    ];
    assert_eq!(reasons, expected, "{lines:?}");
}

#[test]
fn what_is_no_endpoint_is_refused_in_one_line() {
    for (endpoint, words) in [
        ("api.example.com", "the port is missing"),
        ("api.example.com:0", "from 1 to 65535"),
        ("api.example.com:70000", "from 1 to 65535"),
        ("127.0.0.1:80", "an IP address is not accepted"),
        ("[fd00::1]:80", "an IP address is not accepted"),
        ("*.com:443", "top-level"),
        ("a\u{1b}b:443", "letters, digits"),
        (&format!("{}:443", "a".repeat(65_536)), "at most 253 bytes"),
    ] {
        chitin("run --allow").arg(endpoint).args(["--", "true"]).outcome().refused(words);
    }
    chitin("run --allow a.test:1 --audit /nonexistent/x -- true")
        .outcome()
        .refused("write the audit");
    for ports in ["0:80", "80:0", "70000:80", "80", "a:b"] {
        chitin("run -p")
            .arg(ports)
            .args(["--", "true"])
            .outcome()
            .refused("two ports from 1 to 65535");
    }
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    chitin(&format!("run -p {port}:80 -- true"))
        .outcome()
        .refused(&format!("listen on 127.0.0.1:{port}"));
}

fn a_published_port_leads_into_the_sandbox(on: On) {
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
    let mut running = on.with(&format!("-p {port}:8000 -- python3 -c")).arg(script).spawn();
    // The port is there from the start, and resets while nobody serves it.
    assert_eq!(running.line(), "up");
    for count in [5, 1_000_000] {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.write_all(&vec![7; count]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("got {count}"));
    }
    // Only now, because what a workload sends in its last moment need not arrive.
    drop(running.child.stdin.take());
    assert_eq!(running.wait(), 0);
    running.assert_nothing_left();
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
}

/// One sandbox serves HTTPS at a port of this host, another is its client: TLS from end to end, which nobody between them
/// could read. The key is of no use to anybody else.
#[tokio::test]
async fn tls_passes_from_end_to_end_between_two_sandboxes() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let pem = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/egress/localhost.pem");
    let serving = builder().start().await.unwrap();
    serving.copy_in(&pem, "/work/pem").await.unwrap();
    let script = "
import http.server, ssl
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'secure')
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain('/work/pem')
server = http.server.HTTPServer(('127.0.0.1', 8443), Page)
server.socket = context.wrap_socket(server.socket, server_side=True)
print('up', flush=True)
server.serve_forever()";
    let mut server = serving.command("python3").args(["-c", script]).spawn().unwrap();
    let mut up = [0; 3];
    server.stdout.as_mut().unwrap().read_exact(&mut up).await.unwrap();
    let refused = serving.connect(1).await.unwrap_err();
    assert!(format!("{refused:?}").contains("connect to port 1"), "{refused:?}");
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let forward = serving.forward(listener, 8443);

    let client =
        builder().allow(format!("localhost:{port}")).allow_private(true).start().await.unwrap();
    client.copy_in(&pem, "/work/pem").await.unwrap();
    let script = format!(
        "import ssl, urllib.request
context = ssl.create_default_context(cafile='/work/pem')
print(urllib.request.urlopen('https://localhost:{port}/', context=context).read().decode())"
    );
    let output = client.command("python3").args(["-c", &script]).output().await.unwrap();
    assert_eq!(output.stdout, b"secure\n", "{output:?}");

    // And by hand, from this host.
    let mut tunnel = serving.connect(8443).await.unwrap();
    tunnel.write_all(b"this is no TLS\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = tunnel.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    drop(forward);
    client.stop().await.unwrap();
    serving.stop().await.unwrap();
}

#[test]
fn node_fetches_what_its_policy_allows() {
    let node = workspace().join("target/programs/node");
    let node = fs::canonicalize(node).expect("no target/programs: `cargo xtask test` fetches them");
    let port = server(http);
    let dir = tempfile::tempdir().unwrap();
    let policy = format!(
        "sandbox: {{syscall_filter: default_deny, network: {{allowed_egress: ['localhost:{port}', '*.example.com:443']}}}}\n\
         resources: {{memory_mib: 1024, disk_mib: 400, timeout: 10m}}\n"
    );
    let policy = file(dir.path(), "p.yaml", policy).unwrap();
    let script = format!(
        "const dns = require('dns').promises;
(async () => {{
  console.log((await (await fetch('http://localhost:{port}/')).text()).length);
  console.log(await dns.resolve4('a.example.com'), (await dns.lookup('b.example.com')).address);
  for (const name of ['evil.example', 'example.com'])
    console.log(await fetch('http://' + name + ':{port}/').catch(e => e.cause.code), await dns.resolve4(name).catch(e => e.code));
}})()"
    );
    let outcome = chitin("run --allow-private --policy")
        .arg(policy)
        .arg("--copy-in")
        .arg(format!("{}:node", node.display()))
        .args(["--", "./node", "-e"])
        .arg(script)
        .outcome();
    let none = "ENOTFOUND ENOTFOUND";
    assert_eq!(outcome.ok(), format!("300000\n[ '127.64.0.1' ] 127.64.0.2\n{none}\n{none}"));
}

#[tokio::test]
async fn copies_reach_what_they_were_allowed_and_connections_are_not_copied() {
    let port = server(http);
    let mut sandbox = builder()
        .forkable(true)
        .allow(format!("localhost:{port}"))
        .allow_private(true)
        .start()
        .await
        .unwrap();
    let script =
        format!("{PRELUDE}\nprint(len(urllib.request.urlopen('http://localhost:{port}/').read()))");
    let fetch = ["-c", script.as_str()];
    assert_eq!(sandbox.command("python3").args(fetch).output().await.unwrap().stdout, b"300000\n");
    // Somebody is connected when the copy is made.
    let held = format!(
        "{PRELUDE}
s = connect('localhost', {port})
s.sendall(b'GET')
open('/tmp/connected', 'w')
open('/tmp/seen', 'w').write(str(error(lambda: s.recv(1))))"
    );
    let _held = sandbox.command("python3").args(["-c", &held]).spawn().unwrap();
    let script = "while ! test -e /tmp/connected; do sleep 0.1; done";
    sandbox.command("sh").args(["-c", script]).output().await.unwrap();
    let copy = sandbox.fork(1).await.unwrap().remove(0);
    for sandbox in [&copy, &sandbox] {
        let output = sandbox.command("python3").args(fetch).output().await.unwrap();
        assert_eq!(output.stdout, b"300000\n", "{output:?}");
        let script = "while ! test -s /tmp/seen; do sleep 0.1; done; cat /tmp/seen";
        let output = sandbox.command("sh").args(["-c", script]).output().await.unwrap();
        assert_eq!(output.stdout, b"ConnectionResetError");
    }
    copy.stop().await.unwrap();
    sandbox.stop().await.unwrap();
}

#[tokio::test]
async fn a_connection_costs_about_as_much_as_a_command() {
    let port = server(http);
    let sandbox =
        builder().allow(format!("localhost:{port}")).allow_private(true).start().await.unwrap();
    let script = format!(
        "{PRELUDE}
def once():
    t = time.monotonic_ns()
    s = connect('localhost', {port})
    s.sendall(b'x\\r\\n\\r\\n')
    s.recv(1)
    return time.monotonic_ns() - t
print(min(once() for _ in range(20)))"
    );
    let output = sandbox.command("python3").args(["-c", &script]).output().await.unwrap();
    let dial: u64 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    let mut exec = Duration::MAX;
    for _ in 0..20 {
        let began = Instant::now();
        sandbox.command(chitin::ECHO).arg("x").output().await.unwrap();
        exec = exec.min(began.elapsed());
    }
    println!("connect, send, answer: {} us; a command: {} us", dial / 1000, exec.as_micros());
    // Only with the deterministic clock does nothing else count.
    let deterministic = std::env::var_os("CHITIN_NESTED").is_some_and(|kind| kind == "icount");
    let more = Duration::from_millis(if deterministic { 1 } else { 50 });
    assert!(Duration::from_nanos(dial) < exec + more, "{dial} ns, {exec:?}");
    sandbox.stop().await.unwrap();
}
