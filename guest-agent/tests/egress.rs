//! Names, connections and port forwards, with the agent in a new network namespace, and the test as
//! the host.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::Write;
use std::process::Command;

use chitin_protocol::{Direction, Endpoint, Failure, MAX_DIALS, StreamId, ToGuest};
use support::{AGENT, Agent, Running};

/// Starts an agent with a separate network namespace and resolv.conf. Without root, a user
/// namespace provides both.
fn spawn_in_namespace() -> Agent {
    let mut resolv = tempfile::NamedTempFile::new().unwrap();
    resolv.write_all(b"nameserver 127.0.0.53\noptions attempts:1 timeout:5\n").unwrap();
    resolv.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let script = "mount --bind $0 /etc/resolv.conf && exec $1 --stdio";
    let mut command = Command::new("unshare");
    command.args(if support::is_root() { &["-n", "-m"][..] } else { &["-n", "-m", "-r"] });
    let mut agent =
        Agent::spawn_with(command.args(["--", "sh", "-c", script]).arg(resolv.path()).arg(AGENT));
    agent.wait_until(|agent| agent.ready);
    agent
}

fn parse_endpoint(text: &str) -> Endpoint {
    let (host, port) = text.rsplit_once(':').unwrap();
    let (host, wildcard) = host.strip_prefix("*.").map_or((host, false), |host| (host, true));
    Endpoint { host: host.into(), wildcard, port: port.parse().unwrap() }
}

fn open_egress(agent: &mut Agent, endpoints: &[&str]) -> Result<(), Failure> {
    let request = agent.next_id();
    let endpoints = endpoints.iter().map(|text| parse_endpoint(text)).collect();
    agent.connection.send_message(&ToGuest::Egress { request, endpoints }).unwrap();
    agent.wait_until(|agent| agent.done.contains_key(&request));
    agent.done.remove(&request).unwrap()
}

fn spawn_with_egress(endpoints: &[&str]) -> Agent {
    let mut agent = spawn_in_namespace();
    open_egress(&mut agent, endpoints).unwrap();
    agent
}

fn run_python(agent: &mut Agent, script: &str) -> Running {
    let prelude = "
import socket, sys, struct, errno, time, threading
def error(f):
    try:
        return f()
    except OSError as e:
        return type(e).__name__ + ' ' + str(e.errno)
";
    agent.run_command(&["python3", "-c", &format!("{prelude}{script}")])
}

/// Waits for the next dial request.
fn next_dial(agent: &mut Agent) -> (String, u16, StreamId) {
    agent.wait_until(|agent| !agent.dials.is_empty());
    agent.dials.remove(0)
}

#[test]
fn connection_to_a_name_is_a_bidirectional_stream() {
    let mut agent = spawn_with_egress(&["api.example.com:443", "api.example.com:80"]);
    let script = "
s = socket.create_connection(('API.example.com', 443))
assert s.getpeername()[0].startswith('127.64.')
s.sendall(b'GET / ' * 100000)
s.shutdown(socket.SHUT_WR)
print(sum(len(d) for d in iter(lambda: s.recv(65536), b'')))
";
    let running = run_python(&mut agent, script);
    let (host, port, stream) = next_dial(&mut agent);
    assert_eq!((host.as_str(), port), ("api.example.com", 443));
    agent.wait_until(|agent| agent.ended.contains(&stream));
    assert_eq!(agent.output[&stream], b"GET / ".repeat(100_000));
    // The workload's half is closed, and the host's still carries megabytes.
    agent.send_all(stream, &[7; 3_000_000]);
    assert_eq!(agent.wait_for_output(running), "3000000\n");
    assert!(!agent.reset.contains(&stream));
}

