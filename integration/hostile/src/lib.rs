//! Guests that attack the monitor: bare programs of a few hundred instructions that drive its
//! devices directly. The monitor is the real one, started as `chitin` starts it.
//!
//! [`program`] writes machine code, [`driver`] drives a virtio device with it, [`attacks`] is the
//! list of attacks, and [`host`] runs one guest and reports its outcome.

pub mod attacks;
pub mod driver;
pub mod host;
pub mod program;

/// The guest sends this to find out whether its connection works.
pub const PING: &[u8; 4] = b"ping";
/// The host's answer to a [`PING`].
pub const PONG: &[u8; 4] = b"pong";
