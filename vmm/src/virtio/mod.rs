//! Virtio devices, in two halves.
//!
//! [`VirtioDevice`] is what a driver negotiates with: identity, features, configuration. When the driver is done,
//! [`VirtioDevice::activate`] turns what was agreed into a [`QueueHandler`], which runs on the VMM thread and owns the
//! queues. A device that is not initialized has no handler, so that "not initialized" cannot be got wrong; a reset drops
//! the handler.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.2.

pub mod mmio;
pub mod pmem;
pub mod queue;
pub mod vsock;

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::state::machine::ConnectionRequest;
use queue::{ActiveQueue, Position};

/// Features of the transport and of queues that every device of ours offers: the modern interface, and notifications
/// suppressed by index. Nothing else; indirect descriptors in particular are one more table for a guest to lie about.
pub const COMMON_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;

/// The negotiation half of a device. Called with the transport's lock held, on whichever vCPU touches the registers.
pub trait VirtioDevice: Send {
    /// The device type number (VIRTIO 1.2, chapter 5).
    fn kind(&self) -> u32;
    /// Features offered, beside [`COMMON_FEATURES`].
    fn features(&self) -> u64;
    /// The largest size of each queue, each a power of two.
    fn queue_sizes(&self) -> &[u16];
    /// The queue whose notifications KVM delivers without leaving the kernel, because they are frequent. Each such
    /// arrangement is part of the cost of making a microVM; the others arrive as register writes.
    fn busy_queue(&self) -> Option<u16> {
        None
    }
    /// The configuration space, which no driver of ours writes to.
    fn config(&self) -> &[u8];
    /// Makes the running half. Called when the driver has set `DRIVER_OK`, with queues that have been checked, one for each
    /// of [`queue_sizes`](Self::queue_sizes); may be called again after a reset, when the earlier handler has been dropped.
    fn activate(&mut self, activation: Activation) -> Box<dyn QueueHandler>;
}

/// What a driver and a device have agreed on.
pub struct Activation {
    /// The features that the driver accepted.
    pub features: u64,
    /// The queues, in order.
    pub queues: Vec<ActiveQueue>,
    /// The connection that a guest has asked for before it was saved: there only when one is restored.
    pub request: Option<ConnectionRequest>,
    /// Where to count what the guest gets wrong without harm.
    pub faults: Arc<FaultCounter>,
}

/// The running half of a device: owned by the VMM thread, which calls it when one of its descriptors is ready. No method
/// may block.
pub trait QueueHandler: Send {
    /// Descriptors to watch, beside the queues: edge-triggered, for input and hang-up, and for output while
    /// [blocked](Self::is_blocked). [`on_source`](Self::on_source) gets their index.
    fn sources(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// Whether a source has not taken all that it was to take. Otherwise nobody needs to hear each time its reader has read.
    fn is_blocked(&self) -> bool {
        false
    }

    /// The driver has notified a queue, or a queue asked to be called again. Which one is not said: looking into a queue
    /// that has nothing is cheaper than a descriptor for each.
    ///
    /// # Errors
    /// A fault after which the queues cannot be used: the transport tells the driver so and calls no more.
    fn on_kick(&mut self) -> Result<Flow, GuestFault>;

    /// A descriptor of [`sources`](Self::sources) has become ready.
    ///
    /// # Errors
    /// As for [`on_kick`](Self::on_kick).
    fn on_source(&mut self, _source: usize, _ready: Ready) -> Result<Flow, GuestFault> {
        Ok(Flow::Continue)
    }

    /// Whether everything the guest has handed over has been delivered. Asked after the guest's end, when what it last
    /// said is still on its way.
    fn is_drained(&self) -> bool {
        true
    }

    /// Where the queues stand, and a connection that waits, of a guest whose vCPUs stand still. Whatever else the handler
    /// holds would be lost with it.
    ///
    /// # Errors
    /// There is something else.
    fn save(&self) -> Result<(Vec<Position>, Option<ConnectionRequest>), NotQuiescent>;

    /// Whether a driver that resets the device gets a working one again. If not, a fault ends the guest.
    fn survives_reset(&self) -> bool {
        true
    }
}

/// A device in the middle of something, which cannot be saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not quiescent: {0}")]
pub struct NotQuiescent(pub &'static str);

/// Whether the guest goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It does.
    Continue,
    /// It does, and has asked for a connection that it only gets after it was saved and restored.
    Waiting,
    /// It has lost its purpose; the words say why.
    Stop(&'static str),
}

/// How a descriptor is ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// There is something to read, or its end.
    pub readable: bool,
    /// Writing does not block.
    pub writable: bool,
    /// The other end is gone.
    pub hung_up: bool,
}

/// What an interrupt tells the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// A queue has used buffers.
    Queue,
    /// The configuration, or the device's status, has changed.
    Config,
}