#[test]
fn allowed_names_resolve_and_others_are_reported() {
    let mut agent = spawn_with_egress(&["a.test:443", "*.b.test:443"]);
    let script = "
def look(name):
    try:
        return socket.getaddrinfo(name, 443, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as e:
        return 'none' if e.errno in (socket.EAI_NONAME, -5) else repr(e)
for name in ['a.test', 'x.b.test', 'y.b.test', 'a.test', 'b.test', 'x.a.test',
             'evil.example', 'evil.example']:
    print(look(name))
";
    let running = run_python(&mut agent, script);
    let addresses = "127.64.0.1\n127.64.0.2\n127.64.0.3\n127.64.0.1\nnone\nnone\nnone\nnone\n";
    assert_eq!(agent.wait_for_output(running), addresses);
    agent.wait_until(|agent| agent.denied.len() == 3);
    assert_eq!(agent.denied, ["b.test", "x.a.test", "evil.example"]);
}

#[test]
fn dns_over_tcp_accepts_split_queries() {
    let mut agent = spawn_with_egress(&["a.test:443"]);
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
# 64 KiB of name, and more clients than the limit.
s.send(b'\\xff\\xff' + b'a' * 70000)
print(error(lambda: s.recv(1)) in (b'', 'ConnectionResetError 104'))
clients = [socket.create_connection(('127.0.0.53', 53)) for _ in range(20)]
clients[-1].send(framed)
print(len(clients[-1].recv(100)) > 40)
";
    let running = run_python(&mut agent, script);
    assert_eq!(agent.wait_for_output(running), "True\nTrue\n");
}

#[test]
fn disallowed_endpoint_cannot_be_connected() {
    let mut agent = spawn_with_egress(&["a.test:443", "b.test:80"]);
    let script = "
def connect(host, port):
    s = socket.create_connection((host, port), timeout=10)
    return s.recv(1)
a = socket.gethostbyname('a.test')
for address, port in [('1.1.1.1', 443), ('10.0.0.1', 443), ('169.254.169.254', 80), (a, 22)]:
    print(error(lambda: connect(address, port)))
# A listener exists, and no name, or one with another port: reset.
for address, port in [('127.0.0.1', 443), ('127.64.9.9', 443), (a, 80)]:
    print(error(lambda: connect(address, port)))
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print(error(lambda: u.sendto(b'x', ('1.1.1.1', 53))))
u.connect((a, 443)); u.send(b'x'); print(error(lambda: u.send(b'x')))
";
    let running = run_python(&mut agent, script);
    let output = agent.wait_for_output(running);
    let unreachable = "OSError 101\n".repeat(3);
    let reset = "ConnectionResetError 104\n".repeat(3);
    // UDP has no route either, and no UDP socket is at the ports of the TCP listeners.
    let expected = format!(
        "{unreachable}ConnectionRefusedError 111\n{reset}OSError 101\nConnectionRefusedError 111\n"
    );
    assert_eq!(output, expected);
    assert_eq!(agent.dials, []);
}

#[test]
fn resets_pass_in_both_directions() {
    let mut agent = spawn_with_egress(&["a.test:443"]);
    let script = "
s = socket.create_connection(('a.test', 443))
print(error(lambda: s.recv(1)))
s = socket.create_connection(('a.test', 443))
s.sendall(b'x')
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
s.close()
";
    let running = run_python(&mut agent, script);
    let (_, _, stream) = next_dial(&mut agent);
    agent.connection.reset_stream(stream);
    let (_, _, stream) = next_dial(&mut agent);
    assert_eq!(agent.wait_for_output(running), "ConnectionResetError 104\n");
    agent.wait_until(|agent| agent.reset.contains(&stream));
}

#[test]
fn connections_beyond_the_limit_wait() {
    let mut agent = spawn_with_egress(&["a.test:443"]);
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
    let running = run_python(&mut agent, &script);
    agent.wait_until(|agent| agent.output.contains_key(&running.stdout));
    agent.wait_until(|agent| agent.dials.len() == MAX_DIALS);
    for _ in 0..5 {
        agent.exchange_once();
    }
    assert_eq!(agent.dials.len(), MAX_DIALS);
    let mut served = 0;
    while served < MAX_DIALS + 20 {
        let (_, _, stream) = next_dial(&mut agent);
        agent.wait_until(|agent| agent.ended.contains(&stream));
        assert_eq!(agent.connection.send_data(stream, b"y"), 1);
        agent.connection.end_stream(stream);
        served += 1;
    }
    assert_eq!(agent.wait_for_output(running), format!("{0}\n{0}\n", MAX_DIALS + 20));
}

#[test]
fn connection_flood_leaves_agent_memory_bounded() {
    let mut agent = spawn_with_egress(&["a.test:443"]);
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
    let running = run_python(&mut agent, script);
    // The host does not read during the flood.
    agent.exchange_once();
    std::thread::sleep(std::time::Duration::from_secs(3));
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 16 * 1024, "{kib} KiB resident");
    assert_eq!(agent.wait_for_output(running), "True\n");
}

