//! Names, connections and port forwards, with the agent in a network namespace of its own and the host played by the test.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::Write;
use std::process::Command;

use chitin_protocol::{Direction, Endpoint, Failure, MAX_DIALS, StreamId, ToGuest};
use support::{AGENT, Agent, Running};

/// An agent that has a network namespace and a resolv.conf of its own. Without root, a user namespace gives both.
fn up() -> Agent {
    let mut resolv = tempfile::NamedTempFile::new().unwrap();
    resolv.write_all(b"nameserver 127.0.0.53\noptions attempts:1 timeout:5\n").unwrap();
    resolv.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let script = "mount --bind $0 /etc/resolv.conf && exec $1 --stdio";
    let mut command = Command::new("unshare");
    command.args(if support::is_root() { &["-n", "-m"][..] } else { &["-n", "-m", "-r"] });
    let mut agent =
        Agent::spawn_with(command.args(["--", "sh", "-c", script]).arg(resolv.path()).arg(AGENT));
    agent.until(|agent| agent.ready);
    agent
}

fn endpoint(text: &str) -> Endpoint {
    let (host, port) = text.rsplit_once(':').unwrap();
    let (host, wildcard) = host.strip_prefix("*.").map_or((host, false), |host| (host, true));
    Endpoint { host: host.into(), wildcard, port: port.parse().unwrap() }
}

fn open(agent: &mut Agent, endpoints: &[&str]) -> Result<(), Failure> {
    let request = agent.request();
    let endpoints = endpoints.iter().map(|text| endpoint(text)).collect();
    agent.connection.send_message(&ToGuest::Egress { request, endpoints }).unwrap();
    agent.until(|agent| agent.done.contains_key(&request));
    agent.done.remove(&request).unwrap()
}

fn with(endpoints: &[&str]) -> Agent {
    let mut agent = up();
    open(&mut agent, endpoints).unwrap();
    agent
}

fn python(agent: &mut Agent, script: &str) -> Running {
    let prelude = "import socket, sys, struct, errno, time, threading\n\
         def error(f):\n    try:\n        return f()\n    except OSError as e:\n        return type(e).__name__ + ' ' + str(e.errno)\n";
    agent.run(&["python3", "-c", &format!("{prelude}{script}")])
}

/// Waits for the next connection.
fn dialled(agent: &mut Agent) -> (String, u16, StreamId) {
    agent.until(|agent| !agent.dials.is_empty());
    agent.dials.remove(0)
}

#[test]
fn a_connection_to_a_name_is_a_stream_both_ways() {
    let mut agent = with(&["api.example.com:443", "api.example.com:80"]);
    let script = "
s = socket.create_connection(('API.example.com', 443))
assert s.getpeername()[0].startswith('127.64.')
s.sendall(b'GET / ' * 100000)
s.shutdown(socket.SHUT_WR)
print(sum(len(d) for d in iter(lambda: s.recv(65536), b'')))
";
    let running = python(&mut agent, script);
    let (host, port, stream) = dialled(&mut agent);
    assert_eq!((host.as_str(), port), ("api.example.com", 443));
    agent.until(|agent| agent.ended.contains(&stream));
    assert_eq!(agent.output[&stream], b"GET / ".repeat(100_000));
    // Its half is closed, and ours still carries megabytes.
    agent.feed(stream, &[7; 3_000_000]);
    assert_eq!(agent.output(running), "3000000\n");
    assert!(!agent.reset.contains(&stream));
}

