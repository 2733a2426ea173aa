//! Requests of vCPU threads to the VMM thread: a driver has enabled or reset a device.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};

use vmm_sys_util::eventfd::EventFd;

use super::error::MonitorError;
use super::eventfd::create_eventfd;
use crate::virtio::QueueHandler;
use crate::virtio::mmio::Worker;

/// A request of a vCPU thread.
pub(super) enum DeviceRequest {
    /// Serve the queues of a device, whose notifications arrive at `kick`.
    Start { device: usize, handler: Box<dyn QueueHandler>, kick: Arc<EventFd> },
    /// Serve the device no longer, and say when it is done.
    Stop { device: usize, done: SyncSender<()> },
    /// Make a system call that the filter forbids.
    #[cfg(feature = "seccomp-tests")]
    ForbiddenCall(u8),
}

/// The VMM thread's end of the requests.
pub(super) struct DeviceRequests {
    /// `None` once requests are no longer taken.
    receiver: RefCell<Option<Receiver<DeviceRequest>>>,
    sender: RequestSender,
}

impl DeviceRequests {
    /// Creates a queue of requests.
    pub fn new() -> Result<Self, MonitorError> {
        let (sender, receiver) = mpsc::channel();
        let event = Arc::new(create_eventfd()?);
        Ok(Self {
            receiver: RefCell::new(Some(receiver)),
            sender: RequestSender { requests: sender, event },
        })
    }

    /// Returns a sender for a vCPU thread.
    pub fn sender(&self) -> RequestSender {
        self.sender.clone()
    }

    /// Takes the next request.
    pub fn try_next(&self) -> Option<DeviceRequest> {
        self.receiver.borrow().as_ref()?.try_recv().ok()
    }

    /// Drops all requests, now and later. A vCPU that waits for an answer stops waiting.
    pub fn close(&self) {
        self.receiver.take();
    }
}

impl AsRawFd for DeviceRequests {
    /// Becomes readable when a request was sent.
    fn as_raw_fd(&self) -> RawFd {
        self.sender.event.as_raw_fd()
    }
}

/// A vCPU thread's end of the requests.
#[derive(Clone)]
pub(super) struct RequestSender {
    requests: Sender<DeviceRequest>,
    event: Arc<EventFd>,
}

impl RequestSender {
    /// Sends a request. It is dropped if the guest is being ended: then no device is served either.
    pub fn send(&self, request: DeviceRequest) {
        if self.requests.send(request).is_ok() {
            let _ = self.event.write(1);
        }
    }
}

/// The VMM thread, as one device's transport sees it.
pub(super) struct WorkerHandle {
    pub device: usize,
    pub sender: RequestSender,
}

impl Worker for WorkerHandle {
    fn start(&self, handler: Box<dyn QueueHandler>, kick: Arc<EventFd>) {
        self.sender.send(DeviceRequest::Start { device: self.device, handler, kick });
    }

    fn stop(&self) {
        let (done, wait) = mpsc::sync_channel(1);
        self.sender.send(DeviceRequest::Stop { device: self.device, done });
        // An error means that the request was dropped because the guest is being ended.
        let _ = wait.recv();
    }
}
