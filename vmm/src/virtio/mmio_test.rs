use std::sync::Mutex;

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::virtio::test_driver::test_ram;
use crate::virtio::{Flow, HandlerState, NotQuiescent, Signal};

pub(super) const RAM: usize = 1 << 20;
const MODERN: u32 = 1; // VIRTIO_F_VERSION_1, in the upper half

/// Logs the requests of the transport to the VMM thread.
#[derive(Clone, Default)]
pub(super) struct WorkerLog(pub(super) Arc<Mutex<Vec<&'static str>>>);

impl Worker for WorkerLog {
    fn start(&self, _: Box<dyn QueueHandler>, _: Arc<EventFd>) {
        self.0.lock().unwrap().push("start");
    }
    fn stop(&self) {
        self.0.lock().unwrap().push("stop");
    }
}

struct TestDevice;

impl VirtioDevice for TestDevice {
    fn kind(&self) -> u32 {
        99
    }
    fn features(&self) -> u64 {
        0b100
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn config(&self) -> &[u8] {
        &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    }
    fn activate(&mut self, activation: Activation) -> Box<dyn QueueHandler> {
        assert_eq!(activation.queues.len(), 2);
        Box::new(IdleHandler)
    }
}

pub(super) struct IdleHandler;

impl QueueHandler for IdleHandler {
    fn on_kick(&mut self) -> Result<Flow, GuestFault> {
        Ok(Flow::Continue)
    }
    fn save(&self) -> Result<HandlerState, NotQuiescent> {
        let position = QueuePosition { next_available: 3, next_used: 2 };
        Ok(HandlerState { positions: vec![position; 2], request: None })
    }
}

/// A driver that writes the registers of a device.
pub(super) struct MmioGuest {
    pub(super) device: MmioTransport<WorkerLog>,
    pub(super) log: WorkerLog,
}

impl MmioGuest {
    pub(super) fn new() -> Self {
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        let log = WorkerLog::default();
        let shared = SharedRegisters::new(eventfd());
        let kick = Arc::new(eventfd());
        Self {
            device: MmioTransport::new(
                Box::new(TestDevice),
                log.clone(),
                test_ram(RAM),
                shared,
                kick,
            ),
            log,
        }
    }

    pub(super) fn read(&mut self, register: u32) -> u32 {
        let mut data = [0xaa; 4];
        self.device.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn write(&mut self, register: u32, value: u32) {
        self.device.write(register.into(), &value.to_le_bytes());
    }

    pub(super) fn fault_count(&self) -> u64 {
        self.device.shared.faults.total()
    }

    pub(super) fn set_status(&mut self, status: u32) -> u32 {
        self.write(VIRTIO_MMIO_STATUS, status);
        self.read(VIRTIO_MMIO_STATUS)
    }

    pub(super) fn negotiate(&mut self) {
        assert_eq!(self.set_status(ACKNOWLEDGE), ACKNOWLEDGE);
        assert_eq!(self.set_status(DRIVER), DRIVER);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES, MODERN);
        assert_eq!(self.set_status(FEATURES_OK), FEATURES_OK);
    }

    pub(super) fn set_up_queue(&mut self, index: u32, size: u32, rings: [u32; 3]) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, index);
        self.write(VIRTIO_MMIO_QUEUE_NUM, size);
        self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, rings[0]);
        self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, rings[1]);
        self.write(VIRTIO_MMIO_QUEUE_USED_LOW, rings[2]);
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    pub(super) fn start_device(&mut self) {
        self.negotiate();
        self.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
        self.set_up_queue(1, 8, [0x4000, 0x5000, 0x6000]);
        assert_eq!(self.set_status(DRIVER_OK), DRIVER_OK);
    }
}

#[test]
fn identity_and_features_are_readable() {
    let mut guest = MmioGuest::new();
    let identity = [0, 4, 8].map(|register| guest.read(register));
    assert_eq!(identity, [0x7472_6976, 2, 99]);
    assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_FEATURES), 0b100 | 1 << VIRTIO_RING_F_EVENT_IDX);
    guest.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_FEATURES), MODERN);
    for select in [2, u32::MAX] {
        guest.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
        assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    }
    assert_eq!(guest.fault_count(), 0);
}

