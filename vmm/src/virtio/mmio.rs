//! The virtio-mmio transport, version 2 only.
//!
//! ```text
//!            ACKNOWLEDGE     DRIVER       FEATURES_OK         DRIVER_OK
//!   reset ─────────────▶ ack ───────▶ driver ──────────▶ features ─────────▶ running: handler exists
//!     ▲                                │ negotiates       │ sets up queues      │
//!     │                                ▼                  ▼                     ▼
//!     └─── status 0, from anywhere ◀── FAILED (set by driver) ◀── NEEDS_RESET (set after a fault)
//! ```
//!
//! Bits of the status are only ever added, one step at a time. An access that the current status
//! does not allow is a [`GuestFault`]: it is counted and has no effect. Source: VIRTIO 1.2,
//! sections 2.1, 3.1 and 4.2.

mod shared_registers;
mod snapshot;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_SHM_SEL, VIRTIO_MMIO_STATUS,
    VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

pub use self::shared_registers::SharedRegisters;
use super::queue::{ActiveQueue, QueuePosition};
use super::{Activation, COMMON_FEATURES, GuestFault, Interrupt, QueueHandler, VirtioDevice};
use crate::bus::BusDevice;
use crate::memory::GuestRam;
use crate::state::machine::ConnectionRequest;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"CHTN");

/// The offset of the register that a driver writes to notify a queue.
pub const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

// Each constant is the value of the whole status register after that step.
const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;

/// The way from the transport to the VMM thread, which runs the device's [`QueueHandler`].
pub trait Worker: Send {
    /// Passes a running half to the VMM thread, with the eventfd of its notifications.
    fn start(&self, handler: Box<dyn QueueHandler>, kick: Arc<EventFd>);
    /// Drops the running half, if there is one. When this returns, nothing accesses the queues any
    /// more.
    fn stop(&self);
}

/// One queue as the driver sets it up.
#[derive(Clone, Copy, Debug, Default)]
struct QueueRegisters {
    size: u32,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// The registers of a device.
pub struct MmioTransport<W> {
    device: Box<dyn VirtioDevice>,
    worker: W,
    ram: Arc<GuestRam>,
    shared: Arc<SharedRegisters>,
    kick: Arc<EventFd>,
    queues: Vec<QueueRegisters>,
    queue_sel: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
}

impl<W: Worker> MmioTransport<W> {
    /// Makes the registers of a device. Notifications of its queues arrive at `kick`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        worker: W,
        ram: Arc<GuestRam>,
        shared: Arc<SharedRegisters>,
        kick: Arc<EventFd>,
    ) -> Self {
        let mut this = Self {
            queues: vec![QueueRegisters::default(); device.queue_sizes().len()],
            device,
            worker,
            ram,
            shared,
            kick,
            queue_sel: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
        };
        this.reset_registers();
        this
    }

    fn status(&self) -> u32 {
        self.shared.status.load(Ordering::SeqCst)
    }

    fn features(&self) -> u64 {
        self.device.features() | COMMON_FEATURES
    }

    /// Restores the state before any driver.
    fn reset_registers(&mut self) {
        for (queue, size) in self.queues.iter_mut().zip(self.device.queue_sizes()) {
            *queue = QueueRegisters { size: u32::from(*size), ..Default::default() };
        }
        (self.queue_sel, self.device_features_sel, self.driver_features_sel) = (0, 0, 0);
        self.driver_features = 0;
        self.shared.interrupt_status.store(0, Ordering::SeqCst);
        self.shared.status.store(0, Ordering::SeqCst);
    }

