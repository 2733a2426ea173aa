//! Virtio devices, in two halves.
//!
//! [`VirtioDevice`] is the half that a driver negotiates with: identity, features, configuration.
//! When the driver has set `DRIVER_OK`, [`VirtioDevice::activate`] makes the other half, a
//! [`QueueHandler`], which owns the queues and runs on the VMM thread. A device that is not
//! initialized has no handler, so no method has to check for it. A reset drops the handler.
//!
//! ```text
//!   vCPU thread                                       VMM thread
//!   MmioTransport ── activate ──▶ QueueHandler ─────▶ on_kick, on_source
//!        │                             │
//!   VirtioDevice                  ActiveQueue ── drain ──▶ Chain ──▶ Buffers, in guest memory
//! ```
//!
//! Source: Virtual I/O Device (VIRTIO) 1.2.

pub mod chain;
pub mod fault;
pub mod mmio;
pub mod pmem;
pub mod queue;
#[cfg(test)]
pub(crate) mod test_driver;
pub mod vsock;

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::state::machine::ConnectionRequest;
pub use fault::{FaultCounter, GuestFault, PacketFault};
use queue::{ActiveQueue, QueuePosition};

/// Features of the transport and of the queues that every device offers: the modern interface, and
/// notifications suppressed by index. There are no others. Indirect descriptors in particular would
/// be one more table that a guest can get wrong.
pub const COMMON_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;

/// The negotiation half of a device. Called with the transport's lock held, by the vCPU that
/// accesses the registers.
pub trait VirtioDevice: Send {
    /// Returns the device ID (VIRTIO 1.2, chapter 5).
    fn kind(&self) -> u32;

    /// Returns the features offered in addition to [`COMMON_FEATURES`].
    fn features(&self) -> u64;

    /// Returns the largest size of each queue, each a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Returns the queue whose notifications KVM delivers without leaving the kernel, because they
    /// are frequent. Each such arrangement adds to the time it takes to create a microVM; other
    /// notifications arrive as register writes.
    fn busy_queue(&self) -> Option<u16> {
        None
    }

    /// Returns the configuration space, which is read-only.
    fn config(&self) -> &[u8];

    /// Makes the running half. Called when the driver has set `DRIVER_OK`, with one validated queue
    /// for each of [`queue_sizes`](Self::queue_sizes). After a reset it may be called again; the
    /// earlier handler has been dropped then.
    fn activate(&mut self, activation: Activation) -> Box<dyn QueueHandler>;
}

/// The result of a negotiation between a driver and a device.
pub struct Activation {
    /// The features that the driver accepted.
    pub features: u64,
    /// The queues, in order.
    pub queues: Vec<ActiveQueue>,
    /// The connection that the guest had requested when it was saved; `None` unless the guest is
    /// restored.
    pub request: Option<ConnectionRequest>,
    /// The counter for faults that leave the queues usable.
    pub faults: Arc<FaultCounter>,
}

/// The running half of a device. The VMM thread owns it and calls it when one of its descriptors is
/// ready. No method may block.
pub trait QueueHandler: Send {
    /// Returns the descriptors to watch in addition to the queues. They are watched edge-triggered
    /// for input and hang-up, and for output while [blocked](Self::is_blocked).
    /// [`on_source`](Self::on_source) gets their index.
    fn sources(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// Returns whether a source has refused output. Only then is it watched for output: otherwise
    /// the VMM thread would wake up each time the reader at the other end has read.
    fn is_blocked(&self) -> bool {
        false
    }

    /// Handles a notification by the driver, or by a queue that asked to be called again. The
    /// notification does not name the queue: looking into an empty queue is cheaper than a
    /// descriptor for each queue.
    ///
    /// # Errors
    /// A fault after which the queues cannot be used. The transport sets `DEVICE_NEEDS_RESET` and
    /// does not call again.
    fn on_kick(&mut self) -> Result<Flow, GuestFault>;

    /// Handles the readiness of one of the [`sources`](Self::sources).
    ///
    /// # Errors
    /// As for [`on_kick`](Self::on_kick).
    fn on_source(&mut self, _source: usize, _ready: Ready) -> Result<Flow, GuestFault> {
        Ok(Flow::Continue)
    }

    /// Returns whether all output of the guest has been delivered. Asked after the guest has ended,
    /// when its last output may still be buffered.
    fn is_drained(&self) -> bool {
        true
    }

    /// Returns the state to save, of a guest whose vCPUs are stopped. Anything else that the
    /// handler holds is lost.
    ///
    /// # Errors
    /// The handler holds something that cannot be saved.
    fn save(&self) -> Result<HandlerState, NotQuiescent>;

    /// Returns whether the device works again after a reset. If it does not, a fault ends the
    /// guest.
    fn survives_reset(&self) -> bool {
        true
    }
}

/// The state of a running half that is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HandlerState {
    /// The position of each queue.
    pub positions: Vec<QueuePosition>,
    /// A connection that the guest has requested and that has not been answered.
    pub request: Option<ConnectionRequest>,
}

/// The reason why a guest cannot be saved now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotQuiescent {
    /// A device needs a reset, or its driver has given up.
    #[error("the guest cannot be saved: a device has failed")]
    DeviceFailed,
    /// A driver is starting or resetting its device.
    #[error("the guest cannot be saved: a device is being started or reset")]
    DeviceChanging,
    /// The connection to the channel is open, or its last bytes have not been delivered.
    #[error("the guest cannot be saved: it has not closed its connection")]
    ConnectionOpen,
    /// The guest has closed its connection and not requested another one.
    #[error("the guest cannot be saved: it has not requested a new connection")]
    NoRequest,
    /// Replies wait for the guest to provide receive buffers.
    #[error("the guest cannot be saved: it has not received all replies")]
    PendingReplies,
    /// The transmit queue is not empty.
    #[error("the guest cannot be saved: it has sent packets that were not handled")]
    PendingPackets,
    /// The guest has ended.
    #[error("the guest cannot be saved: it has ended")]
    GuestEnded,
}

/// The consequence of a handler's work for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The guest goes on.
    Continue,
    /// The guest goes on, and waits for a connection that it only gets after it was saved and
    /// restored.
    AwaitSnapshot,
    /// The guest is to be stopped.
    Stop(StopReason),
}

/// The reason why a device stops the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopReason {
    /// The host's end of the channel is closed, so the guest has no purpose.
    #[error("the host closed the channel")]
    ChannelClosed,
}

/// The readiness of a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// There is input, or the end of it.
    pub readable: bool,
    /// A write does not block.
    pub writable: bool,
    /// The other end is closed.
    pub hung_up: bool,
}

/// The cause of an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// A queue has used buffers.
    Queue,
    /// The configuration or the device's status has changed.
    Config,
}

/// The interrupt line from a device to its driver.
pub trait Interrupt: Send + Sync {
    /// Raises the interrupt.
    fn trigger(&self, signal: Signal);
}