#[test]
fn names_are_there_if_they_may_be_dialled() {
    let mut agent = with(&["a.test:443", "*.b.test:443"]);
    let script = "
def look(name):
    try:
        return socket.getaddrinfo(name, 443, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as e:
        return 'none' if e.errno in (socket.EAI_NONAME, -5) else repr(e)
for name in ['a.test', 'x.b.test', 'y.b.test', 'a.test', 'b.test', 'x.a.test', 'evil.example', 'evil.example']:
    print(look(name))
";
    let running = python(&mut agent, script);
    let addresses = "127.64.0.1\n127.64.0.2\n127.64.0.3\n127.64.0.1\nnone\nnone\nnone\nnone\n";
    assert_eq!(agent.output(running), addresses);
    agent.until(|agent| agent.denied.len() == 3);
    assert_eq!(agent.denied, ["b.test", "x.a.test", "evil.example"]);
}

#[test]
fn questions_may_come_over_tcp_and_in_pieces() {
    let mut agent = with(&["a.test:443"]);
    let script = "
q = b'\\xab\\xcd\\x01\\0\\0\\x01\\0\\0\\0\\0\\0\\0\\x01a\\x04test\\0\\0\\x01\\0\\x01'
s = socket.create_connection(('127.0.0.53', 53))
framed = struct.pack('>H', len(q)) + q
for byte in framed + framed:
    s.send(bytes([byte]))
def answer():
    n, = struct.unpack('>H', s.recv(2, socket.MSG_WAITALL))
    return s.recv(n, socket.MSG_WAITALL)
assert answer()[-4:] == answer()[-4:] == bytes([127, 64, 0, 1])
# 64 KiB of name, and more clients than there may be.
s.send(b'\\xff\\xff' + b'a' * 70000)
print(error(lambda: s.recv(1)) in (b'', 'ConnectionResetError 104'))
clients = [socket.create_connection(('127.0.0.53', 53)) for _ in range(20)]
clients[-1].send(framed)
print(len(clients[-1].recv(100)) > 40)
";
    let running = python(&mut agent, script);
    assert_eq!(agent.output(running), "True\nTrue\n");
}

#[test]
fn what_is_not_allowed_cannot_be_connected_to() {
    let mut agent = with(&["a.test:443", "b.test:80"]);
    let script = "
def connect(host, port):
    s = socket.create_connection((host, port), timeout=10)
    return s.recv(1)
a = socket.gethostbyname('a.test')
for address, port in [('1.1.1.1', 443), ('10.0.0.1', 443), ('169.254.169.254', 80), (a, 22)]:
    print(error(lambda: connect(address, port)))
# There is a listener, and no name, or one for another port: reset.
for address, port in [('127.0.0.1', 443), ('127.64.9.9', 443), (a, 80)]:
    print(error(lambda: connect(address, port)))
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print(error(lambda: u.sendto(b'x', ('1.1.1.1', 53))))
u.connect((a, 443)); u.send(b'x'); print(error(lambda: u.send(b'x')))
";
    let running = python(&mut agent, script);
    let output = agent.output(running);
    let unreachable = "OSError 101\n".repeat(3);
    let reset = "ConnectionResetError 104\n".repeat(3);
    // UDP has no route either, and nobody listens where TCP does.
    let expected = format!(
        "{unreachable}ConnectionRefusedError 111\n{reset}OSError 101\nConnectionRefusedError 111\n"
    );
    assert_eq!(output, expected);
    assert_eq!(agent.dials, []);
}

#[test]
fn a_dial_that_fails_is_a_reset_and_so_is_the_other_way() {
    let mut agent = with(&["a.test:443"]);
    let script = "
s = socket.create_connection(('a.test', 443))
print(error(lambda: s.recv(1)))
s = socket.create_connection(('a.test', 443))
s.sendall(b'x')
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
s.close()
";
    let running = python(&mut agent, script);
    let (_, _, stream) = dialled(&mut agent);
    agent.connection.reset_stream(stream);
    let (_, _, stream) = dialled(&mut agent);
    assert_eq!(agent.output(running), "ConnectionResetError 104\n");
    agent.until(|agent| agent.reset.contains(&stream));
}

#[test]
fn connections_beyond_the_limit_wait_for_others_to_end() {
    let mut agent = with(&["a.test:443"]);
    let script = format!(
        "
s = [socket.create_connection(('a.test', 443)) for _ in range({} + 20)]
print(len(s), flush=True)
for c in s:
    c.shutdown(socket.SHUT_WR)
print(sum(len(c.recv(10)) for c in s))
",
        MAX_DIALS
    );
    let running = python(&mut agent, &script);
    agent.until(|agent| agent.output.contains_key(&running.stdout));
    agent.until(|agent| agent.dials.len() == MAX_DIALS);
    for _ in 0..5 {
        agent.turn();
    }
    assert_eq!(agent.dials.len(), MAX_DIALS);
    let mut served = 0;
    while served < MAX_DIALS + 20 {
        let (_, _, stream) = dialled(&mut agent);
        agent.until(|agent| agent.ended.contains(&stream));
        assert_eq!(agent.connection.send_data(stream, b"y"), 1);
        agent.connection.end_stream(stream);
        served += 1;
    }
    assert_eq!(agent.output(running), format!("{0}\n{0}\n", MAX_DIALS + 20));
}

#[test]
fn a_flood_of_connections_leaves_the_agent_small_and_alive() {
    let mut agent = with(&["a.test:443"]);
    let script = "
a = socket.gethostbyname('a.test')
end = time.time() + 2
n = 0
while time.time() < end:
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    s.connect((a, 443))
    s.close()
    n += 1
print(n > 100)
";
    let running = python(&mut agent, script);
    // The host does not read for as long as that takes.
    agent.turn();
    std::thread::sleep(std::time::Duration::from_secs(3));
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 16 * 1024, "{kib} KiB resident");
    assert_eq!(agent.output(running), "True\n");
}

