//! Moves bytes between the channel to the host and the pipes and sockets of the sandbox.
//!
//! ```text
//!   channel ◀──▶ connection ◀──▶ pumps ◀──▶ pipes of processes and copy jobs, TCP sockets
//!       ▲                          │
//!       └────── splicer ◀──────────┘  (large output, as pages)
//! ```

pub mod channel;
pub mod pipe_pump;
pub mod poll;
pub mod pump;
pub mod socket_pump;
pub mod splicer;
pub mod transport;
pub mod vsock;
