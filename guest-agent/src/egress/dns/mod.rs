//! The resolver of the sandbox, to which `/etc/resolv.conf` of every root image points.

pub mod message;
pub(crate) mod server;
