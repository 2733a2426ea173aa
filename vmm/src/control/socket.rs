//! The monitor's end of the control socket.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::message::{Message, Request};
use crate::spec::{MAX_SPEC_BYTES, VmSpec};
use crate::state::{Key, StateError};

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
    /// Its memory, open for reading only.
    pub memory: File,
    /// Everything else.
    pub state: File,
    /// What the state is signed with.
    pub key: Key,
}

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

impl AsFd for Control {
    /// Borrows the socket, which becomes readable when the host closes its end or sends a request.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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
#[path = "control_test.rs"]
mod tests;
