//! The registers of a device that two threads access.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use super::super::{FaultCounter, GuestFault, Interrupt, Signal};

/// The registers that the transport (on a vCPU) and the running half (on the VMM thread) share,
/// without a lock.
pub struct SharedRegisters {
    pub(super) status: AtomicU32,
    pub(super) interrupt_status: AtomicU32,
    /// The eventfd that KVM turns into an interrupt.
    pub(super) irq: EventFd,
    /// Counts the guest's faults, on either side.
    pub faults: Arc<FaultCounter>,
}

impl SharedRegisters {
    /// Makes the registers of a device whose interrupt is raised by writing to `irq`.
    pub fn new(irq: EventFd) -> Arc<Self> {
        let (status, interrupt_status) = (AtomicU32::new(0), AtomicU32::new(0));
        Arc::new(Self { status, interrupt_status, irq, faults: Arc::default() })
    }

    /// Counts a fault and tells the driver that the device has to be reset.
    pub fn set_needs_reset(&self, fault: GuestFault) {
        self.faults.count(fault);
        let before = self.status.fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::SeqCst);
        if before & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.trigger(Signal::Config);
        }
    }

    pub(super) fn raise_irq(&self) {
        // A write fails if the counter is full. Then the line has been raised, and KVM has not
        // taken it yet.
        let _ = self.irq.write(1);
    }
}

impl Interrupt for SharedRegisters {
    fn trigger(&self, signal: Signal) {
        let bit = match signal {
            Signal::Queue => VIRTIO_MMIO_INT_VRING,
            Signal::Config => VIRTIO_MMIO_INT_CONFIG,
        };
        self.interrupt_status.fetch_or(bit, Ordering::SeqCst);
        self.raise_irq();
    }
}
