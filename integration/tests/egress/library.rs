//! Egress through the library.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use chitin_integration::sandbox_builder;

use super::{PRELUDE, serve_http, start_server};

/// One sandbox serves HTTPS at a port of this host, and another is its client. Nothing between them
/// intercepts TLS. The key serves this test only.
#[tokio::test]
async fn tls_is_end_to_end_between_two_sandboxes() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let pem = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/egress/localhost.pem");
    let serving = sandbox_builder().start().await.unwrap();
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
    assert!(matches!(refused, chitin::Error::Guest(_)), "{refused:?}");
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let forward = serving.forward(listener, 8443);

    let client = sandbox_builder()
        .allow(format!("localhost:{port}"))
        .allow_private(true)
        .start()
        .await
        .unwrap();
    client.copy_in(&pem, "/work/pem").await.unwrap();
    let script = format!(
        "import ssl, urllib.request
context = ssl.create_default_context(cafile='/work/pem')
print(urllib.request.urlopen('https://localhost:{port}/', context=context).read().decode())"
    );
    let output = client.command("python3").args(["-c", &script]).output().await.unwrap();
    assert_eq!(output.stdout, b"secure\n", "{output:?}");

    // A tunnel from this host, without TLS.
    let mut tunnel = serving.connect(8443).await.unwrap();
    tunnel.write_all(b"plain text\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = tunnel.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    drop(forward);
    client.stop().await.unwrap();
    serving.stop().await.unwrap();
}

#[tokio::test]
async fn fork_keeps_allowlist_and_resets_connections() {
    let port = start_server(serve_http);
    let mut sandbox = sandbox_builder()
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
    // A connection is open during the fork.
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
async fn connect_latency_is_close_to_exec_latency() {
    let port = start_server(serve_http);
    let sandbox = sandbox_builder()
        .allow(format!("localhost:{port}"))
        .allow_private(true)
        .start()
        .await
        .unwrap();
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
    // Other load counts too, except on the deterministic clock.
    let deterministic = std::env::var_os("CHITIN_NESTED").is_some_and(|kind| kind == "icount");
    let more = Duration::from_millis(if deterministic { 1 } else { 50 });
    assert!(Duration::from_nanos(dial) < exec + more, "{dial} ns, {exec:?}");
    sandbox.stop().await.unwrap();
}
