//! What host and monitor say to each other over the control socket.
//!
//! The control socket is a `SOCK_SEQPACKET` pair, inherited as standard input. The host's first packet is a
//! [`VmSpec`](crate::VmSpec) as JSON, with descriptors attached; the monitor answers with one event as JSON per packet. The
//! host stops a monitor by closing its end, which its death does as well.
//!
//! ```text
//! host                                              monitor
//!  spec                 [channel]               ──▶
//!                                               ◀── entered … ended                     a guest, booted
//!
//!  spec{template}       [channel]               ──▶
//!                                               ◀── entered, frozen                     the guest waits to be saved
//!  snapshot{binding}    [memory, state, key]    ──▶
//!                                               ◀── saved
//!
//!  spec{restore}        [channel, memory, state, key] ──▶
//!                                               ◀── entered … ended                     a guest, restored
//!
//!  spec{…, prepared}    the same without channel ──▶
//!                                               ◀── prepared                            a monitor in a pool
//!  go                   [channel]               ──▶
//!                                               ◀── entered … ended
//!
//!  spec{restore, record} [channel, memory, state, key] ──▶                              and used once, then:
//!  record               [state, key]            ──▶
//!                                               ◀── recorded
//! ```
//!
//! Whatever goes wrong, also with a request, ends the monitor with `failed`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::jail::Jail;
use crate::spec::{MAX_SPEC_BYTES, VmSpec};
use crate::state::{Key, StateError};

/// What a monitor tells its host, one JSON object per packet (or per line, when it runs standalone).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The guest is about to execute its first instruction.
    Entered {
        /// `CLOCK_MONOTONIC` in nanoseconds, just before the first `KVM_RUN`.
        at_ns: u64,
        /// The jail around its monitor; none for one that was told to do without.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        jail: Option<Jail>,
    },
    /// The guest is gone. Always the last event of a monitor that had started.
    Ended {
        /// Who ended it.
        reason: EndReason,
        /// What happened, in words, where there is more to say than the reason.
        detail: Option<String>,
        /// The tail of the guest kernel's messages: at most [`MAX_LOG_BYTES`], lossy UTF-8. Untrusted.
        log: String,
        /// How often the guest broke a rule of a device, whether or not that was the end of it.
        #[serde(default)]
        faults: u64,
        /// The first rule that it broke, in words.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fault: Option<String>,
    },
    /// The guest never started, or what was asked for could not be done. The last event.
    Failed {
        /// The chain of errors as one line, with the remedy.
        error: String,
    },
}

/// What a monitor tells a host that makes or uses templates, beside [`Event`]s and told apart by the same tag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum TemplateEvent {
    /// Everything that can be done without a channel is done.
    Prepared,
    /// The guest has closed its connection and waits for another one: now it can be saved. Better still a few
    /// milliseconds later, when it has nothing left to do.
    Frozen,
    /// The guest was saved, and is gone. The last event.
    Saved {
        /// Bytes of memory that are not zero, which is what the memory file takes.
        memory_bytes: u64,
        /// Bytes of the state file.
        state_bytes: u64,
    },
    /// What the guest uses is in the new state file, and the guest is gone. The last event.
    Recorded {
        /// Pages of memory that it writes to.
        written: u32,
        /// Pages of memory that it only reads.
        read: u32,
        /// Pages of the root image.
        image: u32,
    },
}

/// Any packet of a monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Message {
    /// One that every host gets.
    Event(Event),
    /// One that a host gets who asked for it.
    Template(TemplateEvent),
}

impl From<Event> for Message {
    fn from(event: Event) -> Self {
        Self::Event(event)
    }
}

impl From<TemplateEvent> for Message {
    fn from(event: TemplateEvent) -> Self {
        Self::Template(event)
    }
}

/// What a host asks for after the specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Run the guest that was prepared. With the channel.
    Go {},
    /// Save the guest. With a file for its memory and one for its state, both open for writing, and a file or pipe with
    /// the key of 32 bytes.
    Snapshot {
        /// What the files are identified by that belong to the guest; see [`VmSpec::binding`](crate::VmSpec::binding).
        #[serde(default)]
        binding: String,
    },
    /// Write down what the guest has used so far. With a file for the new state and the key, as for a snapshot.
    Record {},
}

/// A request with what came with it.
#[derive(Debug)]
pub enum Command {
    /// Run the guest that was prepared.
    Go(UnixStream),
    /// Save it.
    Snapshot {
        /// As given.
        binding: String,
        /// To be written.
        memory: File,
        /// To be written.
        state: File,
        /// To sign the state with.
        key: Key,
    },
    /// Write down what it has used.
    Record {
        /// To be written.
        state: File,
        /// To sign the state with.
        key: Key,
    },
}

