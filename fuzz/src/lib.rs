//! What the targets share: a device with a driver that does anything, and bytes as a list of choices.

use std::sync::{Arc, Mutex, PoisonError};

use chitin_vmm::bus::BusDevice;
use chitin_vmm::memory::GuestRam;
use chitin_vmm::virtio::mmio::{MmioTransport, Shared, Worker};
use chitin_vmm::virtio::{QueueHandler, VirtioDevice};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory of a target: all that its addresses can name, and a hole after it.
pub const RAM_BYTES: u64 = 1 << 20;

/// Input as choices. At its end everything is zero.
pub struct Choices<'a>(pub &'a [u8]);

impl<'a> Choices<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        front
    }

    pub fn number(&mut self, bytes: usize) -> u64 {
        self.bytes(bytes).iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    pub fn byte(&mut self) -> u8 {
        self.number(1) as u8
    }

    pub fn short(&mut self) -> u16 {
        self.number(2) as u16
    }

    pub fn word(&mut self) -> u32 {
        self.number(4) as u32
    }
}

type Slot = Arc<Mutex<Option<Box<dyn QueueHandler>>>>;

/// The VMM thread, which holds a running half.
pub struct Hands(Slot);

impl Worker for Hands {
    fn start(&self, handler: Box<dyn QueueHandler>, _: Arc<EventFd>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(handler);
    }

    fn stop(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// A device with its registers.
pub struct Device {
    pub ram: Arc<GuestRam>,
    transport: MmioTransport<Hands>,
    pub shared: Arc<Shared>,
    handler: Slot,
    sizes: Vec<u16>,
}

const STATUS: u64 = 0x70;

impl Device {
    pub fn new(model: Box<dyn VirtioDevice>) -> Self {
        let ram =
            Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).unwrap());
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let shared = Shared::new(event());
        let handler = Slot::default();
        let hands = Hands(Arc::clone(&handler));
        let sizes = model.queue_sizes().to_vec();
        let kick = Arc::new(event());
        let transport =
            MmioTransport::new(model, hands, Arc::clone(&ram), Arc::clone(&shared), kick);
        Self { ram, transport, shared, handler, sizes }
    }

    pub fn transport(&mut self) -> &mut MmioTransport<Hands> {
        &mut self.transport
    }

    pub fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    /// Where a queue is that [`start`](Self::start) sets up: 16 KiB, with the rings at fixed places in them.
    pub fn rings(queue: u64) -> [u64; 3] {
        let start = 0x1_0000 + queue * 0x4000;
        [start, start + 0x2000, start + 0x3000]
    }

    /// As a driver does it.
    pub fn start(&mut self) {
        for status in [0, 1, 3] {
            self.set(STATUS, status);
        }
        for (register, value) in [(0x24, 1), (0x20, 1), (0x24, 0), (0x20, 0), (STATUS, 11)] {
            self.set(register, value);
        }
        for (queue, size) in (0..).zip(self.sizes.clone()) {
            let [table, available, used] = Self::rings(queue).map(|address| address as u32);
            for (register, value) in [
                (0x30, queue as u32),
                (0x38, size.into()),
                (0x80, table),
                (0x84, 0),
                (0x90, available),
                (0x94, 0),
                (0xa0, used),
                (0xa4, 0),
                (0x44, 1),
            ] {
                self.set(register, value);
            }
        }
        self.set(STATUS, 15);
    }

    /// Does something with the running half, if there is one that has not failed; after a fault there is none.
    pub fn with_handler<T>(
        &mut self,
        f: impl FnOnce(&mut dyn QueueHandler) -> Result<T, chitin_vmm::virtio::GuestFault>,
    ) -> Option<T> {
        let mut slot = self.handler.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut **slot.as_mut()?);
        if let Err(fault) = &result {
            self.shared.needs_reset(*fault);
            // As the loop has it: a handler that has failed is not called again, but lives until the reset.
            slot.take();
        }
        result.ok()
    }

    /// Puts bytes into guest memory, as far as there is any.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        let _ = self.ram.write(bytes, GuestAddress(address));
    }

    /// Saves the device and restores what was saved into another one of its kind, which must take it.
    pub fn save_and_restore(&mut self, model: Box<dyn VirtioDevice>) {
        let slot = self.handler.lock().unwrap_or_else(PoisonError::into_inner);
        let saved = self.transport.save(slot.as_deref());
        drop(slot);
        if let Ok(state) = saved {
            let mut other = Self::new(model);
            other.transport.restore(&state).expect("what was saved is taken back");
        }
    }
}
