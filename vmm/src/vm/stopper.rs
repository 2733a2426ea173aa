//! A handle that ends a guest from another thread.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::error::MonitorError;
use super::eventfd::create_eventfd;

/// Ends a guest from another thread. Cheap to clone.
#[derive(Clone)]
pub struct Stopper(Arc<EventFd>);

impl Stopper {
    pub(super) fn new() -> Result<Self, MonitorError> {
        Ok(Self(Arc::new(create_eventfd()?)))
    }

    /// Asks the monitor to end its guest; [`Monitor::run`](super::Monitor::run) returns soon after.
    pub fn stop(&self) {
        let _ = self.0.write(1);
    }
}

impl AsRawFd for Stopper {
    /// Becomes readable when the guest is to be ended.
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
