//! A host that breaks the rules, or floods: the sandbox ends, or goes on, and never hangs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::Write;

use chitin_protocol::{
    Connection, Direction, Exit, Fault, Host, MAX_STREAMS, ToGuest, Unexpected, VERSION, WINDOW,
};
use support::{AGENT, Agent};

/// What a well-behaved host says first.
fn hello() -> Vec<u8> {
    Connection::<Host>::new().pending_output().to_vec()
}

fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (u32::try_from(payload.len()).unwrap() << 8).to_le_bytes().to_vec();
    bytes[0] = kind;
    bytes.extend(stream.to_le_bytes());
    bytes.extend(payload);
    bytes
}

#[test]
fn a_breach_ends_the_agent_and_is_logged() {
    let bad = |bytes: &[u8]| [hello(), bytes.to_vec()].concat();
    let oversized = {
        let mut header = (0xff_ffff_u32 << 8).to_le_bytes();
        header[0] = 2;
        [header.as_slice(), &[0; 4]].concat()
    };
    let cases: Vec<(&str, Vec<u8>, Fault)> = vec![
        ("noise", b"GET / HTTP/1.1\r\n\r\n".to_vec(), Fault::MissingHello { kind: b'G' }),
        ("another protocol", frame(1, 0, b"SSH-2.0-"), Fault::InvalidHello),
        (
            "version 0",
            frame(1, 0, b"CHTN\0\0\0\0"),
            Fault::UnsupportedVersion { theirs: 0, ours: VERSION },
        ),
        ("a hello twice", bad(&hello()), Fault::DuplicateHello),
        ("an unknown kind", bad(&frame(9, 2, b"")), Fault::UnknownKind { kind: 9 }),
        (
            "an oversized control frame",
            bad(&oversized),
            Fault::InvalidLength { kind: 2, len: 0xff_ffff },
        ),
        (
            "an undecodable message",
            bad(&frame(2, 0, &[0xff; 30])),
            Fault::InvalidMessage { len: 30 },
        ),
        ("a Start cut short", bad(&frame(2, 0, &[0, 1, 1])), Fault::InvalidMessage { len: 3 }),
        (
            "data for a stream never opened",
            bad(&frame(3, 2, b"x")),
            Fault::UnknownStream { kind: 3, stream: 2 },
        ),
        (
            "credit for a stream never opened",
            bad(&frame(4, 8, &[0; 4])),
            Fault::UnknownStream { kind: 4, stream: 8 },
        ),
        ("a message for the host", bad(&frame(2, 0, &[200])), Fault::InvalidMessage { len: 1 }),
    ];
    for (name, bytes, fault) in cases {
        let mut agent = Agent::spawn();
        agent.socket.write_all(&bytes).unwrap();
        // Its own hello would be a second one.
        let length = agent.connection.pending_output().len();
        agent.connection.consume_output(length);
        let (code, log) = agent.until_ended();
        assert_eq!(code, Some(1), "{name}: {log}");
        assert!(log.contains(&fault.to_string()), "{name}: {log}");
        assert_eq!(log.lines().count(), 1, "{name}: {log}");
    }
}

#[test]
fn a_breach_takes_the_processes_with_it() {
    let mut agent = Agent::up();
    let running = agent.shell("echo up; exec sleep 5432");
    agent.until(|agent| agent.output.contains_key(&running.stdout));
    agent.socket.write_all(&frame(3, 4000, b"x")).unwrap();
    assert_eq!(agent.until_ended().0, Some(1));
    let sleeping = std::fs::read_dir("/proc").unwrap().any(|entry| {
        std::fs::read(entry.unwrap().path().join("cmdline"))
            .is_ok_and(|line| line == b"sleep\x005432\0")
    });
    assert!(!sleeping);
}

