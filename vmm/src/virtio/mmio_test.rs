use std::sync::Mutex;

use vm_memory::Bytes;

use super::*;
use crate::state::machine::ConnectionRequest;
use crate::virtio::{Flow, test_ram};

const RAM: usize = 1 << 20;
const MODERN: u32 = 1; // VIRTIO_F_VERSION_1, in the upper half

/// Counts what the transport asks of the VMM thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<&'static str>>>);

impl Worker for Log {
    fn start(&self, _: Box<dyn QueueHandler>, _: Arc<EventFd>) {
        self.0.lock().unwrap().push("start");
    }
    fn stop(&self) {
        self.0.lock().unwrap().push("stop");
    }
}

struct Model;

impl VirtioDevice for Model {
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
        Box::new(Idle)
    }
}

struct Idle;

impl QueueHandler for Idle {
    fn on_kick(&mut self) -> Result<Flow, GuestFault> {
        Ok(Flow::Continue)
    }
    fn save(&self) -> Result<(Vec<Position>, Option<ConnectionRequest>), NotQuiescent> {
        Ok((vec![Position { next_available: 3, next_used: 2 }; 2], None))
    }
}

struct Guest {
    device: MmioTransport<Log>,
    log: Log,
}

impl Guest {
    fn new() -> Self {
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let log = Log::default();
        let shared = Shared::new(eventfd());
        let kick = Arc::new(eventfd());
        Self {
            device: MmioTransport::new(Box::new(Model), log.clone(), test_ram(RAM), shared, kick),
            log,
        }
    }

    fn read(&mut self, register: u32) -> u32 {
        let mut data = [0xaa; 4];
        self.device.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: u32, value: u32) {
        self.device.write(register.into(), &value.to_le_bytes());
    }

    fn faults(&self) -> u64 {
        self.device.shared.faults.total()
    }

    fn status(&mut self, status: u32) -> u32 {
        self.write(VIRTIO_MMIO_STATUS, status);
        self.read(VIRTIO_MMIO_STATUS)
    }

    fn negotiate(&mut self) {
        assert_eq!(self.status(ACKNOWLEDGE), ACKNOWLEDGE);
        assert_eq!(self.status(DRIVER), DRIVER);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES, MODERN);
        assert_eq!(self.status(FEATURES_OK), FEATURES_OK);
    }

    fn queue(&mut self, index: u32, size: u32, rings: [u32; 3]) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, index);
        self.write(VIRTIO_MMIO_QUEUE_NUM, size);
        self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, rings[0]);
        self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, rings[1]);
        self.write(VIRTIO_MMIO_QUEUE_USED_LOW, rings[2]);
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn run(&mut self) {
        self.negotiate();
        self.queue(0, 16, [0x1000, 0x2000, 0x3000]);
        self.queue(1, 8, [0x4000, 0x5000, 0x6000]);
        assert_eq!(self.status(DRIVER_OK), DRIVER_OK);
    }
}

#[test]
fn identity_and_features_are_there() {
    let mut guest = Guest::new();
    let identity = [0, 4, 8].map(|register| guest.read(register));
    assert_eq!(identity, [0x7472_6976, 2, 99]);
    assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_FEATURES), 0b100 | 1 << VIRTIO_RING_F_EVENT_IDX);
    guest.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_FEATURES), MODERN);
    for select in [2, u32::MAX] {
        guest.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
        assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    }
    assert_eq!(guest.faults(), 0);
}

#[test]
fn a_driver_gets_through() {
    let mut guest = Guest::new();
    guest.run();
    assert_eq!(*guest.log.0.lock().unwrap(), ["start"]);
    guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    assert_eq!(guest.faults(), 0);
    assert_eq!(guest.status(0), 0);
    assert_eq!(*guest.log.0.lock().unwrap(), ["start", "stop"]);
    guest.run();
    assert_eq!(guest.faults(), 0);
}

#[test]
fn status_goes_one_step_at_a_time_and_never_back() {
    let all = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
    for (reached, now) in all.iter().enumerate() {
        for value in (0..=255u32).filter(|value| value & (0x80 | *now) != *now || *value == *now) {
            let mut guest = Guest::new();
            guest.negotiate();
            guest.queue(0, 16, [0x1000, 0x2000, 0x3000]);
            guest.queue(1, 8, [0x4000, 0x5000, 0x6000]);
            guest.device.shared.status.store(*now, Ordering::SeqCst);
            let after = guest.status(value);
            let expected = match value {
                0 => 0,
                value if value & 0x80 != 0 => *now | 0x80,
                _ => *now,
            };
            assert_eq!(after, expected, "{reached}: {now:#x} then {value:#x}");
        }
    }
    let mut guest = Guest::new();
    for (value, expected) in
        [(DRIVER, 0), (FEATURES_OK, 0), (DRIVER_OK, 0), (0x40, 0), (ACKNOWLEDGE | 0x10, 0)]
    {
        assert_eq!(guest.status(value), expected);
    }
    assert_eq!(guest.faults(), 5);
}

