//! The parts that several targets share: input as a list of choices, and a device with a driver
//! that does anything.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chitin_vmm::bus::BusDevice;
use chitin_vmm::memory::GuestRam;
use chitin_vmm::virtio::mmio::{MmioTransport, SharedRegisters, Worker};
use chitin_vmm::virtio::{GuestFault, QueueHandler, VirtioDevice};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The size of a target's guest memory. Addresses of three bytes reach beyond it.
pub const RAM_BYTES: u64 = 1 << 20;

/// The input as choices. After its end every choice is zero.
pub struct Choices<'a>(pub &'a [u8]);

impl<'a> Choices<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns so many bytes, or fewer at the end.
    pub fn take_bytes(&mut self, count: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        front
    }

    /// Returns a number of so many bytes, little-endian.
    pub fn take_number(&mut self, bytes: usize) -> u64 {
        self.take_bytes(bytes).iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    pub fn take_u8(&mut self) -> u8 {
        self.take_number(1) as u8
    }

    pub fn take_u16(&mut self) -> u16 {
        self.take_number(2) as u16
    }

    pub fn take_u32(&mut self) -> u32 {
        self.take_number(4) as u32
    }
}

/// The place of a device's running half, which the VMM thread has otherwise.
#[derive(Clone, Default)]
pub struct HandlerSlot(Arc<Mutex<Option<Box<dyn QueueHandler>>>>);

impl HandlerSlot {
    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn QueueHandler>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Worker for HandlerSlot {
    fn start(&self, handler: Box<dyn QueueHandler>, _: Arc<EventFd>) {
        *self.lock() = Some(handler);
    }

    fn stop(&self) {
        self.lock().take();
    }
}

/// A device with its registers, and a driver.
pub struct DeviceUnderTest {
    ram: Arc<GuestRam>,
    transport: MmioTransport<HandlerSlot>,
    shared: Arc<SharedRegisters>,
    handler: HandlerSlot,
    queue_sizes: Vec<u16>,
}

const STATUS: u64 = 0x70;

impl DeviceUnderTest {
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let ram =
            Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).unwrap());
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        let shared = SharedRegisters::new(eventfd());
        let handler = HandlerSlot::default();
        let queue_sizes = device.queue_sizes().to_vec();
        let kick = Arc::new(eventfd());
        let transport = MmioTransport::new(
            device,
            handler.clone(),
            Arc::clone(&ram),
            Arc::clone(&shared),
            kick,
        );
        Self { ram, transport, shared, handler, queue_sizes }
    }

    pub fn transport(&mut self) -> &mut MmioTransport<HandlerSlot> {
        &mut self.transport
    }

    pub fn write_register(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    /// Returns the addresses of the rings of a queue that [`start_device`](Self::start_device) sets
    /// up. Each queue has 16 KiB.
    pub fn rings(queue: u64) -> [u64; 3] {
        let start = 0x1_0000 + queue * 0x4000;
        [start, start + 0x2000, start + 0x3000]
    }

    /// Starts the device by the rules.
    pub fn start_device(&mut self) {
        for status in [0, 1, 3] {
            self.write_register(STATUS, status);
        }
        for (register, value) in [(0x24, 1), (0x20, 1), (0x24, 0), (0x20, 0), (STATUS, 11)] {
            self.write_register(register, value);
        }
        for (queue, size) in (0..).zip(self.queue_sizes.clone()) {
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
                self.write_register(register, value);
            }
        }
        self.write_register(STATUS, 15);
    }

    /// Calls the running half, if there is one. A running half that fails is dropped.
    pub fn with_handler<T>(
        &mut self,
        call: impl FnOnce(&mut dyn QueueHandler) -> Result<T, GuestFault>,
    ) -> Option<T> {
        let mut slot = self.handler.lock();
        let result = call(&mut **slot.as_mut()?);
        if let Err(fault) = &result {
            self.shared.set_needs_reset(*fault);
            // The event loop does not call a handler again that has failed.
            slot.take();
        }
        result.ok()
    }

    /// Writes bytes to guest memory, as far as they fit.
    pub fn write_memory(&self, address: u64, bytes: &[u8]) {
        let _ = self.ram.write(bytes, GuestAddress(address));
    }

    /// Saves the device, and restores the state to another device of its kind, which must accept
    /// it.
    pub fn save_and_restore(&mut self, device: Box<dyn VirtioDevice>) {
        let saved = self.transport.save(self.handler.lock().as_deref());
        if let Ok(state) = saved {
            let mut other = Self::new(device);
            other.transport.restore(&state).expect("a saved state can be restored");
        }
    }
}
