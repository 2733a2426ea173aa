//! Eventfds of the monitor: never blocking, closed on exec.

use vmm_sys_util::eventfd::EventFd;

use super::error::MonitorError;
use crate::HostError;

/// Creates an eventfd.
pub(super) fn create_eventfd() -> Result<EventFd, MonitorError> {
    let created = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
    Ok(created.map_err(HostError::during("create an eventfd"))?)
}
