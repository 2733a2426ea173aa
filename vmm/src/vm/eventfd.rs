//! Eventfds of the monitor: never blocking, closed on exec.

use vmm_sys_util::eventfd::EventFd;

use super::error::MonitorError;

/// Creates an eventfd.
pub(super) fn create_eventfd() -> Result<EventFd, MonitorError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(MonitorError::host("create an eventfd"))
}
