//! The virtio-mmio transport, version 2 only.
//!
//! ```text
//!            ACKNOWLEDGE      DRIVER       FEATURES_OK         DRIVER_OK
//!   reset ─────────────▶ ack ────────▶ driver ──────────▶ features ──────────▶ running ── the handler exists
//!     ▲                                 │ negotiates       │ sets up queues       │
//!     │                                 ▼                  ▼                      ▼
//!     └──── status 0, from anywhere ◀── FAILED (by the driver) ◀── NEEDS_RESET (by the device, after a fault)
//! ```
//!
//! Bits of the status are only ever added, one step at a time. What a state does not allow is a [`GuestFault`]: counted, and
//! without effect. Source: VIRTIO 1.2, sections 2.1, 3.1 and 4.2.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{ActiveQueue, Position};
use super::{
    Activation, COMMON_FEATURES, FaultCounter, GuestFault, Interrupt, NotQuiescent, QueueHandler,
    Signal, VirtioDevice,
};
use crate::bus::BusDevice;
use crate::memory::GuestRam;
use crate::state::Malformed;
use crate::state::machine::{DeviceState, QueueState};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"CHTN");

/// Where the driver finds a queue's notification register, from the device's start.
pub const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;

/// Where a device is in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The start of its registers.
    pub address: GuestAddress,
    /// Its line of the I/O APIC.
    pub irq: u32,
}

/// What the transport (on a vCPU) and the running half (on the VMM thread) share, without a lock.
pub struct Shared {
    status: AtomicU32,
    interrupts: AtomicU32,
    line: EventFd,
    /// Counts what the guest does wrong, on either side.
    pub faults: Arc<FaultCounter>,
}

impl Shared {
    /// State for a device whose interrupt is raised by writing to `line`.
    pub fn new(line: EventFd) -> Arc<Self> {
        let (status, interrupts) = (AtomicU32::new(0), AtomicU32::new(0));
        Arc::new(Self { status, interrupts, line, faults: Arc::default() })
    }

    /// Tells the driver that the device is of no use until it is reset.
    pub fn needs_reset(&self, fault: GuestFault) {
        self.faults.count(fault);
        let before = self.status.fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::SeqCst);
        if before & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.trigger(Signal::Config);
        }
    }
}

impl Interrupt for Shared {
    fn trigger(&self, signal: Signal) {
        let bit = match signal {
            Signal::Queue => VIRTIO_MMIO_INT_VRING,
            Signal::Config => VIRTIO_MMIO_INT_CONFIG,
        };
        self.interrupts.fetch_or(bit, Ordering::SeqCst);
        // Full means that the line has been raised and KVM has not taken it yet.
        let _ = self.line.write(1);
    }
}

/// The VMM thread, as the transport sees it.
pub trait Worker: Send {
    /// Takes over a device's running half and serves it.
    fn start(&self, handler: Box<dyn QueueHandler>, kick: Arc<EventFd>);
    /// Drops the running half, if there is one, and returns when it is gone: nothing touches the queues any more.
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

/// A device's registers.
pub struct MmioTransport<W> {
    device: Box<dyn VirtioDevice>,
    worker: W,
    ram: Arc<GuestRam>,
    shared: Arc<Shared>,
    kick: Arc<EventFd>,
    queues: Vec<QueueRegisters>,
    queue_select: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
}

impl<W: Worker> MmioTransport<W> {
    /// Registers for a device. `kick` is the descriptor at which notifications of its queues arrive.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        worker: W,
        ram: Arc<GuestRam>,
        shared: Arc<Shared>,
        kick: Arc<EventFd>,
    ) -> Self {
        let mut this = Self {
            queues: vec![QueueRegisters::default(); device.queue_sizes().len()],
            device,
            worker,
            ram,
            shared,
            kick,
            queue_select: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
        };
        this.forget();
        this
    }

    fn status(&self) -> u32 {
        self.shared.status.load(Ordering::SeqCst)
    }

    fn features(&self) -> u64 {
        self.device.features() | COMMON_FEATURES
    }

    /// Back to the state before any driver.
    fn forget(&mut self) {
        for (queue, size) in self.queues.iter_mut().zip(self.device.queue_sizes()) {
            *queue = QueueRegisters { size: u32::from(*size), ..Default::default() };
        }
        (self.queue_select, self.device_features_select, self.driver_features_select) = (0, 0, 0);
        self.driver_features = 0;
        self.shared.interrupts.store(0, Ordering::SeqCst);
        self.shared.status.store(0, Ordering::SeqCst);
    }