#[test]
fn driver_can_initialize_reset_and_repeat() {
    let mut guest = MmioGuest::new();
    guest.start_device();
    assert_eq!(*guest.log.0.lock().unwrap(), ["start"]);
    guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    assert_eq!(guest.fault_count(), 0);
    assert_eq!(guest.set_status(0), 0);
    assert_eq!(*guest.log.0.lock().unwrap(), ["start", "stop"]);
    guest.start_device();
    assert_eq!(guest.fault_count(), 0);
}

#[test]
fn status_advances_one_step_and_never_back() {
    let all = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
    for (reached, now) in all.iter().enumerate() {
        for value in (0..=255u32).filter(|value| value & (0x80 | *now) != *now || *value == *now) {
            let mut guest = MmioGuest::new();
            guest.negotiate();
            guest.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
            guest.set_up_queue(1, 8, [0x4000, 0x5000, 0x6000]);
            guest.device.shared.status.store(*now, Ordering::SeqCst);
            let after = guest.set_status(value);
            let expected = match value {
                0 => 0,
                value if value & 0x80 != 0 => *now | 0x80,
                _ => *now,
            };
            assert_eq!(after, expected, "{reached}: {now:#x} then {value:#x}");
        }
    }
    let mut guest = MmioGuest::new();
    for (value, expected) in
        [(DRIVER, 0), (FEATURES_OK, 0), (DRIVER_OK, 0), (0x40, 0), (ACKNOWLEDGE | 0x10, 0)]
    {
        assert_eq!(guest.set_status(value), expected);
    }
    assert_eq!(guest.fault_count(), 5);
}

#[test]
fn feature_that_was_not_offered_is_refused() {
    for (select, value) in [(0, 1 << 28), (0, u32::MAX), (1, MODERN | 2), (1, 0)] {
        let mut guest = MmioGuest::new();
        guest.set_status(ACKNOWLEDGE);
        guest.set_status(DRIVER);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES, MODERN);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES, value);
        assert_eq!(guest.set_status(FEATURES_OK), DRIVER, "{select} {value:#x}");
    }
}

#[test]
fn features_are_read_only_after_negotiation() {
    let mut guest = MmioGuest::new();
    guest.start_device();
    let before = guest.device.driver_features;
    for select in [0, 1, 2] {
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    }
    assert_eq!(guest.device.driver_features, before);
    assert_eq!(guest.fault_count(), 3);
}

#[test]
fn queue_registers_are_read_only_while_in_use() {
    let mut guest = MmioGuest::new();
    guest.start_device();
    let registers = [
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_READY,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_DESC_HIGH,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        VIRTIO_MMIO_QUEUE_USED_LOW,
        VIRTIO_MMIO_QUEUE_USED_HIGH,
    ];
    let before = format!("{:?}", guest.device.queues);
    for register in registers {
        guest.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        guest.write(register, 0);
    }
    assert_eq!(format!("{:?}", guest.device.queues), before);
    assert_eq!(guest.fault_count(), 8);
    // The same holds for a queue marked ready before `DRIVER_OK`.
    let mut guest = MmioGuest::new();
    guest.negotiate();
    guest.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    guest.write(VIRTIO_MMIO_QUEUE_NUM, 4);
    assert_eq!((guest.device.queues[0].size, guest.fault_count()), (16, 1));
}

#[test]
fn unusable_queue_sets_needs_reset() {
    let good = [0x1000, 0x2000, 0x3000];
    let end = u32::try_from(RAM).unwrap();
    let bad: [(u32, [u32; 3]); 14] = [
        (0, good),
        (3, good),
        (32, good),
        (65536 + 16, good),
        (u32::MAX, good),
        (16, [0x1001, 0x2000, 0x3000]),
        (16, [0x1000, 0x2001, 0x3000]),
        (16, [0x1000, 0x2000, 0x3002]),
        (16, [end, 0x2000, 0x3000]),
        (16, [end - 16, 0x2000, 0x3000]),
        (16, [0x1000, end - 2, 0x3000]),
        (16, [0x1000, 0x2000, end - 4]),
        // In the device hole.
        (16, [0xd000_0000, 0x2000, 0x3000]),
        (16, [0x1000, 0x2000, 0xfee0_0000]),
    ];
    for (size, rings) in bad {
        let mut guest = MmioGuest::new();
        guest.negotiate();
        guest.set_up_queue(1, 8, [0x4000, 0x5000, 0x6000]);
        guest.set_up_queue(0, size, rings);
        let after = guest.set_status(DRIVER_OK);
        assert_eq!(after, FEATURES_OK | VIRTIO_CONFIG_S_NEEDS_RESET, "{size} {rings:x?}");
        assert!(guest.log.0.lock().unwrap().is_empty());
        // Only a reset makes the device usable again.
        assert_ne!(guest.set_status(DRIVER_OK), DRIVER_OK);
        assert_eq!(guest.set_status(0), 0);
        guest.start_device();
    }
}

