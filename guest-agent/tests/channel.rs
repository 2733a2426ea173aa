//! Hosts that violate the protocol, or flood the agent: the sandbox ends, or continues, and never
//! hangs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::Write;

use chitin_protocol::{
    Connection, Direction, Exit, Fault, Host, MAX_STREAMS, ToGuest, Unexpected, VERSION, WINDOW,
};
use support::{AGENT, Agent};

/// Returns the first bytes of a host that follows the protocol.
fn encode_hello() -> Vec<u8> {
    Connection::<Host>::new().pending_output().to_vec()
}

fn encode_frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (u32::try_from(payload.len()).unwrap() << 8).to_le_bytes().to_vec();
    bytes[0] = kind;
    bytes.extend(stream.to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// Returns violations, the bytes that a host sends for them, and the fault of each.
fn list_violations() -> Vec<(&'static str, Vec<u8>, Fault)> {
    let after_hello = |bytes: &[u8]| [encode_hello(), bytes.to_vec()].concat();
    let oversized = {
        let mut header = (0xff_ffff_u32 << 8).to_le_bytes();
        header[0] = 2;
        [header.as_slice(), &[0; 4]].concat()
    };
    vec![
        ("noise", b"GET / HTTP/1.1\r\n\r\n".to_vec(), Fault::MissingHello { kind: b'G' }),
        ("another protocol", encode_frame(1, 0, b"SSH-2.0-"), Fault::InvalidHello),
        (
            "version 0",
            encode_frame(1, 0, b"CHTN\0\0\0\0"),
            Fault::UnsupportedVersion { theirs: 0, ours: VERSION },
        ),
        ("a second hello", after_hello(&encode_hello()), Fault::DuplicateHello),
        ("an unknown kind", after_hello(&encode_frame(9, 2, b"")), Fault::UnknownKind { kind: 9 }),
        (
            "an oversized control frame",
            after_hello(&oversized),
            Fault::InvalidLength { kind: 2, len: 0xff_ffff },
        ),
        (
            "an undecodable message",
            after_hello(&encode_frame(2, 0, &[0xff; 30])),
            Fault::InvalidMessage { len: 30 },
        ),
        (
            "a truncated Start",
            after_hello(&encode_frame(2, 0, &[0, 1, 1])),
            Fault::InvalidMessage { len: 3 },
        ),
        (
            "data for a stream that was never opened",
            after_hello(&encode_frame(3, 2, b"x")),
            Fault::UnknownStream { kind: 3, stream: 2 },
        ),
        (
            "credit for a stream that was never opened",
            after_hello(&encode_frame(4, 8, &[0; 4])),
            Fault::UnknownStream { kind: 4, stream: 8 },
        ),
        (
            "a message for the host",
            after_hello(&encode_frame(2, 0, &[200])),
            Fault::InvalidMessage { len: 1 },
        ),
    ]
}

#[test]
fn protocol_violation_ends_the_agent_with_one_line() {
    for (name, bytes, fault) in list_violations() {
        let mut agent = Agent::spawn();
        agent.socket.write_all(&bytes).unwrap();
        // The hello of the test's own connection would be a second one.
        let length = agent.connection.pending_output().len();
        agent.connection.consume_output(length);
        let (code, log) = agent.wait_for_end();
        assert_eq!(code, Some(1), "{name}: {log}");
        assert!(log.contains(&fault.to_string()), "{name}: {log}");
        assert_eq!(log.lines().count(), 1, "{name}: {log}");
    }
}

#[test]
fn protocol_violation_ends_all_processes() {
    let mut agent = Agent::spawn_ready();
    let running = agent.run_shell("echo up; exec sleep 5432");
    agent.wait_until(|agent| agent.output.contains_key(&running.stdout));
    agent.socket.write_all(&encode_frame(3, 4000, b"x")).unwrap();
    assert_eq!(agent.wait_for_end().0, Some(1));
    let sleeping = std::fs::read_dir("/proc").unwrap().any(|entry| {
        std::fs::read(entry.unwrap().path().join("cmdline"))
            .is_ok_and(|line| line == b"sleep\x005432\0")
    });
    assert!(!sleeping);
}

#[test]
fn reused_process_or_stream_id_is_a_violation() {
    let mut agent = Agent::spawn_ready();
    let start = agent.plain_start(&["sleep", "50"]);
    let again = start.clone();
    let fault = Fault::from(Unexpected::ProcessIdInUse(start.process));
    agent.start_process(start);
    agent.start_process(again);
    let (code, log) = agent.wait_for_end();
    assert_eq!(code, Some(1));
    assert!(log.contains(&fault.to_string()), "{log}");

    let mut agent = Agent::spawn_ready();
    let mut start = agent.plain_start(&["true"]);
    start.stderr = start.stdout;
    let fault = Fault::InvalidStreamId { stream: start.stdout };
    agent.start_process(start);
    assert!(agent.wait_for_end().1.contains(&fault.to_string()));

    let mut agent = Agent::spawn_ready();
    let mut start = agent.plain_start(&["true"]);
    // Only the guest may open odd ids.
    start.stdout = 3;
    agent.start_process(start);
    let fault = Fault::InvalidStreamId { stream: 3 };
    assert!(agent.wait_for_end().1.contains(&fault.to_string()));
}

#[test]
fn data_beyond_the_window_is_a_violation() {
    let mut agent = Agent::spawn_ready();
    let running = agent.run_command(&["sleep", "50"]);
    let stdin = running.stdin.unwrap();
    agent.exchange_once();
    let mut sent = 0;
    // The pipe takes 64 KiB, for which no credit has been returned yet.
    while sent <= WINDOW as usize + 65536 {
        if agent.socket.write_all(&encode_frame(3, stdin, &[0; 65536])).is_err() {
            break;
        }
        sent += 65536;
    }
    // The window left depends on how much the pipe has taken.
    let exceeded = |window| Fault::WindowExceeded { stream: stdin, len: 65536, window };
    let log = agent.wait_for_end().1;
    assert!((0..65536).any(|window| log.contains(&exceeded(window).to_string())), "{log}");
}

#[test]
fn ten_thousand_streams_in_sequence_are_served() {
    let mut agent = Agent::spawn_ready();
    // Each stream is opened, refused and closed.
    for _ in 0..10_000 {
        let request = agent.next_id();
        let stream = agent.connection.open_stream(Direction::Receive).unwrap();
        let get = ToGuest::Get { request, path: b"/proc/1".to_vec(), stream };
        agent.connection.send_message(&get).unwrap();
        if request.is_multiple_of(100) {
            agent.wait_until(|agent| agent.done.contains_key(&request));
        }
    }
    agent.wait_until(|agent| agent.done.len() == 10_000);
    assert!(agent.done.values().all(Result::is_err));
    let running = agent.run_command(&["true"]);
    assert_eq!(agent.wait_for_exit(running), Exit::Code(0));
}

#[test]
fn copies_beyond_the_limit_are_refused() {
    let mut agent = Agent::spawn_ready();
    let mut requests = Vec::new();
    // The threads wait for trees that do not arrive.
    while let Some(stream) = agent.connection.open_stream(Direction::Send) {
        let request = agent.next_id();
        requests.push((request, stream));
        let put = ToGuest::Put { request, path: b"/tmp/never".to_vec(), stream };
        agent.connection.send_message(&put).unwrap();
    }
    assert_eq!(requests.len(), MAX_STREAMS);
    agent.wait_until(|agent| agent.done.len() == MAX_STREAMS - 8);
    assert!(
        agent.done.values().all(|result| result.as_ref().is_err_and(|failure| failure.errno == 11))
    );
    let running = agent.run_command(&["true"]);
    assert_eq!(agent.wait_for_exit(running), Exit::Code(0));
    for (_, stream) in requests {
        agent.connection.end_stream(stream);
    }
    agent.wait_until(|agent| agent.done.len() == MAX_STREAMS);
}

#[test]
fn unread_output_leaves_agent_memory_bounded() {
    let mut agent = Agent::spawn_ready();
    let running: Vec<_> = (0..20).map(|_| agent.run_command(&["cat", "/dev/zero"])).collect();
    // From here on the host reads nothing.
    while !agent.connection.pending_output().is_empty() {
        let count = agent.socket.write(agent.connection.pending_output()).unwrap();
        agent.connection.consume_output(count);
    }
    std::thread::sleep(std::time::Duration::from_millis(500));
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 16 * 1024, "{kib} KiB resident");
    for running in running {
        agent.send_signal(running, 9);
        assert_eq!(agent.wait_for_exit(running), Exit::Signal(9));
    }
}

#[test]
fn usage_error_names_the_argument() {
    // Without arguments, the message names the one that is missing.
    for (arguments, named) in [(&["--help"][..], "--help"), (&[], "--stdio")] {
        let output = std::process::Command::new(AGENT).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(named), "{text}");
    }
}
