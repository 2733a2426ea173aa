//! The monitor's end of the control socket.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketType,
    recv, recvmsg, send,
};

use super::failure::FailureCode;
use super::message::{Event, Request};
use crate::spec::{MAX_SPEC_BYTES, VmSpec};
use crate::state::{Key, StateError};

/// The most descriptors taken from one packet: one more than any packet may have, because
/// descriptors that do not fit are dropped silently.
const MAX_FDS: usize = 5;

/// A specification with its descriptors.
#[derive(Debug)]
pub struct ReceivedSpec {
    /// The specification.
    pub spec: VmSpec,
    /// The channel, unless the guest is prepared and gets it later.
    pub channel: Option<UnixStream>,
    /// The files of a guest to be restored.
    pub template: Option<TemplateFiles>,
}

/// A request with its descriptors.
#[derive(Debug)]
pub enum Command {
    /// Run the prepared guest, with this channel.
    Go(UnixStream),
    /// Save the guest.
    Snapshot {
        /// The identity of the files that belong to the guest.
        binding: String,
        /// The memory file, to be written.
        memory: File,
        /// The state file, to be written.
        state: File,
        /// The key to authenticate the state with.
        key: Key,
    },
    /// Write the pages that the guest has used.
    Record {
        /// The state file, to be written.
        state: File,
        /// The key to authenticate the state with.
        key: Key,
    },
}

impl Command {
    /// Returns the name of the request.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Go(_) => "go",
            Self::Snapshot { .. } => "snapshot",
            Self::Record { .. } => "record",
        }
    }
}

/// The files of a saved guest.
#[derive(Debug)]
pub struct TemplateFiles {
    /// The memory, open for reading only.
    pub memory: File,
    /// The state: everything else.
    pub state: File,
    /// The key that the state is authenticated with.
    pub key: Key,
}