    fn read_register(&self, register: u32) -> Option<u32> {
        Some(match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.kind(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => feature_word(self.features(), self.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self
                .selected_queue()
                .and_then(|index| self.device.queue_sizes().get(index))
                .map_or(0, |size| (*size).into()),
            VIRTIO_MMIO_QUEUE_READY => self
                .selected_queue()
                .and_then(|index| self.queues.get(index))
                .map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.shared.interrupt_status.load(Ordering::SeqCst),
            VIRTIO_MMIO_STATUS => self.status(),
            // The configuration never changes.
            VIRTIO_MMIO_CONFIG_GENERATION => 0,
            // There are no shared memory regions: length and address of each read as all ones.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => return None,
        })
    }

    fn write_register(&mut self, register: u32, value: u32) -> Result<(), GuestFault> {
        let status = self.status();
        let fault = GuestFault::RegisterWrite { offset: register.into(), status };
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES if status == DRIVER => match self.driver_features_sel {
                0 => set_low(&mut self.driver_features, value),
                1 => set_high(&mut self.driver_features, value),
                // There are no features beyond 64, so none may be set.
                _ if value == 0 => {}
                _ => return Err(fault),
            },
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            // KVM handles the notifications of a busy queue.
            VIRTIO_MMIO_QUEUE_NOTIFY => return self.notify_queue(value),
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.shared.interrupt_status.fetch_and(!value, Ordering::SeqCst);
            }
            VIRTIO_MMIO_STATUS => return self.write_status(value),
            VIRTIO_MMIO_QUEUE_NUM..=VIRTIO_MMIO_QUEUE_USED_HIGH => {
                return self.write_queue_register(register, value).ok_or(fault);
            }
            // There are no shared memory regions to select.
            VIRTIO_MMIO_SHM_SEL => {}
            _ => return Err(fault),
        }
        Ok(())
    }

    /// Writes a register of the selected queue. Returns `None` if there is no such register, or if
    /// the queue does not exist or cannot be changed now.
    fn write_queue_register(&mut self, register: u32, value: u32) -> Option<()> {
        let setting_up = self.status() == FEATURES_OK;
        let queue = self
            .selected_queue()
            .and_then(|index| self.queues.get_mut(index))
            .filter(|_| setting_up)?;
        if register == VIRTIO_MMIO_QUEUE_READY && value == 0 {
            queue.ready = false;
            return Some(());
        }
        if queue.ready {
            return None;
        }
        match register {
            // Size and addresses are checked when the driver sets `DRIVER_OK`.
            VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            VIRTIO_MMIO_QUEUE_READY => queue.ready = true,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => return None,
        }
        Some(())
    }

    fn write_status(&mut self, value: u32) -> Result<(), GuestFault> {
        let status = self.status();
        if value == 0 {
            self.worker.stop();
            self.reset_registers();
            return Ok(());
        }
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            self.worker.stop();
            self.shared.status.fetch_or(VIRTIO_CONFIG_S_FAILED, Ordering::SeqCst);
            return Ok(());
        }
        match (status, value) {
            (0, ACKNOWLEDGE) | (ACKNOWLEDGE, DRIVER) => {}
            // A driver whose features are refused reads the status back and finds the bit clear.
            (DRIVER, FEATURES_OK) if self.accepts_features() => {}
            (FEATURES_OK, DRIVER_OK) => return self.start_device(),
            // Drivers write the current status again.
            (from, to) if from == to => {}
            (from, to) => return Err(GuestFault::StatusTransition { from, to }),
        }
        self.shared.status.store(value, Ordering::SeqCst);
        Ok(())
    }

    /// Returns whether the driver has accepted the modern interface, and no feature that was not
    /// offered.
    fn accepts_features(&self) -> bool {
        self.may_agree_on(self.driver_features)
    }

    fn may_agree_on(&self, features: u64) -> bool {
        features & 1 << VIRTIO_F_VERSION_1 != 0 && features & !self.features() == 0
    }

    /// Starts the running half after the driver has set `DRIVER_OK`.
    fn start_device(&mut self) -> Result<(), GuestFault> {
        let queues =
            self.build_queues(&[]).inspect_err(|fault| self.shared.set_needs_reset(*fault))?;
        self.shared.status.store(DRIVER_OK, Ordering::SeqCst);
        self.activate(queues, None);
        Ok(())
    }

    fn activate(&mut self, queues: Vec<ActiveQueue>, request: Option<ConnectionRequest>) {
        let faults = Arc::clone(&self.shared.faults);
        let activation = Activation { features: self.driver_features, queues, request, faults };
        self.worker.start(self.device.activate(activation), Arc::clone(&self.kick));
    }

    /// Builds the running queues. They start at `positions`, or at zero as a driver starts.
    fn build_queues(&self, positions: &[QueuePosition]) -> Result<Vec<ActiveQueue>, GuestFault> {
        let positions =
            positions.iter().copied().chain(std::iter::repeat(QueuePosition::default()));
        let sizes = self.device.queue_sizes().iter();
        (0..)
            .zip(self.queues.iter().zip(sizes))
            .zip(positions)
            .map(|((index, (registers, max_size)), position)| {
                self.build_queue(index, registers, *max_size, position)
            })
            .collect()
    }

    /// Builds one running queue after checking its size, its alignment, and that its rings are in
    /// guest memory.
    fn build_queue(
        &self,
        index: u16,
        registers: &QueueRegisters,
        max_size: u16,
        position: QueuePosition,
    ) -> Result<ActiveQueue, GuestFault> {
        let unusable = GuestFault::UnusableQueue { queue: index };
        let size = u16::try_from(registers.size).map_err(|_| unusable)?;
        let mut queue = Queue::new(max_size).map_err(|_| unusable)?;
        queue
            .try_set_size(size)
            .and_then(|()| queue.try_set_desc_table_address(GuestAddress(registers.descriptors)))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(registers.available)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(registers.used)))
            .map_err(|_| unusable)?;
        queue.set_event_idx(self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        queue.set_ready(registers.ready);
        queue.set_next_avail(position.next_available);
        queue.set_next_used(position.next_used);
        if !queue.is_valid(&*self.ram) {
            return Err(unusable);
        }
        let (ram, kick) = (Arc::clone(&self.ram), Arc::clone(&self.kick));
        let interrupt: Arc<dyn Interrupt> = Arc::clone(&self.shared) as _;
        Ok(ActiveQueue::new(index, queue, ram, interrupt, kick))
    }

    fn notify_queue(&self, value: u32) -> Result<(), GuestFault> {
        let exists = usize::try_from(value).is_ok_and(|index| index < self.queues.len());
        if !exists || self.status() != DRIVER_OK {
            return Err(GuestFault::Notification { queue: value });
        }
        // A write fails if the counter is full, and then the handler is about to be called.
        let _ = self.kick.write(1);
        Ok(())
    }

    fn selected_queue(&self) -> Option<usize> {
        usize::try_from(self.queue_sel).ok()
    }
}

