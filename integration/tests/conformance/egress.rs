//! The network of a sandbox that has none: endpoints that are allowed, ports that lead in, credentials that go to their host only.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use chitin_integration::{On, file};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;

on_every_tier!(
    what_is_allowed_is_reached_by_its_name_and_written_down,
    a_published_port_leads_in,
    a_credential_goes_to_its_host_and_does_not_enter,
);

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn what_is_allowed_is_reached_by_its_name_and_written_down(on: On) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Says back what it is told.
            let _ = std::io::copy(&mut stream.try_clone().unwrap(), &mut { stream });
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit");
    let program = format!(
        "import errno, socket
def tried(host, port):
    try: return socket.create_connection((host, port), timeout=60).getpeername()[0].startswith('127.64.')
    except socket.gaierror: return 'no such name'
    except OSError as e: return errno.errorcode[e.errno].replace('EHOSTUNREACH', 'ENETUNREACH')
s = socket.create_connection(('localhost', {port}))
s.sendall(b'x' * 300000)
s.shutdown(socket.SHUT_WR)
print(sum(len(d) for d in iter(lambda: s.recv(65536), b'')))
print(tried('evil.example', {port}), tried('localhost', {port} ^ 1), tried('1.1.1.1', 443))"
    );
    let outcome = on
        .with(&format!("--allow localhost:{port} --allow *.example.com:443 --allow-private --audit"))
        .arg(&audit)
        .args(["--", "python3", "-c", &program])
        .outcome();
    assert_eq!(outcome.ok(), "300000\nno such name ECONNREFUSED ENETUNREACH", "{outcome:?}");
    let mut said: Vec<String> =
        lines(&audit).iter().map(|line| format!("{} {}", line["verdict"], line["host"])).collect();
    said.sort_unstable();
    assert_eq!(said, ["\"allowed\" \"localhost\"", "\"refused\" \"evil.example\""]);
}

fn a_published_port_leads_in(on: On) {
    let port = {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        free.local_addr().unwrap().port()
    };
    let program = "
import socket
l = socket.socket(); l.bind(('127.0.0.1', 8000)); l.listen(); print('up', flush=True)
c, _ = l.accept()
n = sum(len(d) for d in iter(lambda: c.recv(65536), b''))
c.sendall(b'got %d' % n); c.close()";
    let mut running = on.with(&format!("-p {port}:8000 -- python3 -c")).arg(program).spawn();
    assert_eq!(running.line(), "up");
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.write_all(&vec![7; 300_000]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "got 300000");
    assert_eq!(running.wait(), 0);
    running.assert_nothing_left();
}

/// A TLS server for one request, whose head it returns, and its certificate.
fn endpoint() -> (u16, String, thread::JoinHandle<String>) {
    let key = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let certificate = key.cert.pem();
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![key.cert.der().clone()], private)
        .unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let connection = rustls::ServerConnection::new(Arc::new(config)).unwrap();
        let mut stream = rustls::StreamOwned::new(connection, socket);
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello").unwrap();
        stream.conn.send_close_notify();
        stream.flush().unwrap();
        String::from_utf8(head).unwrap()
    });
    (port, certificate, serving)
}

fn a_credential_goes_to_its_host_and_does_not_enter(on: On) {
    let (port, certificate, serving) = endpoint();
    let dir = tempfile::tempdir().unwrap();
    let trusted = file(dir.path(), "endpoint.pem", certificate).unwrap();
    let program = format!(
        "import os, urllib.request
key = os.environ['API_KEY']
request = urllib.request.Request('https://localhost:{port}/', headers={{'Authorization': 'Bearer ' + key}})
print(urllib.request.urlopen(request).read().decode(), key.startswith('chitin-'))"
    );
    let outcome = on
        .with(&format!("--allow-private --secret API_KEY=env:KEY_HERE@localhost:{port} -- python3 -c"))
        .arg(&program)
        .env("KEY_HERE", "canary-5a1f0c77")
        .env("SSL_CERT_FILE", trusted)
        .outcome();
    assert_eq!(outcome.ok(), "hello True", "{outcome:?}");
    let head = serving.join().unwrap();
    assert!(head.contains("Bearer canary-5a1f0c77"), "{head}");
}