/// A device's line to its driver.
pub trait Interrupt: Send + Sync {
    /// Raises it.
    fn trigger(&self, signal: Signal);
}

/// Something a guest did that the specification forbids. Never our fault, and never a reason to panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuestFault {
    /// A register that does not exist, or not with this size or alignment.
    #[error("access of {bytes} bytes to virtio register {offset:#x}")]
    Register {
        /// From the start of the device.
        offset: u64,
        /// The size of the access.
        bytes: usize,
    },
    /// A register written when the device's status forbids it.
    #[error("virtio register {offset:#x} written in status {status:#x}")]
    OutOfOrder {
        /// From the start of the device.
        offset: u64,
        /// The status register.
        status: u32,
    },
    /// A status that does not follow from the one before.
    #[error("virtio status {to:#x} written after {from:#x}")]
    Status {
        /// Before.
        from: u32,
        /// Written.
        to: u32,
    },
    /// `DRIVER_OK` with a queue that is not ready or not in guest memory.
    #[error("queue {queue} enabled without usable rings")]
    Rings {
        /// Its number.
        queue: u16,
    },
    /// A notification of a queue that does not exist.
    #[error("queue {queue} notified, which does not exist")]
    Notify {
        /// What was written.
        queue: u32,
    },
    /// The available index is further ahead than the queue is long, or the ring is not in memory.
    #[error("queue {queue}: available ring broken")]
    AvailableRing {
        /// Its number.
        queue: u16,
    },
    /// The used ring is not in memory.
    #[error("queue {queue}: used ring broken")]
    UsedRing {
        /// Its number.
        queue: u16,
    },
    /// A chain that is empty, endless, longer than the queue, or leaves its table.
    #[error("queue {queue}: descriptor chain {head} broken")]
    Chain {
        /// The queue's number.
        queue: u16,
        /// The first descriptor.
        head: u16,
    },
    /// A chain with a buffer that is not in guest memory.
    #[error("queue {queue}: descriptor chain {head} leaves guest memory")]
    Buffer {
        /// The queue's number.
        queue: u16,
        /// The first descriptor.
        head: u16,
    },
    /// A chain whose buffers are too small for what belongs there, or of the wrong direction.
    #[error("queue {queue}: descriptor chain {head} has {bytes} bytes where more are due")]
    Short {
        /// The queue's number.
        queue: u16,
        /// The first descriptor.
        head: u16,
        /// The bytes it has.
        bytes: usize,
    },
    /// A request that the device does not know.
    #[error("queue {queue}: unknown request {kind}")]
    Request {
        /// The queue's number.
        queue: u16,
        /// The request's type.
        kind: u32,
    },
    /// A vsock packet that no driver sends.
    #[error("vsock packet: {0}")]
    Packet(&'static str),
}

/// Counts the faults of one device, whichever thread sees them. Of any number of them the first is kept: a guest cannot
/// make this grow, and later ones are often a consequence.
#[derive(Debug, Default)]
pub struct FaultCounter {
    total: AtomicU64,
    first: OnceLock<GuestFault>,
}

impl FaultCounter {
    /// Notes one fault.
    pub fn count(&self, fault: GuestFault) {
        let _ = self.first.set(fault);
        self.total.fetch_add(1, Ordering::Relaxed);
    }

    /// How many there were.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// The first of them.
    pub fn first(&self) -> Option<GuestFault> {
        self.first.get().copied()
    }
}

/// Makes queues of a device for a test: `handler` gets them as a transport would hand them over.
#[cfg(test)]
pub(crate) fn activation(queues: Vec<ActiveQueue>) -> Activation {
    Activation { features: COMMON_FEATURES, queues, request: None, faults: Arc::default() }
}

/// Guest memory that the rings of tests live in.
#[cfg(test)]
pub(crate) fn test_ram(bytes: usize) -> Arc<crate::memory::GuestRam> {
    Arc::new(crate::memory::GuestRam::from_ranges(&[(vm_memory::GuestAddress(0), bytes)]).unwrap())
}
