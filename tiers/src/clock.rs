//! The clock that moments of a sandbox are measured by.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC`, the clock the monitor uses too, in nanoseconds.
pub fn now_ns() -> u64 {
    // The clock starts with the machine and a Duration of u64 nanoseconds lasts 584 years.
    Duration::try_from(clock_gettime(ClockId::Monotonic))
        .map_or(0, |since_boot| u64::try_from(since_boot.as_nanos()).unwrap_or(u64::MAX))
}
