//! The share of the machine and of the network that a sandbox gets.

use std::num::NonZeroU64;
use std::time::Duration;

use chitin_protocol::MAX_DIALS;

/// The most virtual CPUs of a sandbox.
pub const MAX_VCPUS: u32 = 8;

/// The least memory of a sandbox.
pub const MIN_MEMORY_MIB: u32 = 64;

/// The most memory of a sandbox.
pub const MAX_MEMORY_MIB: u32 = 16384;

/// The share of the machine that a sandbox gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Time after which the sandbox is ended.
    pub timeout: Option<Duration>,
    /// Maximum number of processes and threads.
    pub pids: u32,
    /// Maximum size of all written files, in MiB. `None` means half of the memory.
    pub disk_mib: Option<u32>,
}

/// The limits on a sandbox's egress. Excess is refused or reset, and written to the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressLimits {
    /// Maximum concurrent connections (1–128, default 128; the agent has the same limit).
    pub connections: usize,
    /// Maximum new connections a second, so that a sandbox cannot flood an endpoint with them.
    /// Four seconds' worth may arrive at once.
    pub dials_per_second: u32,
    /// Maximum bytes of one connection, both directions together.
    pub connection_bytes: Option<u64>,
    /// Maximum bytes of all connections of the sandbox.
    pub total_bytes: Option<u64>,
    /// Maximum bytes a second of all connections of the sandbox.
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
