//! The devices of a microVM: virtio devices at their addresses, and the serial console.

use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestAddress;

use super::device_requests::{DeviceRequests, WorkerHandle};
use super::error::MonitorError;
use super::eventfd::create_eventfd;
use crate::arch::x86_64::cmdline::VirtioMmioDevice;
use crate::arch::x86_64::layout;
use crate::bus::Buses;
use crate::console::{Console, SerialInterrupt};
use crate::kvm::Vm;
use crate::memory::GuestRam;
use crate::virtio::VirtioDevice;
use crate::virtio::mmio::{MmioTransport, NOTIFY_OFFSET, SharedRegisters};

/// One virtio device: its place in the guest, and both ways to it.
pub(super) struct VirtioSlot {
    /// The registers' address and the interrupt line.
    pub info: VirtioMmioDevice,
    /// The registers that vCPUs and the VMM thread share without a lock.
    pub shared: Arc<SharedRegisters>,
    transport: Arc<Mutex<MmioTransport<WorkerHandle>>>,
}

impl VirtioSlot {
    /// Locks the registers, to save or restore them while no vCPU runs.
    pub fn lock_transport(&self) -> MutexGuard<'_, MmioTransport<WorkerHandle>> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The devices of a microVM under construction.
pub(super) struct Devices {
    /// The address spaces that vCPUs reach the devices in.
    pub buses: Buses,
    /// The virtio devices, in the order of their addresses.
    pub slots: Vec<VirtioSlot>,
    /// The requests of vCPUs to the VMM thread.
    pub requests: Rc<DeviceRequests>,
}

impl Devices {
    /// Creates an empty set.
    pub fn new() -> Result<Self, MonitorError> {
        let requests = Rc::new(DeviceRequests::new()?);
        Ok(Self { buses: Buses::default(), slots: Vec::new(), requests })
    }

    /// Adds a virtio device at the next address, with the next interrupt line.
    pub fn add_virtio(
        &mut self,
        device: Box<dyn VirtioDevice>,
        vm: &Vm,
        ram: &Arc<GuestRam>,
    ) -> Result<(), MonitorError> {
        let index = self.slots.len();
        let offset = index as u64 * layout::VIRTIO_MMIO_BYTES;
        let address = GuestAddress(layout::VIRTIO_MMIO.0 + offset);
        let irq = layout::VIRTIO_IRQ + u32::try_from(index).unwrap_or(u32::MAX);

        let line = create_eventfd()?;
        vm.register_irqfd(&line, irq)?;
        let shared = SharedRegisters::new(line);
        let kick = Arc::new(create_eventfd()?);
        if let Some(queue) = device.busy_queue() {
            vm.register_ioeventfd(&kick, GuestAddress(address.0 + NOTIFY_OFFSET), queue.into())?;
        }
        let worker = WorkerHandle { device: index, sender: self.requests.sender() };
        let transport =
            MmioTransport::new(device, worker, Arc::clone(ram), Arc::clone(&shared), kick);
        let transport = Arc::new(Mutex::new(transport));
        self.buses.mmio.insert(address.0, layout::VIRTIO_MMIO_BYTES, Arc::clone(&transport) as _);
        self.slots.push(VirtioSlot { info: VirtioMmioDevice { address, irq }, shared, transport });
        Ok(())
    }

    /// Adds the serial console.
    pub fn add_console(&mut self, vm: &Vm) -> Result<(), MonitorError> {
        let line = create_eventfd()?;
        vm.register_irqfd(&line, layout::SERIAL_IRQ)?;
        let console = Arc::new(Mutex::new(Console::new(SerialInterrupt(line))));
        self.buses.ports.insert(layout::SERIAL_PORT, layout::SERIAL_PORTS, console);
        Ok(())
    }

    /// Adds the port at which a guest has its monitor make forbidden system calls.
    #[cfg(feature = "seccomp-tests")]
    pub fn add_seccomp_test_port(&mut self) {
        use super::seccomp_test_port::{SECCOMP_TEST_PORT, SeccompTestPort};
        let port = Arc::new(Mutex::new(SeccompTestPort(self.requests.sender())));
        self.buses.ports.insert(SECCOMP_TEST_PORT, 1, port);
    }
}