#[test]
fn a_workload_that_does_not_read_stops_its_own_stream_only() {
    let mut agent = with(&["a.test:443"]);
    let script = "
s = socket.create_connection(('a.test', 443))
t = socket.create_connection(('a.test', 443))
print(t.recv(5).decode(), flush=True)
sys.stdin.read()
";
    let running = python(&mut agent, script);
    let (_, _, first) = dialled(&mut agent);
    let (_, _, second) = dialled(&mut agent);
    let mut sent = 0;
    // Until the window and both sockets are full.
    for _ in 0..2000 {
        sent += agent.connection.send_data(first, &[0; 65536]);
        agent.turn();
        if agent.connection.send_capacity(first) == 0
            && sent > 300_000
            && agent.connection.pending_output().is_empty()
        {
            break;
        }
    }
    assert!(sent < 4 << 20, "{sent} bytes");
    agent.connection.send_data(second, b"hello");
    agent.until(|agent| agent.output.contains_key(&running.stdout));
    agent.connection.end_stream(running.stdin.unwrap());
    assert_eq!(agent.output(running), "hello\n");
}

#[test]
fn without_egress_nothing_listens_and_it_is_opened_once() {
    let mut agent = up();
    let script = "
for kind in 'tcp', 'udp':
    print(len(open('/proc/net/' + kind).readlines()) - 1)
";
    let running = python(&mut agent, script);
    assert_eq!(agent.output(running), "0\n0\n");
    open(&mut agent, &["a.test:443"]).unwrap();
    let failure = open(&mut agent, &["a.test:443"]).unwrap_err();
    assert_eq!(
        failure.to_string(),
        "open egress twice: Operation already in progress (os error 114)"
    );
}

#[test]
fn a_port_that_is_taken_is_named() {
    let mut agent = up();
    let running = python(
        &mut agent,
        "
import subprocess
s = socket.socket(); s.bind(('0.0.0.0', 8443)); s.listen(); print('up', flush=True); sys.stdin.read()",
    );
    agent.until(|agent| agent.output.contains_key(&running.stdout));
    let failure = open(&mut agent, &["a.test:8443"]).unwrap_err();
    assert_eq!(failure.to_string(), "listen on 0.0.0.0:8443: Address already in use (os error 98)");
    agent.connection.end_stream(running.stdin.unwrap());
    assert_eq!(agent.output(running), "up\n");
    // Nothing of the failed attempt is left.
    open(&mut agent, &["a.test:8443"]).unwrap();
}

fn connect(agent: &mut Agent, port: u16) -> (StreamId, Result<(), Failure>) {
    let request = agent.request();
    let stream = agent.connection.open_stream(Direction::Both).unwrap();
    agent.connection.send_message(&ToGuest::Connect { request, port, stream }).unwrap();
    agent.until(|agent| agent.done.contains_key(&request));
    (stream, agent.done.remove(&request).unwrap())
}

#[test]
fn the_host_reaches_a_server_in_the_sandbox() {
    let mut agent = with(&[]);
    let script = "
l = socket.socket(); l.bind(('127.0.0.1', 8000)); l.listen(); print('up', flush=True)
for _ in range(3):
    c, _ = l.accept()
    n = sum(len(d) for d in iter(lambda: c.recv(65536), b''))
    c.sendall(b'got %d' % n)
    c.close()
";
    let running = python(&mut agent, script);
    agent.until(|agent| agent.output.contains_key(&running.stdout));
    for count in [0, 1, 1_000_000] {
        let (stream, result) = connect(&mut agent, 8000);
        result.unwrap();
        agent.feed(stream, &vec![1; count]);
        agent.until(|agent| agent.ended.contains(&stream));
        assert_eq!(agent.text(stream), format!("got {count}"));
    }
    agent.exit(running);
    let (stream, result) = connect(&mut agent, 8000);
    let failure = result.unwrap_err();
    assert_eq!(failure.to_string(), "connect to port 8000: Connection refused (os error 111)");
    agent.until(|agent| agent.reset.contains(&stream));
}
