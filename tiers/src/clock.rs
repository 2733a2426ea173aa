//! The clock of all moments of a sandbox.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Returns `CLOCK_MONOTONIC` in nanoseconds. The monitor uses the same clock.
pub fn monotonic_ns() -> u64 {
    // The clock starts with the machine, and u64 nanoseconds last 584 years.
    Duration::try_from(clock_gettime(ClockId::Monotonic))
        .map_or(0, |since_boot| u64::try_from(since_boot.as_nanos()).unwrap_or(u64::MAX))
}