/// The files of a saved guest.
#[derive(Debug)]
pub struct TemplateFiles {
    /// Its memory, open for reading only.
    pub memory: File,
    /// Everything else.
    pub state: File,
    /// What the state is signed with.
    pub key: Key,
}

/// Who ended a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The guest itself: a reboot, a panic or a triple fault, which look alike from outside.
    Reset,
    /// We were told to stop: a signal, the control socket closed, or the channel's host end closed.
    Stopped,
    /// The guest broke the rules of a device beyond repair.
    Fault,
    /// KVM refused to run the guest any further.
    Kvm,
}

/// The most bytes of guest kernel messages in [`Event::Ended`]. A panic with its backtrace takes some 4 KiB; the rest is
/// what led to it.
pub const MAX_LOG_BYTES: usize = 32 * 1024;

/// The control socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Standard input is something else.
    #[error(
        "standard input is no control socket: give the path of a specification, or let `chitin run` start the monitor"
    )]
    NoSocket,
    /// Reading failed.
    #[error("receive from the control socket")]
    Receive(#[source] io::Error),
    /// The host is gone.
    #[error("the host closed the control socket before it sent a specification")]
    Closed,
    /// There is nothing to wait for.
    #[error("nothing was asked for")]
    Nothing,
    /// The key of a template is missing.
    #[error(transparent)]
    Key(#[from] StateError),
    /// The packet is too large.
    #[error("a packet of more than {MAX_SPEC_BYTES} bytes")]
    TooLong,
    /// The packet is no specification.
    #[error("read what the host asks for")]
    Parse(#[source] serde_json::Error),
    /// A descriptor is missing, or one too many is there.
    #[error("the packet came with {found} descriptors: due are {due}")]
    Descriptors {
        /// How many came.
        found: usize,
        /// What should have come.
        due: &'static str,
    },
    /// The channel is something else.
    #[error("the descriptor sent as the channel is no connected Unix stream socket")]
    Channel,
    /// Sending failed.
    #[error("send an event")]
    Send(#[source] io::Error),
}

/// A borrowed descriptor, for the trait that sends descriptors along.
struct Socket<'a>(&'a OwnedFd);

impl ScmSocket for Socket<'_> {
    fn socket_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The monitor's end of the control socket.
pub struct Control(OwnedFd);

impl Control {
    /// Takes the socket from standard input.
    ///
    /// # Errors
    /// [`ControlError::NoSocket`] if standard input is no `SOCK_SEQPACKET` socket.
    pub fn from_stdin() -> Result<Self, ControlError> {
        let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(|_| ControlError::NoSocket)?;
        match socket_option(&stdin, libc::SO_TYPE) {
            Some(libc::SOCK_SEQPACKET) => Ok(Self(stdin)),
            _ => Err(ControlError::NoSocket),
        }
    }

    /// Waits for the specification and what comes with it: the channel, unless that is to come later, and the files of a
    /// guest that is to be restored.
    ///
    /// # Errors
    /// The host sent something else, or nothing.
    pub fn receive(
        &self,
    ) -> Result<(VmSpec, Option<UnixStream>, Option<TemplateFiles>), ControlError> {
        let (packet, fds) = self.packet(0)?;
        let spec: VmSpec = serde_json::from_slice(&packet).map_err(ControlError::Parse)?;
        let found = fds.len();
        let mut fds = fds.into_iter();
        let channel = if spec.prepared { None } else { fds.next() };
        let (files, due) = if spec.restore {
            (files(&mut fds)?, "the channel unless `prepared`, the memory, the state and the key")
        } else {
            (None, "the channel unless `prepared`")
        };
        if channel.is_none() != spec.prepared
            || files.is_none() == spec.restore
            || fds.next().is_some()
        {
            return Err(ControlError::Descriptors { found, due });
        }
        Ok((spec, channel.map(stream).transpose()?, files))
    }

    /// Takes a request, if there is one.
    ///
    /// # Errors
    /// [`ControlError::Nothing`] if there is none; the host is gone, or sent something else.
    pub fn command(&self) -> Result<Command, ControlError> {
        let (packet, fds) = self.packet(libc::MSG_DONTWAIT)?;
        let found = fds.len();
        let wrong = |due| ControlError::Descriptors { found, due };
        match serde_json::from_slice(&packet).map_err(ControlError::Parse)? {
            Request::Go {} => {
                let [channel] = exactly(fds).ok_or(wrong("the channel"))?;
                Ok(Command::Go(stream(channel)?))
            }
            Request::Snapshot { binding } => {
                let [memory, state, key] =
                    exactly(fds).ok_or(wrong("the memory, the state and the key"))?;
                let key = Key::read(&mut key.into())?;
                Ok(Command::Snapshot { binding, memory: memory.into(), state: state.into(), key })
            }
            Request::Record {} => {
                let [state, key] = exactly(fds).ok_or(wrong("the state and the key"))?;
                Ok(Command::Record { state: state.into(), key: Key::read(&mut key.into())? })
            }
        }
    }

    /// One packet and its descriptors.
    fn packet(&self, flags: libc::c_int) -> Result<(Vec<u8>, Vec<OwnedFd>), ControlError> {
        // How long it is, without taking it: memory is only touched for what is there.
        // SAFETY: no byte is written to no buffer.
        let length = unsafe {
            let flags = flags | libc::MSG_PEEK | libc::MSG_TRUNC;
            libc::recv(self.0.as_raw_fd(), std::ptr::null_mut(), 0, flags)
        };
        let length = usize::try_from(length).map_err(|_| match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => ControlError::Nothing,
            error => ControlError::Receive(error),
        })?;
        match length {
            0 => return Err(ControlError::Closed),
            length if length > MAX_SPEC_BYTES => return Err(ControlError::TooLong),
            _ => {}
        }
        let mut packet = vec![0; length];
        let mut iovecs =
            [libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() }];
        // One more than is ever due, because those that do not fit are dropped without a word.
        let mut fds: [RawFd; 5] = [-1; 5];
        // SAFETY: the vector covers `packet`, which lives and is not used until the call returns.
        let received = unsafe { Socket(&self.0).recv_with_fds(&mut iovecs, &mut fds) };
        let (bytes, count) = received.map_err(|error| ControlError::Receive(error.into()))?;
        // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
        let fds = fds[..count].iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect();
        packet.truncate(bytes);
        Ok((packet, fds))
    }

    /// Sends one event. A host that is gone, or that does not read, does not hold the monitor up.
    ///
    /// # Errors
    /// The socket is closed or full.
    pub fn send(&self, event: &Message) -> Result<(), ControlError> {
        let packet = serde_json::to_vec(event).map_err(|error| ControlError::Send(error.into()))?;
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: `packet` is readable for its length, and the call keeps no pointer.
        let sent =
            unsafe { libc::send(self.0.as_raw_fd(), packet.as_ptr().cast(), packet.len(), flags) };
        if sent < 0 { Err(ControlError::Send(io::Error::last_os_error())) } else { Ok(()) }
    }
}