    fn read_register(&self, register: u32) -> Option<u32> {
        Some(match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.kind(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.features(), self.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self
                .selected()
                .and_then(|index| self.device.queue_sizes().get(index))
                .map_or(0, |size| (*size).into()),
            VIRTIO_MMIO_QUEUE_READY => self
                .selected()
                .and_then(|index| self.queues.get(index))
                .map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.shared.interrupts.load(Ordering::SeqCst),
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
        let fault = GuestFault::OutOfOrder { offset: register.into(), status };
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if status == DRIVER => match self.driver_features_select {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
                1 => {
                    self.driver_features =
                        self.driver_features & 0xffff_ffff | u64::from(value) << 32
                }
                // There are no features beyond 64; none may be set.
                _ if value == 0 => {}
                _ => return Err(fault),
            },
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            // Handled in KVM for a busy queue.
            VIRTIO_MMIO_QUEUE_NOTIFY => return self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.shared.interrupts.fetch_and(!value, Ordering::SeqCst);
            }
            VIRTIO_MMIO_STATUS => return self.write_status(value),
            VIRTIO_MMIO_QUEUE_NUM..=VIRTIO_MMIO_QUEUE_USED_HIGH => {
                return self.write_queue_register(register, value).ok_or(fault);
            }
            // The shared memory selector, which selects nothing.
            virtio_bindings::virtio_mmio::VIRTIO_MMIO_SHM_SEL => {}
            _ => return Err(fault),
        }
        Ok(())
    }

    /// `None` if there is no such register, or the queue is not there to be changed.
    fn write_queue_register(&mut self, register: u32, value: u32) -> Option<()> {
        let setting_up = self.status() == FEATURES_OK;
        let queue =
            self.selected().and_then(|index| self.queues.get_mut(index)).filter(|_| setting_up)?;
        if register == VIRTIO_MMIO_QUEUE_READY && value == 0 {
            queue.ready = false;
            return Some(());
        }
        if queue.ready {
            return None;
        }
        let value64 = u64::from(value);
        let low = |address: &mut u64| *address = *address & !0xffff_ffff | value64;
        let high = |address: &mut u64| *address = *address & 0xffff_ffff | value64 << 32;
        match register {
            // Checked when the driver says it is done.
            VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            VIRTIO_MMIO_QUEUE_READY => queue.ready = true,
            VIRTIO_MMIO_QUEUE_DESC_LOW => low(&mut queue.descriptors),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => high(&mut queue.descriptors),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => low(&mut queue.available),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => high(&mut queue.available),
            VIRTIO_MMIO_QUEUE_USED_LOW => low(&mut queue.used),
            VIRTIO_MMIO_QUEUE_USED_HIGH => high(&mut queue.used),
            _ => return None,
        }
        Some(())
    }

