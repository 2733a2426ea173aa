//! The channel's language: what a Chitin host and the agent inside a sandbox say to each other.
//!
//! One ordered byte stream (vsock for a microVM, stdio for a container) carries control messages and any
//! number of flow-controlled streams. This crate holds the types, the framing and the multiplexer and does
//! no I/O: both sides feed bytes in and take bytes out, so the same state machine serves tokio on the host
//! and a plain poll loop in PID 1, and a test drives both ends in memory.
//!
//! Either side may be hostile to the other. Every length is checked before anything is allocated, and
//! whatever breaks the rules is a [`Fault`], which ends that one sandbox.
//!
//! `docs/protocol.md` describes the same thing for an agent in another language.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "test data is small"))]

mod connection;
mod fault;
mod frame;
mod message;

pub use connection::{Connection, Direction, Event, Guest, Host, Role, TooLarge};
pub use fault::Fault;
pub use frame::{HEADER_LEN, MAX_CONTROL, MAX_DATA};
pub use message::{
    Confine, Delivery, Endpoint, Exit, Failure, FileRule, MAX_ENDPOINTS, MAX_SECRET, MIN_ENTROPY,
    Reseed, Secret, SecretBytes, Start, StartError, SystemCalls, ToGuest, ToHost, Usage,
};

/// The protocol version this crate speaks. Of two hellos the lower version wins.
pub const VERSION: u32 = 1;

/// The vsock port on which the host takes the agent's one connection (CID 2 is the host, `vsock(7)`).
pub const VSOCK_PORT: u32 = 1024;

/// How many bytes one side may send on a stream before the other has read any of them.
///
/// Large enough to keep a 64 KiB pipe busy on both ends over a round trip of milliseconds.
pub const WINDOW: u32 = 256 * 1024;

/// How many of the host's streams may be open at once. Together with [`WINDOW`] it bounds what a peer can make the other
/// side hold: 64 MiB. Each side's streams are counted on their own: of a common limit both could take the last one at once.
pub const MAX_STREAMS: usize = 256;

/// How many of the agent's streams may be open at once, each a connection of the workload: twice what a browser or a
/// package manager opens, and 32 MiB of windows.
pub const MAX_DIALS: usize = 128;

/// The id of a stream, unique for the life of a connection. Even ids are opened by the host, odd ids by the guest.
pub type StreamId = u32;
