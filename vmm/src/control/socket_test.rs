use std::io::{IoSlice, Read, Seek, Write};
use std::os::fd::BorrowedFd;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SocketFlags, sendmsg, socketpair};

use super::*;
use crate::control::{EndReason, MAX_LOG_BYTES};

const SPEC: &[u8] = br#"{"kernel": "k", "root_image": "r"}"#;

/// A monitor's control socket, and the host's end of it.
fn control_pair() -> (ControlSocket, OwnedFd) {
    let (ours, host) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    (ControlSocket(ours), host)
}

/// A control socket with one packet of a host.
fn control_with(packet: &[u8], fds: &[BorrowedFd<'_>]) -> ControlSocket {
    let (control, host) = control_pair();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    sendmsg(&host, &[IoSlice::new(packet)], &mut ancillary, SendFlags::empty()).unwrap();
    control
}

fn receive_spec(packet: &[u8], fds: &[BorrowedFd<'_>]) -> Result<ReceivedSpec, ControlError> {
    control_with(packet, fds).receive_spec()
}

fn receive_command(packet: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Command, ControlError> {
    control_with(packet, fds).try_receive_command()
}

/// A file with a key, to be read once.
fn key(bytes: usize) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![7; bytes]).unwrap();
    file.rewind().unwrap();
    file
}

fn ended(log: String) -> Event {
    Event::Ended { reason: EndReason::Reset, detail: None, log, faults: 0, fault: None }
}

#[test]
fn spec_is_received_with_its_channel() {
    let (channel, mut host) = UnixStream::pair().unwrap();
    let received = receive_spec(SPEC, &[channel.as_fd()]).unwrap();
    assert_eq!(received.spec, VmSpec::new("k", "r"));
    assert!(received.template.is_none());
    host.write_all(b"x").unwrap();
    received.channel.unwrap().read_exact(&mut [0]).unwrap();
}

#[test]
fn restore_needs_files_and_prepared_no_channel() {
    let (channel, _host) = UnixStream::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    for (packet, prepared) in [
        (br#"{"root_image": "r", "restore": true}"#.as_slice(), false),
        (br#"{"root_image": "r", "restore": true, "prepared": true}"#, true),
    ] {
        let (good, short, long) = (key(32), key(31), key(32));
        let channel = (!prepared).then_some(channel.as_fd());
        let fds = |key| channel.into_iter().chain([file.as_fd(), file.as_fd(), key]);
        let fds = |key| fds(key).collect::<Vec<_>>();
        let received = receive_spec(packet, &fds(good.as_fd())).unwrap();
        assert_eq!(received.channel.is_none(), prepared);
        assert!(received.template.is_some());
        let short = receive_spec(packet, &fds(short.as_fd()));
        assert!(matches!(short, Err(ControlError::Key(_))));
        let too_many = [fds(long.as_fd()), vec![file.as_fd()]].concat();
        let too_few = &fds(long.as_fd())[1..];
        for fds in [too_many.as_slice(), too_few] {
            let received = receive_spec(packet, fds);
            assert!(matches!(received, Err(ControlError::Descriptors { .. })));
        }
    }
    let packet = br#"{"kernel": "k", "root_image": "r", "prepared": true}"#;
    assert!(receive_spec(packet, &[]).unwrap().channel.is_none());
    let received = receive_spec(packet, &[channel.as_fd()]);
    assert!(matches!(received, Err(ControlError::Descriptors { .. })));
}

#[test]
fn command_is_received_with_its_descriptors() {
    let (channel, _host) = UnixStream::pair().unwrap();
    let (file, keys) = (tempfile::tempfile().unwrap(), [key(32), key(32)]);
    let (channel, file, keys) = (channel.as_fd(), file.as_fd(), keys.each_ref().map(AsFd::as_fd));
    let go = br#"{"request": "go"}"#;
    assert!(matches!(receive_command(go, &[channel]), Ok(Command::Go(_))));
    assert!(matches!(receive_command(go, &[file]), Err(ControlError::NotAChannel)));
    let snapshot = br#"{"request": "snapshot", "binding": "b"}"#;
    let command = receive_command(snapshot, &[file, file, keys[0]]).unwrap();
    assert!(matches!(&command, Command::Snapshot { binding, .. } if binding == "b"));
    let record = br#"{"request": "record"}"#;
    assert!(matches!(receive_command(record, &[file, keys[1]]), Ok(Command::Record { .. })));
    for (packet, fds) in [
        (go.as_slice(), vec![]),
        (go, vec![channel, channel]),
        (snapshot, vec![file, file]),
        (snapshot, vec![file; 4]),
        (record, vec![file]),
    ] {
        let received = receive_command(packet, &fds);
        assert!(matches!(received, Err(ControlError::Descriptors { .. })));
    }
    for packet in
        [br#"{"request": "stop"}"#.as_slice(), br#"{"request": "go", "x": 1}"#, b"{}", b"go"]
    {
        assert!(matches!(receive_command(packet, &[channel]), Err(ControlError::Parse(_))));
    }
    let (control, _host) = control_pair();
    assert!(matches!(control.try_receive_command(), Err(ControlError::WouldBlock)));
}

#[test]
fn invalid_packet_is_refused() {
    let (channel, _host) = UnixStream::pair().unwrap();
    let fd = channel.as_fd();
    let (packets, _other) = control_pair();
    let file = tempfile::tempfile().unwrap();
    for fds in [vec![], vec![fd, fd]] {
        let received = receive_spec(SPEC, &fds);
        assert!(matches!(received, Err(ControlError::Descriptors { .. })), "{fds:?}");
    }
    for fds in [vec![packets.0.as_fd()], vec![file.as_fd()]] {
        let received = receive_spec(SPEC, &fds);
        assert!(matches!(received, Err(ControlError::NotAChannel)), "{fds:?}");
    }
    assert!(matches!(receive_spec(b"{", &[fd]), Err(ControlError::Parse(_))));
    for excess in [1, 100] {
        let packet = vec![b' '; MAX_SPEC_BYTES + excess];
        assert!(matches!(receive_spec(&packet, &[fd]), Err(ControlError::TooLong)));
    }
    let (control, host) = control_pair();
    drop(host);
    assert!(matches!(control.receive_spec(), Err(ControlError::Closed)));
}

#[test]
fn longest_log_fits_into_one_packet() {
    let (control, host) = control_pair();
    // Two bytes of JSON for each: the worst that is left after the log was cleaned.
    let event = ended("\n".repeat(MAX_LOG_BYTES));
    control.send(&event).unwrap();
    let mut packet = vec![0; 1 << 20];
    let (_, length) = recv(&host, &mut packet, RecvFlags::empty()).unwrap();
    assert_eq!(serde_json::from_slice::<Event>(&packet[..length]).unwrap(), event);
}

#[test]
fn full_socket_does_not_block_the_sender() {
    let (control, _host) = control_pair();
    let event = ended("\n".repeat(MAX_LOG_BYTES));
    assert!((0..1000).any(|_| control.send(&event).is_err()));
}