impl AsRawFd for Control {
    /// Becomes readable when the host closes its end, or asks for something.
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn exactly<const N: usize>(fds: Vec<OwnedFd>) -> Option<[OwnedFd; N]> {
    fds.try_into().ok()
}

/// The files of a saved guest; `None` if they are not all there.
fn files(fds: &mut impl Iterator<Item = OwnedFd>) -> Result<Option<TemplateFiles>, ControlError> {
    let (Some(memory), Some(state), Some(key)) = (fds.next(), fds.next(), fds.next()) else {
        return Ok(None);
    };
    let key = Key::read(&mut key.into())?;
    Ok(Some(TemplateFiles { memory: memory.into(), state: state.into(), key }))
}

fn stream(fd: OwnedFd) -> Result<UnixStream, ControlError> {
    if is_unix_stream(&fd) { Ok(UnixStream::from(fd)) } else { Err(ControlError::Channel) }
}

fn is_unix_stream(fd: &OwnedFd) -> bool {
    socket_option(fd, libc::SO_DOMAIN) == Some(libc::AF_UNIX)
        && socket_option(fd, libc::SO_TYPE) == Some(libc::SOCK_STREAM)
}

fn socket_option(fd: &OwnedFd, option: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = libc::socklen_t::try_from(size_of_val(&value)).ok()?;
    // SAFETY: `value` is writable for `length` bytes, and neither pointer is kept.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    (result == 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_these_bytes_on_the_wire() {
        let ended = Event::Ended {
            reason: EndReason::Reset,
            detail: None,
            log: "x".into(),
            faults: 0,
            fault: None,
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
            assert!(matches!(
                receive(packet, &fds(&long)[1..]),
                Err(ControlError::Descriptors { .. })
            ));
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
            assert!(
                matches!(receive(SPEC, &fds), Err(ControlError::Descriptors { .. })),
                "{fds:?}"
            );
        }
        for fds in [vec![packets.as_raw_fd()], vec![file.as_raw_fd()]] {
            assert!(matches!(receive(SPEC, &fds), Err(ControlError::Channel)), "{fds:?}");
        }
        assert!(matches!(receive(b"{", &[fd]), Err(ControlError::Parse(_))));
        assert!(matches!(receive(&[b' '; MAX_SPEC_BYTES + 1], &[fd]), Err(ControlError::TooLong)));
        assert!(matches!(
            receive(&[b' '; MAX_SPEC_BYTES + 100], &[fd]),
            Err(ControlError::TooLong)
        ));
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
}