#[test]
fn streams_and_names_are_not_used_twice() {
    let mut agent = Agent::up();
    let start = agent.plain(&["sleep", "50"]);
    let fault = Fault::from(Unexpected::ProcessIdInUse(start.process));
    let again = start.clone();
    agent.start(start);
    agent.start(again);
    let (code, log) = agent.until_ended();
    assert_eq!(code, Some(1));
    assert!(log.contains(&fault.to_string()), "{log}");

    let mut agent = Agent::up();
    let mut start = agent.plain(&["true"]);
    start.stderr = start.stdout;
    let fault = Fault::InvalidStreamId { stream: start.stdout };
    agent.start(start);
    assert!(agent.until_ended().1.contains(&fault.to_string()));

    let mut agent = Agent::up();
    let mut start = agent.plain(&["true"]);
    // Odd ids are the guest's.
    start.stdout = 3;
    agent.start(start);
    let fault = Fault::InvalidStreamId { stream: 3 };
    assert!(agent.until_ended().1.contains(&fault.to_string()));
}

#[test]
fn more_data_than_granted_is_a_breach() {
    let mut agent = Agent::up();
    let running = agent.run(&["sleep", "50"]);
    let stdin = running.stdin.unwrap();
    agent.turn();
    let mut sent = 0;
    // The pipe takes 64 KiB of it, which is not yet granted again.
    while sent <= WINDOW as usize + 65536 {
        if agent.socket.write_all(&frame(3, stdin, &[0; 65536])).is_err() {
            break;
        }
        sent += 65536;
    }
    assert!(agent.until_ended().1.contains("window left"));
}

#[test]
fn ten_thousand_streams_one_after_the_other() {
    let mut agent = Agent::up();
    // Each takes the whole way of a request: opened, refused, closed.
    for _ in 0..10_000 {
        let request = agent.request();
        let stream = agent.connection.open_stream(Direction::Receive).unwrap();
        let get = ToGuest::Get { request, path: b"/proc/1".to_vec(), stream };
        agent.connection.send_message(&get).unwrap();
        if request.is_multiple_of(100) {
            agent.until(|agent| agent.done.contains_key(&request));
        }
    }
    agent.until(|agent| agent.done.len() == 10_000);
    assert!(agent.done.values().all(Result::is_err));
    let running = agent.run(&["true"]);
    assert_eq!(agent.exit(running), Exit::Code(0));
}

#[test]
fn copies_beyond_the_limit_are_refused() {
    let mut agent = Agent::up();
    let mut requests = Vec::new();
    // Their threads wait for trees that do not come.
    while let Some(stream) = agent.connection.open_stream(Direction::Send) {
        let request = agent.request();
        requests.push((request, stream));
        let put = ToGuest::Put { request, path: b"/tmp/never".to_vec(), stream };
        agent.connection.send_message(&put).unwrap();
    }
    assert_eq!(requests.len(), MAX_STREAMS);
    agent.until(|agent| agent.done.len() == MAX_STREAMS - 8);
    assert!(
        agent.done.values().all(|result| result.as_ref().is_err_and(|failure| failure.errno == 11))
    );
    let running = agent.run(&["true"]);
    assert_eq!(agent.exit(running), Exit::Code(0));
    for (_, stream) in requests {
        agent.connection.end_stream(stream);
    }
    agent.until(|agent| agent.done.len() == MAX_STREAMS);
}

#[test]
fn a_host_that_never_reads_is_no_reason_to_grow() {
    let mut agent = Agent::up();
    let running: Vec<_> = (0..20).map(|_| agent.run(&["cat", "/dev/zero"])).collect();
    // Said, and from here on nothing is read.
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
        agent.signal(running, 9);
        assert_eq!(agent.exit(running), Exit::Signal(9));
    }
}

#[test]
fn called_wrongly_it_says_so() {
    for (arguments, words) in [(&["--help"][..], "unknown argument"), (&[], "init of a sandbox")] {
        let output = std::process::Command::new(AGENT).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(words), "{text}");
    }
}
