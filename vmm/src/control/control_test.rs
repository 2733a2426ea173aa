use super::super::message::*;
use super::*;
use crate::jail::Jail;
use crate::virtio::GuestFault;

#[test]
fn events_are_these_bytes_on_the_wire() {
    let ended = Event::Ended {
        reason: EndReason::Reset,
        detail: None,
        log: "x".into(),
        faults: 0,
        fault: None,
    };
    let faulty = Event::Ended {
        reason: EndReason::Fault,
        detail: None,
        log: String::new(),
        faults: 2,
        fault: Some(GuestFault::UsedRing { queue: 1 }),
    };
    for (event, json) in [
        (Event::Entered { at_ns: 7, jail: None }, r#"{"event":"entered","at_ns":7}"#),
        (
            Event::Entered {
                at_ns: 7,
                jail: Some(Jail { uid: Some(8), cgroup: None, without: vec!["x".into()] }),
            },
            r#"{"event":"entered","at_ns":7,"jail":{"uid":8,"cgroup":null,"without":["x"]}}"#,
        ),
        (ended, r#"{"event":"ended","reason":"reset","detail":null,"log":"x","faults":0}"#),
        (
            faulty,
            r#"{"event":"ended","reason":"fault","detail":null,"log":"","faults":2,"fault":{"used_ring":{"queue":1}}}"#,
        ),
        (Event::Failed { error: "no".into() }, r#"{"event":"failed","error":"no"}"#),
    ] {
        assert_eq!(serde_json::to_string(&event).unwrap(), json);
        assert_eq!(serde_json::from_str::<Event>(json).unwrap(), event);
        assert_eq!(serde_json::from_str::<Message>(json).unwrap(), event.into());
    }
    for (event, json) in [
        (TemplateEvent::Prepared, r#"{"event":"prepared"}"#),
        (TemplateEvent::Frozen, r#"{"event":"frozen"}"#),
        (
            TemplateEvent::Saved { memory_bytes: 1, state_bytes: 2 },
            r#"{"event":"saved","memory_bytes":1,"state_bytes":2}"#,
        ),
        (
            TemplateEvent::Recorded { written: 1, read: 2, image: 3 },
            r#"{"event":"recorded","written":1,"read":2,"image":3}"#,
        ),
    ] {
        let message = Message::from(event);
        assert_eq!(serde_json::to_string(&message).unwrap(), json);
        assert_eq!(serde_json::from_str::<Message>(json).unwrap(), message);
    }
}

type Received = (VmSpec, Option<UnixStream>, Option<TemplateFiles>);

/// A control socket, and what a host sends over it.
fn receive(packet: &[u8], fds: &[RawFd]) -> Result<Received, ControlError> {
    let (ours, theirs) = pair(libc::SOCK_SEQPACKET);
    Socket(&theirs).send_with_fds(&[packet], fds).unwrap();
    Control(ours).receive()
}

fn command(packet: &[u8], fds: &[RawFd]) -> Result<Command, ControlError> {
    let (ours, theirs) = pair(libc::SOCK_SEQPACKET);
    Socket(&theirs).send_with_fds(&[packet], fds).unwrap();
    Control(ours).command()
}

/// A file with a key in it, to be read once.
fn key(bytes: usize) -> File {
    use std::io::{Seek, Write};
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![7; bytes]).unwrap();
    file.rewind().unwrap();
    file
}

fn pair(kind: libc::c_int) -> (OwnedFd, OwnedFd) {
    let mut fds = [-1; 2];
    // SAFETY: the array has room for the two descriptors.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, 0);
    // SAFETY: just made, and nobody else knows them.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

const SPEC: &[u8] = br#"{"kernel": "k", "root_image": "r"}"#;

#[test]
fn a_specification_comes_with_the_channel() {
    use std::io::{Read, Write};
    let (channel, mut host) = UnixStream::pair().unwrap();
    let (spec, received, files) = receive(SPEC, &[channel.as_raw_fd()]).unwrap();
    assert_eq!(spec, VmSpec::new("k", "r"));
    assert!(files.is_none());
    host.write_all(b"x").unwrap();
    received.unwrap().read_exact(&mut [0]).unwrap();
}

#[test]
fn what_is_restored_comes_with_its_files_and_what_is_prepared_without_a_channel() {
    let (channel, _host) = UnixStream::pair().unwrap();
    let (channel, file) = (channel.as_raw_fd(), tempfile::tempfile().unwrap());
    let file = file.as_raw_fd();
    for (packet, prepared) in [
        (br#"{"root_image": "r", "restore": true}"#.as_slice(), false),
        (br#"{"root_image": "r", "restore": true, "prepared": true}"#, true),
    ] {
        let (good, short, long) = (key(32), key(31), key(32));
        let fds = |key: &File| {
            let channel = (!prepared).then_some(channel);
            channel.into_iter().chain([file, file, key.as_raw_fd()]).collect::<Vec<_>>()
        };
        let (_, channel, files) = receive(packet, &fds(&good)).unwrap();
        assert_eq!((channel.is_none(), files.is_some()), (prepared, true));
        assert!(matches!(receive(packet, &fds(&short)), Err(ControlError::Key(_))));
        let too_many = [fds(&long), vec![file]].concat();
        assert!(matches!(receive(packet, &too_many), Err(ControlError::Descriptors { .. })));
        assert!(matches!(receive(packet, &fds(&long)[1..]), Err(ControlError::Descriptors { .. })));
    }
    let packet = br#"{"kernel": "k", "root_image": "r", "prepared": true}"#;
    assert!(receive(packet, &[]).unwrap().1.is_none());
    assert!(matches!(receive(packet, &[channel]), Err(ControlError::Descriptors { .. })));
}

#[test]
fn requests_come_with_what_they_need() {
    let (channel, _host) = UnixStream::pair().unwrap();
    let (channel, file, keys) =
        (channel.as_raw_fd(), tempfile::tempfile().unwrap(), [key(32), key(32)]);
    let (file, keys) = (file.as_raw_fd(), keys.each_ref().map(AsRawFd::as_raw_fd));
    let go = br#"{"request": "go"}"#;
    assert!(matches!(command(go, &[channel]), Ok(Command::Go(_))));
    assert!(matches!(command(go, &[file]), Err(ControlError::Channel)));
    let snapshot = br#"{"request": "snapshot", "binding": "b"}"#;
    let files = [file, file, keys[0]];
    assert!(
        matches!(command(snapshot, &files), Ok(Command::Snapshot { binding, .. }) if binding == "b")
    );
    let record = br#"{"request": "record"}"#;
    assert!(matches!(command(record, &[file, keys[1]]), Ok(Command::Record { .. })));
    for (packet, fds) in [
        (go.as_slice(), vec![]),
        (go, vec![channel, channel]),
        (snapshot, vec![file, file]),
        (snapshot, vec![file; 4]),
        (record, vec![file]),
    ] {
        assert!(matches!(command(packet, &fds), Err(ControlError::Descriptors { .. })));
    }
    for packet in
        [br#"{"request": "stop"}"#.as_slice(), br#"{"request": "go", "x": 1}"#, b"{}", b"go"]
    {
        assert!(matches!(command(packet, &[channel]), Err(ControlError::Parse(_))));
    }
    let (ours, _theirs) = pair(libc::SOCK_SEQPACKET);
    assert!(matches!(Control(ours).command(), Err(ControlError::Nothing)));
}

#[test]
fn anything_else_is_refused() {
    let (channel, _host) = UnixStream::pair().unwrap();
    let fd = channel.as_raw_fd();
    let (packets, _other) = pair(libc::SOCK_SEQPACKET);
    let file = tempfile::tempfile().unwrap();
    for fds in [vec![], vec![fd, fd]] {
        assert!(matches!(receive(SPEC, &fds), Err(ControlError::Descriptors { .. })), "{fds:?}");
    }
    for fds in [vec![packets.as_raw_fd()], vec![file.as_raw_fd()]] {
        assert!(matches!(receive(SPEC, &fds), Err(ControlError::Channel)), "{fds:?}");
    }
    assert!(matches!(receive(b"{", &[fd]), Err(ControlError::Parse(_))));
    assert!(matches!(receive(&[b' '; MAX_SPEC_BYTES + 1], &[fd]), Err(ControlError::TooLong)));
    assert!(matches!(receive(&[b' '; MAX_SPEC_BYTES + 100], &[fd]), Err(ControlError::TooLong)));
    let (ours, theirs) = pair(libc::SOCK_SEQPACKET);
    drop(theirs);
    assert!(matches!(Control(ours).receive(), Err(ControlError::Closed)));
}

#[test]
fn the_longest_log_fits_into_a_packet_and_a_full_socket_does_not_block() {
    let (ours, theirs) = pair(libc::SOCK_SEQPACKET);
    let control = Control(ours);
    // Two bytes of JSON for each: the worst that is left after the log was cleaned.
    let log = "\n".repeat(MAX_LOG_BYTES);
    let ended = Message::Event(Event::Ended {
        reason: EndReason::Reset,
        detail: None,
        log,
        faults: 0,
        fault: None,
    });
    control.send(&ended).unwrap();
    let mut packet = vec![0; 1 << 20];
    let length = Socket(&theirs).recv_with_fd(&mut packet).unwrap().0;
    assert_eq!(serde_json::from_slice::<Message>(&packet[..length]).unwrap(), ended);
    assert!((0..1000).any(|_| control.send(&ended).is_err()));
}
