//! Guests that attack the monitor: bare programs of a few hundred instructions that drive its devices directly, with the
//! monitor itself on the other side, as `chitin` starts it.
//!
//! [`program`] writes machine code, [`driver`] drives a virtio device with it, [`attacks`] is the list of what is tried,
//! and [`host`] runs one guest and says what became of it.

pub mod attacks;
pub mod driver;
pub mod host;
pub mod program;

/// What a guest says to the host to find out whether its connection works.
pub const PING: &[u8; 4] = b"ping";
/// What it gets for an answer.
pub const PONG: &[u8; 4] = b"pong";