#[test]
fn unread_connection_blocks_its_own_stream_only() {
    let mut agent = spawn_with_egress(&["a.test:443"]);
    let script = "
s = socket.create_connection(('a.test', 443))
t = socket.create_connection(('a.test', 443))
print(t.recv(5).decode(), flush=True)
sys.stdin.read()
";
    let running = run_python(&mut agent, script);
    let (_, _, first) = next_dial(&mut agent);
    let (_, _, second) = next_dial(&mut agent);
    let mut sent = 0;
    // Ends when the window and both sockets are full.
    for _ in 0..2000 {
        sent += agent.connection.send_data(first, &[0; 65536]);
        agent.exchange_once();
        if agent.connection.send_capacity(first) == 0
            && sent > 300_000
            && agent.connection.pending_output().is_empty()
        {
            break;
        }
    }
    assert!(sent < 4 << 20, "{sent} bytes");
    agent.connection.send_data(second, b"hello");
    agent.wait_until(|agent| agent.output.contains_key(&running.stdout));
    agent.connection.end_stream(running.stdin.unwrap());
    assert_eq!(agent.wait_for_output(running), "hello\n");
}

#[test]
fn egress_listens_once_opened_and_opens_once() {
    let mut agent = spawn_in_namespace();
    let script = "
for kind in 'tcp', 'udp':
    print(len(open('/proc/net/' + kind).readlines()) - 1)
";
    let running = run_python(&mut agent, script);
    assert_eq!(agent.wait_for_output(running), "0\n0\n");
    open_egress(&mut agent, &["a.test:443"]).unwrap();
    let failure = open_egress(&mut agent, &["a.test:443"]).unwrap_err();
    assert_eq!(failure.errno, 114);
}

#[test]
fn port_in_use_is_reported() {
    let mut agent = spawn_in_namespace();
    let running = run_python(
        &mut agent,
        "
import subprocess
s = socket.socket(); s.bind(('0.0.0.0', 8443)); s.listen()
print('up', flush=True); sys.stdin.read()",
    );
    agent.wait_until(|agent| agent.output.contains_key(&running.stdout));
    let failure = open_egress(&mut agent, &["a.test:8443"]).unwrap_err();
    assert!(failure.operation.contains("0.0.0.0:8443") && failure.errno == 98, "{failure}");
    agent.connection.end_stream(running.stdin.unwrap());
    assert_eq!(agent.wait_for_output(running), "up\n");
    // The failed attempt has left nothing.
    open_egress(&mut agent, &["a.test:8443"]).unwrap();
}

fn connect_to_port(agent: &mut Agent, port: u16) -> (StreamId, Result<(), Failure>) {
    let request = agent.next_id();
    let stream = agent.connection.open_stream(Direction::Both).unwrap();
    agent.connection.send_message(&ToGuest::Connect { request, port, stream }).unwrap();
    agent.wait_until(|agent| agent.done.contains_key(&request));
    (stream, agent.done.remove(&request).unwrap())
}

#[test]
fn host_connects_to_a_server_in_the_spawn_sandbox() {
    let mut agent = spawn_with_egress(&[]);
    let script = "
l = socket.socket(); l.bind(('127.0.0.1', 8000)); l.listen(); print('up', flush=True)
for _ in range(3):
    c, _ = l.accept()
    n = sum(len(d) for d in iter(lambda: c.recv(65536), b''))
    c.sendall(b'got %d' % n)
    c.close()
";
    let running = run_python(&mut agent, script);
    agent.wait_until(|agent| agent.output.contains_key(&running.stdout));
    for count in [0, 1, 1_000_000] {
        let (stream, result) = connect_to_port(&mut agent, 8000);
        result.unwrap();
        agent.send_all(stream, &vec![1; count]);
        agent.wait_until(|agent| agent.ended.contains(&stream));
        assert_eq!(agent.take_text(stream), format!("got {count}"));
    }
    agent.wait_for_exit(running);
    let (stream, result) = connect_to_port(&mut agent, 8000);
    let failure = result.unwrap_err();
    assert!(failure.operation.contains("8000") && failure.errno == 111, "{failure}");
    agent.wait_until(|agent| agent.reset.contains(&stream));
}