#[test]
fn missing_queue_sets_needs_reset() {
    let mut guest = MmioGuest::new();
    guest.negotiate();
    guest.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    assert_ne!(guest.set_status(DRIVER_OK) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
}

#[test]
fn queue_select_out_of_range_selects_nothing() {
    let mut guest = MmioGuest::new();
    guest.negotiate();
    for select in [2, 3, 0xffff, u32::MAX] {
        guest.write(VIRTIO_MMIO_QUEUE_SEL, select);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
        guest.write(VIRTIO_MMIO_QUEUE_NUM, 8);
    }
    assert_eq!(guest.fault_count(), 4);
}

#[test]
fn notification_of_stopped_queue_is_a_fault() {
    let mut guest = MmioGuest::new();
    guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    guest.start_device();
    for queue in [2, 0xffff, u32::MAX] {
        guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }
    assert_eq!(guest.fault_count(), 4);
}

#[test]
fn partial_register_access_is_a_fault() {
    let mut guest = MmioGuest::new();
    for (offset, bytes) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xff, 1), (0xfc, 8), (0x0c, 3)]
    {
        let mut data = vec![0xaa; bytes];
        guest.device.read(offset, &mut data);
        assert!(data.iter().all(|byte| *byte == 0), "{offset:#x} {bytes}");
        guest.device.write(offset, &data);
    }
    assert_eq!(guest.fault_count(), 16);
}

#[test]
fn no_register_or_value_causes_a_panic() {
    // Every register is written before any driver and while one runs.
    for running in [false, true] {
        let mut guest = MmioGuest::new();
        for register in (0..0x1000u32).step_by(4) {
            for value in [0, 1, 0xff, 0x8000_0000, u32::MAX] {
                if running && guest.read(VIRTIO_MMIO_STATUS) != DRIVER_OK {
                    guest.set_status(0);
                    guest.start_device();
                }
                guest.read(register);
                guest.write(register, value);
            }
        }
    }
}

#[test]
fn config_space_is_readable_and_read_only() {
    let mut guest = MmioGuest::new();
    let mut data = [0; 8];
    guest.device.read(0x100, &mut data);
    assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 8]);
    // A read across the end returns the bytes before it, and zeros.
    guest.device.read(0x108, &mut data);
    assert_eq!(data, [9, 10, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.fault_count(), 0);
    for offset in [0x10a, 0x200, 0xff8, u64::MAX - 8] {
        guest.device.read(offset, &mut data);
        assert_eq!(data, [0; 8]);
    }
    guest.device.write(0x100, &[9]);
    assert_eq!(guest.fault_count(), 5);
}

#[test]
fn interrupt_is_pending_until_acknowledged() {
    let mut guest = MmioGuest::new();
    guest.device.shared.trigger(Signal::Queue);
    guest.device.shared.trigger(Signal::Config);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    assert_eq!(guest.device.shared.irq.read().unwrap(), 2);
    guest.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    guest.set_status(0);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn handler_fault_sets_needs_reset_and_interrupts() {
    let mut guest = MmioGuest::new();
    guest.start_device();
    guest.device.shared.set_needs_reset(GuestFault::AvailableRing { queue: 0 });
    assert_eq!(guest.read(VIRTIO_MMIO_STATUS), DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(guest.device.shared.irq.read().unwrap(), 1);
}

#[test]
fn repeated_resets_leave_no_state() {
    let mut guest = MmioGuest::new();
    for _ in 0..10_000 {
        guest.start_device();
        guest.set_status(0);
    }
    assert_eq!(guest.fault_count(), 0);
    assert_eq!(guest.device.ram.read_obj::<u64>(GuestAddress(0x3000)).unwrap(), 0);
}
