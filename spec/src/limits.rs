//! How much of the machine and of the network a sandbox gets.

use std::num::NonZeroU64;
use std::time::Duration;

use chitin_protocol::MAX_DIALS;

/// The most virtual CPUs of a sandbox.
pub const MAX_VCPUS: u32 = 8;

/// The least memory of a sandbox.
pub const MIN_MEMORY_MIB: u32 = 64;

/// The most memory of a sandbox.
pub const MAX_MEMORY_MIB: u32 = 16384;

/// How much of the machine a sandbox gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Time until the sandbox is ended.
    pub timeout: Option<Duration>,
    /// Processes and threads at once.
    pub pids: u32,
    /// What can be written, in MiB; `None`: half of the memory.
    pub disk_mib: Option<u32>,
}

/// How much egress a sandbox has. What is over is refused or reset, and written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressLimits {
    /// Connections at once, at most 128, which is also the agent's limit.
    pub connections: usize,
    /// Connections a second, so that a sandbox cannot be used to flood an endpoint with them; four seconds' worth may come
    /// at once.
    pub dials_per_second: u32,
    /// Bytes of one connection, both ways together.
    pub connection_bytes: Option<u64>,
    /// Bytes of all connections of the sandbox.
    pub total_bytes: Option<u64>,
    /// Bytes a second of all connections of the sandbox.
    pub bytes_per_second: Option<NonZeroU64>,
}

impl Default for EgressLimits {
    fn default() -> EgressLimits {
        EgressLimits {
            connections: MAX_DIALS,
            dials_per_second: 50,
            connection_bytes: None,
            total_bytes: None,
            bytes_per_second: None,
        }
    }
}
