//! The protocol between a Chitin host and the agent inside a sandbox.
//!
//! One ordered byte stream (vsock for a microVM, a socket or standard I/O for a container) carries
//! control messages and any number of flow-controlled streams. This crate holds the message types,
//! the framing and the multiplexer, and does no I/O: both sides feed bytes in and take bytes out.
//! The same state machine therefore serves tokio on the host and a plain poll loop in PID 1, and a
//! test drives both ends in memory.
//!
//! Either side may be hostile to the other. Every length is checked before anything is allocated,
//! and every violation of the protocol is a [`Fault`], which ends that one sandbox.
//!
//! `docs/protocol.md` is the specification for an agent in another language.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "test data is small"))]

mod connection;
mod fault;
mod frame;
mod message;

pub use connection::{Connection, Direction, Event, Guest, Host, Role, TooLarge};
pub use fault::{Fault, Unexpected};
pub use frame::{HEADER_LEN, MAX_CONTROL, MAX_DATA};
pub use message::{
    Confine, Delivery, Endpoint, Exit, Failure, FileRule, MAX_ENDPOINTS, MAX_SECRET, MIN_ENTROPY,
    ReachedLimits, Reseed, Secret, SecretBytes, Start, StartError, SystemCalls, ToGuest, ToHost,
    Usage,
};

/// The protocol version of this crate. Both sides use the lower of the two versions in the hellos.
pub const VERSION: u32 = 1;

/// The vsock port on which the host accepts the agent's connection. CID 2 is the host (`vsock(7)`).
pub const VSOCK_PORT: u32 = 1024;

/// The initial window of a stream in bytes: the limit on data sent and not yet consumed.
///
/// It is large enough to keep a 64 KiB pipe busy on both ends over a round trip of milliseconds.
pub const WINDOW: u32 = 256 * 1024;

/// The maximum number of open streams that the host opened.
///
/// With [`WINDOW`], it bounds the data that a peer can make the other side hold: 64 MiB. The
/// streams of each side are counted separately, because both sides could open the last stream of a
/// shared limit at the same time.
pub const MAX_STREAMS: usize = 256;

/// The maximum number of open streams that the agent opened.
///
/// Each is a connection of the workload. The limit is twice what a browser or a package manager
/// opens, and amounts to 32 MiB of windows.
pub const MAX_DIALS: usize = 128;

/// The id of a stream, unique within a connection. The host opens even ids, the agent odd ids.
pub type StreamId = u32;

/// The id of a process, chosen by the host. It is not a pid, and it is never reused.
pub type ProcessId = u32;

/// The id of a request, chosen by the host and repeated in the answer.
pub type RequestId = u32;
