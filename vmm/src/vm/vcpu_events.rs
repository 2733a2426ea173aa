//! Events that vCPU threads report to the VMM thread: the guest was entered, a vCPU has ended.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::end::End;
use super::error::MonitorError;
use super::eventfd::create_eventfd;

/// Events of all vCPUs of one guest. Only the first end is kept: later ones are its consequences.
pub struct VcpuEvents {
    event: EventFd,
    /// If set, entering the guest wakes the VMM thread. A restored guest reports its entry later,
    /// with the first event that wakes the VMM thread anyway: its first steps have the processor to
    /// themselves.
    wake_on_entry: bool,
    /// `CLOCK_MONOTONIC` in nanoseconds; 0 until the guest is entered.
    entered_at_ns: AtomicU64,
    end: OnceLock<End>,
}

impl VcpuEvents {
    /// Creates the events of a guest that was not entered yet.
    ///
    /// # Errors
    /// The host refuses an eventfd.
    pub fn new(wake_on_entry: bool) -> Result<Self, MonitorError> {
        let (entered_at_ns, end) = Default::default();
        Ok(Self { event: create_eventfd()?, wake_on_entry, entered_at_ns, end })
    }

    /// Records that the first vCPU is about to enter the guest.
    pub fn record_entry(&self) {
        self.entered_at_ns.store(monotonic_ns(), Ordering::Release);
        if self.wake_on_entry {
            self.wake_vmm_thread();
        }
    }

    /// Records that a vCPU has left the guest permanently, and wakes the VMM thread.
    pub fn record_end(&self, end: End) {
        let _ = self.end.set(end);
        self.wake_vmm_thread();
    }

    /// Returns when the guest was entered, as `CLOCK_MONOTONIC` in nanoseconds.
    pub fn entered_at_ns(&self) -> Option<u64> {
        Some(self.entered_at_ns.load(Ordering::Acquire)).filter(|at_ns| *at_ns != 0)
    }

    /// Returns the first end that a vCPU reported.
    pub fn end(&self) -> Option<&End> {
        self.end.get()
    }

    fn wake_vmm_thread(&self) {
        // A full counter is readable as well.
        let _ = self.event.write(1);
    }
}

impl AsRawFd for VcpuEvents {
    /// Becomes readable when an event was recorded.
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec that the call fills in. libc and not rustix: this runs
    // under the filter of a vCPU, and rustix makes system calls to find the vDSO at its first use.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