/// Returns the 32 bits of the features that a driver has selected.
fn feature_word(features: u64, selected: u32) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "the driver reads half of the bits")]
    match selected {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value & !0xffff_ffff | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = *value & 0xffff_ffff | u64::from(high) << 32;
}

impl<W: Worker> BusDevice for MmioTransport<W> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let result = if let Some(at) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            let config = usize::try_from(at)
                .ok()
                .and_then(|at| self.device.config().get(at..))
                .unwrap_or_default();
            let count = config.len().min(data.len());
            data[..count].copy_from_slice(&config[..count]);
            (count > 0).then_some(())
        } else {
            // VIRTIO 1.2, 4.2.2.2: registers are read 32 bits at a time, aligned.
            let register =
                u32::try_from(offset).ok().filter(|register| register % 4 == 0 && data.len() == 4);
            register
                .and_then(|register| self.read_register(register))
                .map(|value| data.copy_from_slice(&value.to_le_bytes()))
        };
        if result.is_none() {
            self.shared.faults.count(GuestFault::RegisterAccess { offset, bytes: data.len() });
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let register = u32::try_from(offset)
            .ok()
            .filter(|offset| offset % 4 == 0 && *offset < VIRTIO_MMIO_CONFIG);
        let result = match (register, <[u8; 4]>::try_from(data)) {
            (Some(register), Ok(value)) => self.write_register(register, u32::from_le_bytes(value)),
            // The configuration space is read-only.
            _ => Err(GuestFault::RegisterAccess { offset, bytes: data.len() }),
        };
        if let Err(fault) = result {
            self.shared.faults.count(fault);
        }
    }
}

#[cfg(test)]
#[path = "mmio_test.rs"]
mod tests;
