//! The network of a sandbox that has none: endpoints that are allowed, and ports that lead in.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;

use chitin_integration::On;
use serde_json::Value;

on_every_tier!(what_is_allowed_is_reached_by_its_name_and_written_down, a_published_port_leads_in,);

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
print(tried('evil.example', {port}), tried('127.0.0.1', {port} ^ 1), tried('1.1.1.1', 443))"
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
import socket, sys
l = socket.socket(); l.bind(('127.0.0.1', 8000)); l.listen(); print('up', flush=True)
c, _ = l.accept()
n = sum(len(d) for d in iter(lambda: c.recv(65536), b''))
c.sendall(b'got %d' % n); c.close()
sys.stdin.read()";
    let mut running = on.with(&format!("-p {port}:8000 -- python3 -c")).arg(program).spawn();
    assert_eq!(running.line(), "up");
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.write_all(&vec![7; 300_000]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "got 300000");
    // Only now, because what a workload sends in its last moment need not arrive.
    drop(running.child.stdin.take());
    assert_eq!(running.wait(), 0);
    running.assert_nothing_left();
}
