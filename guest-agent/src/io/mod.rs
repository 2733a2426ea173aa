//! Bytes between the channel and the pipes and sockets of the sandbox.

pub mod channel;
pub mod pump;
pub mod socket_pump;
pub mod splicer;
