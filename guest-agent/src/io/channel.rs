//! The byte stream to the host.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ::vsock::VsockStream;
use rustix::event::Timespec;
use rustix::fs::{Mode, OFlags};
use rustix::net::Shutdown;

use super::poll::{EventFlags, Poll, Token};
use super::vsock;
use crate::descriptors::replace_standard_fd;
use crate::error::{Context, SystemError};

/// Both directions of the channel, non-blocking, on descriptors above 2.
pub enum Channel {
    /// The connection of a microVM.
    Vsock(VsockStream),
    /// The descriptors that a container's agent was started with.
    Stdio { input: OwnedFd, output: OwnedFd },
}

impl Channel {
    /// Moves descriptors 0 and 1 away and leaves `/dev/null` in their place.
    pub fn take_stdio() -> Result<Channel, SystemError> {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .context("open", "/dev/null")?;
        let move_away = |standard: BorrowedFd<'static>, number: i32| {
            let moved = rustix::io::fcntl_dupfd_cloexec(standard, 3)
                .context("duplicate descriptor", number)?;
            let flags =
                rustix::fs::fcntl_getfl(&moved).context("read the flags of descriptor", number)?;
            rustix::fs::fcntl_setfl(&moved, flags | OFlags::NONBLOCK)
                .context("set the flags of descriptor", number)?;
            replace_standard_fd(&null, number).context("replace descriptor", number)?;
            Ok(moved)
        };
        let input = move_away(rustix::stdio::stdin(), 0)?;
        let output = move_away(rustix::stdio::stdout(), 1)?;
        Ok(Channel::Stdio { input, output })
    }

    /// Waits for the host's answer if the connection is being made, without a limit if `timeout` is
    /// `None`.
    pub fn await_connection(&self, timeout: Option<Timespec>) -> Result<(), SystemError> {
        match self {
            Channel::Vsock(stream) => vsock::await_connection(stream, timeout),
            Channel::Stdio { .. } => Ok(()),
        }
    }

    /// Returns the descriptor from which the host's bytes are read.
    pub fn input(&self) -> BorrowedFd<'_> {
        match self {
            Channel::Vsock(stream) => stream.as_fd(),
            Channel::Stdio { input, .. } => input.as_fd(),
        }
    }

    /// Returns the descriptor to which bytes for the host are written.
    pub fn output(&self) -> BorrowedFd<'_> {
        match self {
            Channel::Vsock(stream) => stream.as_fd(),
            Channel::Stdio { output, .. } => output.as_fd(),
        }
    }

    /// Registers both directions with epoll, edge-triggered.
    pub fn watch(&self, poll: &Poll) -> Result<(), SystemError> {
        let (readable, writable) =
            (EventFlags::IN | EventFlags::ET, EventFlags::OUT | EventFlags::ET);
        let watched = match self {
            Channel::Vsock(stream) => poll.add(stream, Token::ChannelInput, readable | writable),
            Channel::Stdio { input, output } => poll
                .add(input, Token::ChannelInput, readable)
                .and_then(|()| poll.add(output, Token::ChannelOutput, writable)),
        };
        watched.context("watch", "the channel")
    }

    /// Ends the channel in both directions.
    pub fn shut_down(&self) -> Result<(), SystemError> {
        rustix::net::shutdown(self.input(), Shutdown::Both).context("end", "the channel")
    }
}