/// The control socket cannot be used, or the host has broken its protocol.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum ControlError {
    /// Standard input is not a control socket.
    #[error(
        "standard input is not a control socket: give the path of a specification, or let \
         `chitin run` start the monitor"
    )]
    NotASocket,
    /// Receiving failed.
    #[error("receive from the control socket")]
    Receive(#[source] io::Error),
    /// The host has closed its end.
    #[error("the host closed the control socket before it sent a specification")]
    Closed,
    /// No request is waiting.
    #[error("no request is waiting")]
    WouldBlock,
    /// The key of a template is missing.
    #[error(transparent)]
    Key(#[from] StateError),
    /// The packet is too large.
    #[error("a packet has more than {MAX_SPEC_BYTES} bytes")]
    TooLong,
    /// The packet is not a specification or request.
    #[error("parse a packet of the control socket")]
    Parse(#[source] serde_json::Error),
    /// The packet does not have the descriptors that belong to it.
    #[error("a packet has {found} descriptors, but it needs {needed}")]
    Descriptors { found: usize, needed: &'static str },
    /// The descriptor of the channel is something else.
    #[error("the descriptor sent as the channel is not a connected Unix stream socket")]
    NotAChannel,
    /// Sending failed.
    #[error("send an event")]
    Send(#[source] io::Error),
}

impl ControlError {
    /// Classifies the error for programs.
    pub fn code(&self) -> FailureCode {
        match self {
            Self::Key(_) => FailureCode::Template,
            Self::NotASocket
            | Self::Receive(_)
            | Self::Closed
            | Self::WouldBlock
            | Self::TooLong
            | Self::Parse(_)
            | Self::Descriptors { .. }
            | Self::NotAChannel
            | Self::Send(_) => FailureCode::Control,
        }
    }
}

/// The monitor's end of the control socket.
pub struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// Takes the socket from standard input.
    ///
    /// # Errors
    /// [`ControlError::NotASocket`] if standard input is not a `SOCK_SEQPACKET` socket.
    pub fn from_stdin() -> Result<Self, ControlError> {
        let stdin =
            io::stdin().as_fd().try_clone_to_owned().map_err(|_| ControlError::NotASocket)?;
        Self::new(stdin)
    }

    /// Uses a socket.
    ///
    /// # Errors
    /// [`ControlError::NotASocket`] if it is not a `SOCK_SEQPACKET` socket.
    pub fn new(socket: OwnedFd) -> Result<Self, ControlError> {
        match socket_type(&socket) {
            Ok(SocketType::SEQPACKET) => Ok(Self(socket)),
            _ => Err(ControlError::NotASocket),
        }
    }

    /// Waits for the specification and its descriptors: the channel, unless the guest is prepared,
    /// and the files of a guest to be restored.
    ///
    /// # Errors
    /// The host has closed the socket, or the packet is invalid.
    pub fn receive_spec(&self) -> Result<ReceivedSpec, ControlError> {
        let (packet, fds) = self.receive_packet(RecvFlags::empty())?;
        let spec: VmSpec = serde_json::from_slice(&packet).map_err(ControlError::Parse)?;
        let found = fds.len();
        let mut fds = fds.into_iter();
        let channel = if spec.prepared { None } else { fds.next() };
        let (template, needed) = if spec.restore {
            let files = take_template_files(&mut fds)?;
            (files, "the channel unless `prepared`, the memory, the state and the key")
        } else {
            (None, "the channel unless `prepared`")
        };
        if channel.is_none() != spec.prepared
            || template.is_none() == spec.restore
            || fds.next().is_some()
        {
            return Err(ControlError::Descriptors { found, needed });
        }
        Ok(ReceivedSpec { spec, channel: channel.map(check_channel).transpose()?, template })
    }

    /// Takes a request without waiting for one.
    ///
    /// # Errors
    /// [`ControlError::WouldBlock`] if no request is waiting; the host has closed the socket, or
    /// the packet is invalid.
    pub fn try_receive_command(&self) -> Result<Command, ControlError> {
        let (packet, fds) = self.receive_packet(RecvFlags::DONTWAIT)?;
        let found = fds.len();
        let wrong = |needed| ControlError::Descriptors { found, needed };
        match serde_json::from_slice(&packet).map_err(ControlError::Parse)? {
            Request::Go {} => {
                let [channel] = exactly(fds).ok_or(wrong("the channel"))?;
                Ok(Command::Go(check_channel(channel)?))
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

    /// Receives one packet and its descriptors.
    fn receive_packet(&self, flags: RecvFlags) -> Result<(Vec<u8>, Vec<OwnedFd>), ControlError> {
        let received = |errno| match errno {
            Errno::WOULDBLOCK => ControlError::WouldBlock,
            errno => ControlError::Receive(errno.into()),
        };
        // The length is asked for first, so that no more memory is touched than the packet needs.
        let peek = flags | RecvFlags::PEEK | RecvFlags::TRUNC;
        let (_, length) = recv(&self.0, &mut [0; 0], peek).map_err(received)?;
        match length {
            0 => return Err(ControlError::Closed),
            length if length > MAX_SPEC_BYTES => return Err(ControlError::TooLong),
            _ => {}
        }
        let mut packet = vec![0; length];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut iovecs = [IoSliceMut::new(&mut packet)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let bytes = recvmsg(&self.0, &mut iovecs, &mut ancillary, flags).map_err(received)?.bytes;
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        packet.truncate(bytes);
        Ok((packet, fds))
    }

    /// Sends one event. A host that is gone or does not read does not hold the monitor up.
    ///
    /// # Errors
    /// The socket is closed or full.
    pub fn send(&self, event: &Event) -> Result<(), ControlError> {
        let packet = serde_json::to_vec(event).map_err(|error| ControlError::Send(error.into()))?;
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        send(&self.0, &packet, flags).map_err(|errno| ControlError::Send(errno.into()))?;
        Ok(())
    }
}

impl AsFd for ControlSocket {
    /// Borrows the socket, which becomes readable when the host closes its end or sends a request.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for ControlSocket {
    /// Becomes readable when the host closes its end or sends a request.
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn exactly<const N: usize>(fds: Vec<OwnedFd>) -> Option<[OwnedFd; N]> {
    fds.try_into().ok()
}

/// Takes the files of a saved guest; `None` if there are too few descriptors.
fn take_template_files(
    fds: &mut impl Iterator<Item = OwnedFd>,
) -> Result<Option<TemplateFiles>, ControlError> {
    let (Some(memory), Some(state), Some(key)) = (fds.next(), fds.next(), fds.next()) else {
        return Ok(None);
    };
    let key = Key::read(&mut key.into())?;
    Ok(Some(TemplateFiles { memory: memory.into(), state: state.into(), key }))
}

fn check_channel(fd: OwnedFd) -> Result<UnixStream, ControlError> {
    let is_unix = socket_domain(&fd) == Ok(AddressFamily::UNIX);
    if is_unix && socket_type(&fd) == Ok(SocketType::STREAM) {
        Ok(UnixStream::from(fd))
    } else {
        Err(ControlError::NotAChannel)
    }
}

#[cfg(test)]
#[path = "socket_test.rs"]
mod tests;
