//! A driver for the tests of devices: rings in guest memory, filled as a Linux driver or a hostile
//! one would.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_bindings::virtio_ring::VRING_DESC_F_NEXT;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::ActiveQueue;
use super::{Activation, COMMON_FEATURES, Interrupt, Signal};
use crate::memory::GuestRam;

/// Makes guest memory for the rings of a test.
pub(crate) fn test_ram(bytes: usize) -> Arc<GuestRam> {
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), bytes)]).unwrap())
}

/// Makes the activation of a device with these queues, as the transport would.
pub(crate) fn test_activation(queues: Vec<ActiveQueue>) -> Activation {
    Activation { features: COMMON_FEATURES, queues, request: None, faults: Arc::default() }
}

#[derive(Default)]
struct InterruptCounter(AtomicUsize);

impl Interrupt for InterruptCounter {
    fn trigger(&self, _: Signal) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// The driver of one queue.
pub(crate) struct TestDriver {
    pub(crate) ram: Arc<GuestRam>,
    descriptors: GuestAddress,
    available: GuestAddress,
    used: GuestAddress,
    size: u16,
    added: u16,
    next_descriptor: u16,
    interrupts: Arc<InterruptCounter>,
    kick: Arc<EventFd>,
}

impl TestDriver {
    /// Makes the driver of a queue whose rings are at `start`.
    pub(crate) fn new(ram: &Arc<GuestRam>, start: u64, size: u16) -> Self {
        // The mock of virtio-queue lets the available ring overlap the used ring, so it is not
        // used.
        let table = 16 * u64::from(size);
        Self {
            ram: Arc::clone(ram),
            descriptors: GuestAddress(start),
            available: GuestAddress(start + table),
            used: GuestAddress(start + 2 * table),
            size,
            added: 0,
            next_descriptor: 0,
            interrupts: Arc::default(),
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        }
    }

    /// Makes the driver and the device's side of a queue of 16 at the start of memory of its own.
    pub(crate) fn with_queue(ram_bytes: usize) -> (Self, ActiveQueue) {
        let driver = Self::new(&test_ram(ram_bytes), 0, 16);
        let queue = driver.device_queue(0);
        (driver, queue)
    }

    /// Makes the device's side of the queue.
    pub(crate) fn device_queue(&self, index: u16) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(self.descriptors).unwrap();
        queue.try_set_avail_ring_address(self.available).unwrap();
        queue.try_set_used_ring_address(self.used).unwrap();
        queue.set_ready(true);
        let interrupt: Arc<dyn Interrupt> = Arc::clone(&self.interrupts) as _;
        ActiveQueue::new(index, queue, Arc::clone(&self.ram), interrupt, Arc::clone(&self.kick))
    }

    /// Makes one chain available: address, length and flags of each descriptor. `NEXT` is added
    /// where it belongs.
    pub(crate) fn add_chain(&mut self, buffers: &[(u64, u32, u32)]) {
        let first = self.next_descriptor;
        for (number, (address, len, flags)) in buffers.iter().enumerate() {
            let last = number + 1 == buffers.len();
            let flags = flags | if last { 0 } else { VRING_DESC_F_NEXT };
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            self.write_descriptor(index, *address, *len, flags, self.next_descriptor);
        }
        self.add_head(first);
    }

    /// Writes one entry of the descriptor table.
    pub(crate) fn write_descriptor(
        &self,
        index: u16,
        address: u64,
        len: u32,
        flags: u32,
        next: u16,
    ) {
        let descriptor = Descriptor::new(address, len, u16::try_from(flags).unwrap(), next);
        let at = self.descriptors.0 + u64::from(index) * 16;
        self.ram.write_obj(RawDescriptor::from(descriptor), GuestAddress(at)).unwrap();
    }

    /// Puts a head into the available ring.
    pub(crate) fn add_head(&mut self, head: u16) {
        let at = self.available.0 + 4 + u64::from(self.added % self.size) * 2;
        self.ram.write_obj(head, GuestAddress(at)).unwrap();
        self.added = self.added.wrapping_add(1);
        self.set_available_index(self.added);
    }

    /// Writes the index of the available ring.
    pub(crate) fn set_available_index(&self, index: u16) {
        self.ram.write_obj(index, GuestAddress(self.available.0 + 2)).unwrap();
    }

    /// Returns the head and the bytes written of each chain in the used ring.
    pub(crate) fn used_chains(&self) -> Vec<(u32, u32)> {
        let count: u16 = self.ram.read_obj(GuestAddress(self.used.0 + 2)).unwrap();
        let element = |number: u16| {
            let at = self.used.0 + 4 + u64::from(number % self.size) * 8;
            let [head, len]: [u32; 2] = self.ram.read_obj(GuestAddress(at)).unwrap();
            (head, len)
        };
        (0..count).map(element).collect()
    }

    /// Returns how many interrupts the device has raised.
    pub(crate) fn interrupt_count(&self) -> usize {
        self.interrupts.0.load(Ordering::SeqCst)
    }

    /// Returns how often the queue asked to be called again since the last call.
    pub(crate) fn take_kicks(&self) -> u64 {
        self.kick.read().unwrap_or(0)
    }
}
