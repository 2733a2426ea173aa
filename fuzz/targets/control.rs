//! The control socket between a monitor and its host: specifications and requests with descriptors
//! in one direction, events in the other.
#![no_main]

use std::fs::File;
use std::io::{IoSlice, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use chitin_fuzz::Choices;
use chitin_vmm::Event;
use chitin_vmm::control::{Command, ControlSocket, MAX_LOG_BYTES};
use libfuzzer_sys::fuzz_target;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, sendmsg, socketpair,
};

/// More descriptors than a packet may have.
const MAX_FDS: usize = 7;

/// Returns a descriptor of one kind of those that a packet has, or of another.
fn open_descriptor(kind: u8) -> OwnedFd {
    let make_file = |bytes: usize| {
        let mut file: File = tempfile::tempfile_in("/dev/shm").expect("a file");
        file.write_all(&[7; 64][..bytes]).and_then(|()| file.rewind()).expect("written");
        file.into()
    };
    match kind % 5 {
        0 => UnixStream::pair().expect("a socket pair").0.into(),
        1 => make_file(32),
        2 => make_file(31),
        3 => make_file(33),
        _ => make_socket_pair().0,
    }
}

fn make_socket_pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .expect("a socket pair")
}

/// Sends a packet with descriptors to a monitor.
fn feed_monitor(mut choices: Choices<'_>) {
    let (ours, host) = make_socket_pair();
    let control = ControlSocket::new(ours).expect("a control socket");
    let (is_spec, count) = (choices.take_u8() & 1 == 0, usize::from(choices.take_u8()));
    let fds: Vec<_> =
        (0..count % (MAX_FDS + 1)).map(|_| open_descriptor(choices.take_u8())).collect();
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let packet = [IoSlice::new(choices.0)];
    sendmsg(&host, &packet, &mut ancillary, SendFlags::empty()).expect("sent");
    drop(host);
    if is_spec {
        if let Ok(received) = control.receive_spec() {
            assert_eq!(received.channel.is_none(), received.spec.prepared);
            assert_eq!(received.template.is_some(), received.spec.restore);
            let _ = received.spec.validate();
            let json = serde_json::to_vec(&received.spec).expect("a specification is JSON");
            assert_eq!(serde_json::from_slice(&json).ok(), Some(received.spec));
        }
        return;
    }
    if let Ok(command) = control.try_receive_command() {
        let needed = match &command {
            Command::Go(_) => 1,
            Command::Snapshot { .. } => 3,
            Command::Record { .. } => 2,
        };
        assert_eq!(fds.len(), needed, "{}", command.name());
    }
}

/// Reads an event as the host does, and sends it as a monitor does.
fn feed_host(packet: &[u8]) {
    let Ok(event) = serde_json::from_slice::<Event>(packet) else { return };
    if let Event::Ended { log, .. } = &event
        && log.len() > MAX_LOG_BYTES
    {
        return;
    }
    let (ours, host) = make_socket_pair();
    let control = ControlSocket::new(ours).expect("a control socket");
    control.send(&event).expect("an event fits into the socket");
    let mut buffer = vec![0; 256 << 10];
    let (_, length) = recv(&host, &mut buffer[..], RecvFlags::empty()).expect("received");
    assert_eq!(serde_json::from_slice(&buffer[..length]).ok(), Some(event));
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices(data);
    match choices.take_u8() & 1 {
        0 => feed_monitor(choices),
        _ => feed_host(choices.0),
    }
});
