//! The epoll instance, and the tokens that say which source an event belongs to.

use std::os::fd::{AsFd, OwnedFd};

use chitin_protocol::StreamId;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData};
use rustix::io::Errno;

pub use rustix::event::epoll::EventFlags;

use crate::error::{Context, SystemError};

/// Events taken from epoll in one turn. More wait for the next turn.
const MAX_EVENTS: usize = 32;

/// The source of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// The channel, or its input in a container.
    ChannelInput,
    /// The output of a container's channel.
    ChannelOutput,
    Signals,
    /// A copy job has finished.
    CopyJobs,
    /// The pump of a stream.
    Pump(StreamId),
    /// The resolver's UDP socket.
    DnsUdp,
    /// The resolver's TCP listener.
    DnsTcp,
    /// A TCP client of the resolver, by a number of 56 bits.
    DnsClient(u64),
    /// The listener on a port that the policy allows.
    Port(u16),
}

impl Token {
    /// The kind in the lowest byte, its value above.
    fn encode(self) -> u64 {
        let (kind, value) = match self {
            Token::ChannelInput => (0, 0),
            Token::ChannelOutput => (1, 0),
            Token::Signals => (2, 0),
            Token::CopyJobs => (3, 0),
            Token::Pump(stream) => (4, stream.into()),
            Token::DnsUdp => (5, 0),
            Token::DnsTcp => (6, 0),
            Token::DnsClient(client) => (7, client),
            Token::Port(port) => (8, port.into()),
        };
        value << 8 | kind
    }

    fn decode(data: u64) -> Option<Token> {
        let value = data >> 8;
        Some(match data & 0xff {
            0 => Token::ChannelInput,
            1 => Token::ChannelOutput,
            2 => Token::Signals,
            3 => Token::CopyJobs,
            4 => Token::Pump(StreamId::try_from(value).ok()?),
            5 => Token::DnsUdp,
            6 => Token::DnsTcp,
            7 => Token::DnsClient(value),
            8 => Token::Port(u16::try_from(value).ok()?),
            _ => return None,
        })
    }
}

/// Room for the events of one turn.
pub struct Events(Vec<epoll::Event>);

impl Events {
    pub fn new() -> Events {
        Events(Vec::with_capacity(MAX_EVENTS))
    }

    pub fn iter(&self) -> impl Iterator<Item = (Token, EventFlags)> {
        self.0.iter().filter_map(|event| Some((Token::decode(event.data.u64())?, event.flags)))
    }
}

/// An epoll instance.
pub struct Poll(OwnedFd);

impl Poll {
    pub fn new() -> Result<Poll, SystemError> {
        epoll::create(epoll::CreateFlags::CLOEXEC).context("create", "an epoll").map(Poll)
    }

    /// Watches `fd` until it is closed.
    pub fn add(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> Result<(), Errno> {
        epoll::add(&self.0, fd, EventData::new_u64(token.encode()), flags)
    }

    /// Collects events, and waits for the first one if `may_block`. A signal ends the wait early.
    pub fn wait(&self, events: &mut Events, may_block: bool) -> Result<(), SystemError> {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = if may_block { None } else { Some(&now) };
        events.0.clear();
        match epoll::wait(&self.0, rustix::buffer::spare_capacity(&mut events.0), timeout) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno).context("wait for", "events"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_survives_encoding() {
        for token in [
            Token::ChannelInput,
            Token::ChannelOutput,
            Token::Signals,
            Token::CopyJobs,
            Token::Pump(0),
            Token::Pump(u32::MAX),
            Token::DnsUdp,
            Token::DnsTcp,
            Token::DnsClient((1 << 56) - 1),
            Token::Port(u16::MAX),
        ] {
            assert_eq!(Token::decode(token.encode()), Some(token));
        }
        assert_eq!(Token::decode(0xff), None);
    }
}