    fn write_status(&mut self, value: u32) -> Result<(), GuestFault> {
        let status = self.status();
        if value == 0 {
            self.worker.stop();
            self.forget();
            return Ok(());
        }
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            self.worker.stop();
            self.shared.status.fetch_or(VIRTIO_CONFIG_S_FAILED, Ordering::SeqCst);
            return Ok(());
        }
        match (status, value) {
            (0, ACKNOWLEDGE) | (ACKNOWLEDGE, DRIVER) => {}
            (DRIVER, FEATURES_OK) => {
                // A driver finds the bit not set and gives up, as the specification wants it.
                let modern = self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
                if !modern || self.driver_features & !self.features() != 0 {
                    return Err(GuestFault::Status { from: status, to: value });
                }
            }
            (FEATURES_OK, DRIVER_OK) => {
                let queues =
                    self.build_queues(&[]).inspect_err(|fault| self.shared.needs_reset(*fault))?;
                self.shared.status.store(DRIVER_OK, Ordering::SeqCst);
                let faults = Arc::clone(&self.shared.faults);
                let activation =
                    Activation { features: self.driver_features, queues, request: None, faults };
                self.worker.start(self.device.activate(activation), Arc::clone(&self.kick));
                return Ok(());
            }
            // Written again, as drivers do.
            (from, to) if from == to => {}
            (from, to) => return Err(GuestFault::Status { from, to }),
        }
        self.shared.status.store(value, Ordering::SeqCst);
        Ok(())
    }

    /// Every queue, checked: sizes, alignment, and rings that are in guest memory. They start at `positions`, or where a
    /// driver starts.
    fn build_queues(&self, positions: &[Position]) -> Result<Vec<ActiveQueue>, GuestFault> {
        let sizes = self.device.queue_sizes().iter();
        (0u16..)
            .zip(self.queues.iter())
            .zip(sizes)
            .map(|((index, registers), max)| {
                let start = positions.get(usize::from(index)).copied().unwrap_or_default();
                let rings = GuestFault::Rings { queue: index };
                let size = u16::try_from(registers.size).map_err(|_| rings)?;
                let mut queue = Queue::new(*max).map_err(|_| rings)?;
                queue
                    .try_set_size(size)
                    .and_then(|()| {
                        queue.try_set_desc_table_address(GuestAddress(registers.descriptors))
                    })
                    .and_then(|()| {
                        queue.try_set_avail_ring_address(GuestAddress(registers.available))
                    })
                    .and_then(|()| queue.try_set_used_ring_address(GuestAddress(registers.used)))
                    .map_err(|_| rings)?;
                queue.set_event_idx(self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
                queue.set_ready(registers.ready);
                queue.set_next_avail(start.next_available);
                queue.set_next_used(start.next_used);
                if !queue.is_valid(&*self.ram) {
                    return Err(rings);
                }
                let interrupt: Arc<dyn Interrupt> = Arc::clone(&self.shared) as _;
                Ok(ActiveQueue::new(
                    index,
                    queue,
                    Arc::clone(&self.ram),
                    interrupt,
                    Arc::clone(&self.kick),
                ))
            })
            .collect()
    }

    /// Everything that has to be known to go on, of a guest whose vCPUs stand still. `handler` is the running half, if
    /// there is one.
    ///
    /// # Errors
    /// The device is in the middle of something.
    pub fn save(&self, handler: Option<&dyn QueueHandler>) -> Result<DeviceState, NotQuiescent> {
        let status = self.status();
        if status & (VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED) != 0 {
            return Err(NotQuiescent("a device has failed"));
        }
        let (positions, request) = match handler {
            Some(handler) if status == DRIVER_OK => handler.save()?,
            None if status != DRIVER_OK => (vec![Position::default(); self.queues.len()], None),
            _ => return Err(NotQuiescent("a device is being started or reset")),
        };
        let queues = self.queues.iter().zip(positions).map(|(registers, position)| QueueState {
            size: registers.size,
            ready: registers.ready,
            rings: [registers.descriptors, registers.available, registers.used],
            next_available: position.next_available,
            next_used: position.next_used,
        });
        Ok(DeviceState {
            status,
            interrupts: self.shared.interrupts.load(Ordering::SeqCst),
            features: self.driver_features,
            selected: [self.queue_select, self.device_features_select, self.driver_features_select],
            queues: queues.collect(),
            request,
        })
    }

    /// Puts the registers into a saved state and starts the running half, as the driver once did: with the same checks,
    /// because it was a guest that chose what is in them.
    ///
    /// # Errors
    /// No driver could have brought the device into this state.
    pub fn restore(&mut self, state: &DeviceState) -> Result<(), Malformed> {
        let DeviceState { status, interrupts, features, selected, queues, request } = state;
        // Until a driver says that it is done with them, it may have chosen any: then they are checked.
        let agreed = *status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if ![0, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK].contains(status)
            || agreed && features & !self.features() != 0
            || queues.len() != self.queues.len()
        {
            return Err(Malformed("a device is in no state that it can be in"));
        }
        for (registers, saved) in self.queues.iter_mut().zip(queues) {
            let [descriptors, available, used] = saved.rings;
            *registers = QueueRegisters {
                size: saved.size,
                ready: saved.ready,
                descriptors,
                available,
                used,
            };
        }
        [self.queue_select, self.device_features_select, self.driver_features_select] = *selected;
        self.driver_features = *features;
        self.shared.status.store(*status, Ordering::SeqCst);
        self.shared.interrupts.store(*interrupts, Ordering::SeqCst);
        if *status == DRIVER_OK {
            let positions: Vec<_> = queues
                .iter()
                .map(|queue| Position {
                    next_available: queue.next_available,
                    next_used: queue.next_used,
                })
                .collect();
            let queues =
                self.build_queues(&positions).map_err(|_| Malformed("a queue is not in memory"))?;
            let faults = Arc::clone(&self.shared.faults);
            let activation = Activation { features: *features, queues, request: *request, faults };
            self.worker.start(self.device.activate(activation), Arc::clone(&self.kick));
        }
        if *interrupts != 0 {
            // The edge may have been on its way to the interrupt controller when that was saved. Once too often is harmless.
            let _ = self.shared.line.write(1);
        }
        Ok(())
    }

    fn notify(&self, value: u32) -> Result<(), GuestFault> {
        let exists = usize::try_from(value).is_ok_and(|index| index < self.queues.len());
        if !exists || self.status() != DRIVER_OK {
            return Err(GuestFault::Notify { queue: value });
        }
        // Full means that the device has not looked since; it will.
        let _ = self.kick.write(1);
        Ok(())
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_select).ok()
    }
}

fn half(features: u64, select: u32) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "which is what is asked for")]
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
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
            self.shared.faults.count(GuestFault::Register { offset, bytes: data.len() });
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let register = u32::try_from(offset)
            .ok()
            .filter(|offset| offset % 4 == 0 && *offset < VIRTIO_MMIO_CONFIG);
        let result = match (register, <[u8; 4]>::try_from(data)) {
            (Some(register), Ok(value)) => self.write_register(register, u32::from_le_bytes(value)),
            // No configuration of ours can be written.
            _ => Err(GuestFault::Register { offset, bytes: data.len() }),
        };
        if let Err(fault) = result {
            self.shared.faults.count(fault);
        }
    }
}

#[cfg(test)]
#[path = "mmio_test.rs"]
mod tests;