#[test]
fn features_not_offered_are_not_accepted() {
    for (select, value) in [(0, 1 << 28), (0, u32::MAX), (1, MODERN | 2), (1, 0)] {
        let mut guest = Guest::new();
        guest.status(ACKNOWLEDGE);
        guest.status(DRIVER);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES, MODERN);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES, value);
        assert_eq!(guest.status(FEATURES_OK), DRIVER, "{select} {value:#x}");
    }
}

#[test]
fn features_do_not_change_afterwards() {
    let mut guest = Guest::new();
    guest.run();
    let before = guest.device.driver_features;
    for select in [0, 1, 2] {
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    }
    assert_eq!(guest.device.driver_features, before);
    assert_eq!(guest.faults(), 3);
}

#[test]
fn queues_do_not_change_once_in_use() {
    let mut guest = Guest::new();
    guest.run();
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
    assert_eq!(guest.faults(), 8);
    // Nor while marked ready, before the driver is done.
    let mut guest = Guest::new();
    guest.negotiate();
    guest.queue(0, 16, [0x1000, 0x2000, 0x3000]);
    guest.write(VIRTIO_MMIO_QUEUE_NUM, 4);
    assert_eq!((guest.device.queues[0].size, guest.faults()), (16, 1));
}

#[test]
fn queues_that_cannot_be_used_are_refused_with_needs_reset() {
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
        let mut guest = Guest::new();
        guest.negotiate();
        guest.queue(1, 8, [0x4000, 0x5000, 0x6000]);
        guest.queue(0, size, rings);
        let after = guest.status(DRIVER_OK);
        assert_eq!(after, FEATURES_OK | VIRTIO_CONFIG_S_NEEDS_RESET, "{size} {rings:x?}");
        assert!(guest.log.0.lock().unwrap().is_empty());
        // Only a reset helps.
        assert_ne!(guest.status(DRIVER_OK), DRIVER_OK);
        assert_eq!(guest.status(0), 0);
        guest.run();
    }
}

#[test]
fn a_queue_left_out_is_refused() {
    let mut guest = Guest::new();
    guest.negotiate();
    guest.queue(0, 16, [0x1000, 0x2000, 0x3000]);
    assert_ne!(guest.status(DRIVER_OK) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
}

#[test]
fn queue_select_out_of_range_selects_nothing() {
    let mut guest = Guest::new();
    guest.negotiate();
    for select in [2, 3, 0xffff, u32::MAX] {
        guest.write(VIRTIO_MMIO_QUEUE_SEL, select);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
        guest.write(VIRTIO_MMIO_QUEUE_NUM, 8);
    }
    assert_eq!(guest.faults(), 4);
}

#[test]
fn notifications_need_a_queue_that_runs() {
    let mut guest = Guest::new();
    guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    guest.run();
    for queue in [2, 0xffff, u32::MAX] {
        guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }
    assert_eq!(guest.faults(), 4);
}

#[test]
fn registers_are_read_and_written_whole() {
    let mut guest = Guest::new();
    for (offset, bytes) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xff, 1), (0xfc, 8), (0x0c, 3)]
    {
        let mut data = vec![0xaa; bytes];
        guest.device.read(offset, &mut data);
        assert!(data.iter().all(|byte| *byte == 0), "{offset:#x} {bytes}");
        guest.device.write(offset, &data);
    }
    assert_eq!(guest.faults(), 16);
}

#[test]
fn no_register_or_value_does_harm() {
    // Every register, before any driver and while one runs.
    for running in [false, true] {
        let mut guest = Guest::new();
        for register in (0..0x1000u32).step_by(4) {
            for value in [0, 1, 0xff, 0x8000_0000, u32::MAX] {
                if running && guest.read(VIRTIO_MMIO_STATUS) != DRIVER_OK {
                    guest.status(0);
                    guest.run();
                }
                guest.read(register);
                guest.write(register, value);
            }
        }
    }
}

#[test]
fn configuration_is_read_in_any_size_and_never_written() {
    let mut guest = Guest::new();
    let mut data = [0; 8];
    guest.device.read(0x100, &mut data);
    assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 8]);
    // Across the end: what is there, and zeros.
    guest.device.read(0x108, &mut data);
    assert_eq!(data, [9, 10, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.faults(), 0);
    for offset in [0x10a, 0x200, 0xff8, u64::MAX - 8] {
        guest.device.read(offset, &mut data);
        assert_eq!(data, [0; 8]);
    }
    guest.device.write(0x100, &[9]);
    assert_eq!(guest.faults(), 5);
}

#[test]
fn interrupts_are_acknowledged() {
    let mut guest = Guest::new();
    guest.device.shared.trigger(Signal::Queue);
    guest.device.shared.trigger(Signal::Config);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    assert_eq!(guest.device.shared.line.read().unwrap(), 2);
    guest.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    guest.status(0);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn a_fault_of_the_running_half_is_told() {
    let mut guest = Guest::new();
    guest.run();
    guest.device.shared.needs_reset(GuestFault::AvailableRing { queue: 0 });
    assert_eq!(guest.read(VIRTIO_MMIO_STATUS), DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(guest.device.shared.line.read().unwrap(), 1);
}

#[test]
fn reset_storms_leave_nothing_behind() {
    let mut guest = Guest::new();
    for _ in 0..10_000 {
        guest.run();
        guest.status(0);
    }
    assert_eq!(guest.faults(), 0);
    assert_eq!(guest.device.ram.read_obj::<u64>(GuestAddress(0x3000)).unwrap(), 0);
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let mut guest = Guest::new();
    guest.run();
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 1);
    guest.device.shared.trigger(Signal::Queue);
    let state = guest.device.save(Some(&Idle)).unwrap();
    assert_eq!(state.queues[1].rings, [0x4000, 0x5000, 0x6000]);
    assert_eq!((state.queues[0].next_available, state.queues[0].next_used), (3, 2));

    let mut other = Guest::new();
    other.device.restore(&state).unwrap();
    assert_eq!(*other.log.0.lock().unwrap(), ["start"]);
    assert_eq!(other.device.save(Some(&Idle)).unwrap(), state);
    assert_eq!(other.read(VIRTIO_MMIO_STATUS), DRIVER_OK);
    assert_eq!(other.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    assert_eq!(other.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 8);
    // The interrupt that was not acknowledged is raised again.
    assert_eq!(other.device.shared.line.read().unwrap(), 1);
    assert_eq!(other.faults(), 0);
}

#[test]
fn a_device_without_a_driver_is_saved_too() {
    let mut guest = Guest::new();
    guest.negotiate();
    let state = guest.device.save(None).unwrap();
    let mut other = Guest::new();
    other.device.restore(&state).unwrap();
    assert!(other.log.0.lock().unwrap().is_empty());
    other.queue(0, 16, [0x1000, 0x2000, 0x3000]);
    other.queue(1, 8, [0x4000, 0x5000, 0x6000]);
    assert_eq!(other.status(DRIVER_OK), DRIVER_OK);
}

#[test]
fn a_device_that_is_changing_or_has_failed_is_not_saved() {
    let mut guest = Guest::new();
    assert!(guest.device.save(Some(&Idle)).is_err());
    guest.run();
    assert!(guest.device.save(None).is_err());
    guest.device.shared.needs_reset(GuestFault::Notify { queue: 9 });
    assert_eq!(guest.device.save(Some(&Idle)), Err(NotQuiescent("a device has failed")));
}

#[test]
fn a_driver_that_is_still_choosing_is_saved_with_any_choice() {
    let mut guest = Guest::new();
    for status in [1, 3] {
        guest.status(status);
    }
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    let state = guest.device.save(None).unwrap();
    let mut other = Guest::new();
    other.device.restore(&state).unwrap();
    // It is told when it says that it has chosen.
    assert_eq!(other.status(11), 3);
}

#[test]
fn a_state_that_no_driver_could_have_made_is_refused() {
    let mut guest = Guest::new();
    guest.run();
    let good = guest.device.save(Some(&Idle)).unwrap();
    let changes: [&dyn Fn(&mut DeviceState); 9] = [
        &|state| state.status = 0xff,
        &|state| state.status = VIRTIO_CONFIG_S_DRIVER_OK,
        &|state| state.features = !0,
        &|state| state.queues.truncate(1),
        &|state| state.queues[0].size = 3,
        &|state| state.queues[0].size = 1 << 16,
        &|state| state.queues[0].rings[0] = 0x1001,
        &|state| state.queues[1].rings[2] = RAM as u64,
        &|state| state.queues[1].ready = false,
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut state = good.clone();
        change(&mut state);
        let mut other = Guest::new();
        assert!(other.device.restore(&state).is_err(), "{number}");
        assert!(other.log.0.lock().unwrap().is_empty());
    }
    // Positions can be anything: the queue finds out.
    let mut state = good;
    (state.queues[0].next_available, state.queues[0].next_used) = (u16::MAX, 77);
    Guest::new().device.restore(&state).unwrap();
}
