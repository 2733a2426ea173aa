use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_STATUS,
};

use super::super::tests::{IdleHandler, MmioGuest, RAM};
use super::*;
use crate::virtio::{GuestFault, Interrupt, Signal};

#[test]
fn restored_device_continues_where_saved() {
    let mut guest = MmioGuest::new();
    guest.start_device();
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 1);
    guest.device.shared.trigger(Signal::Queue);
    let state = guest.device.save(Some(&IdleHandler)).unwrap();
    assert_eq!(state.queues[1].rings, [0x4000, 0x5000, 0x6000]);
    assert_eq!((state.queues[0].next_available, state.queues[0].next_used), (3, 2));

    let mut other = MmioGuest::new();
    other.device.restore(&state).unwrap();
    assert_eq!(*other.log.0.lock().unwrap(), ["start"]);
    assert_eq!(other.device.save(Some(&IdleHandler)).unwrap(), state);
    assert_eq!(other.read(VIRTIO_MMIO_STATUS), DRIVER_OK);
    assert_eq!(other.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    assert_eq!(other.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 8);
    // The interrupt that was not acknowledged is raised again.
    assert_eq!(other.device.shared.irq.read().unwrap(), 1);
    assert_eq!(other.fault_count(), 0);
}

#[test]
fn device_without_driver_can_be_saved() {
    let mut guest = MmioGuest::new();
    guest.negotiate();
    let state = guest.device.save(None).unwrap();
    let mut other = MmioGuest::new();
    other.device.restore(&state).unwrap();
    assert!(other.log.0.lock().unwrap().is_empty());
    other.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    other.set_up_queue(1, 8, [0x4000, 0x5000, 0x6000]);
    assert_eq!(other.set_status(DRIVER_OK), DRIVER_OK);
}

#[test]
fn changing_or_failed_device_is_not_saved() {
    let mut guest = MmioGuest::new();
    assert!(guest.device.save(Some(&IdleHandler)).is_err());
    guest.start_device();
    assert!(guest.device.save(None).is_err());
    guest.device.shared.set_needs_reset(GuestFault::Notification { queue: 9 });
    assert_eq!(guest.device.save(Some(&IdleHandler)), Err(NotQuiescent::DeviceFailed));
}

#[test]
fn unfinished_negotiation_can_be_saved() {
    let mut guest = MmioGuest::new();
    for status in [1, 3] {
        guest.set_status(status);
    }
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    let state = guest.device.save(None).unwrap();
    let mut other = MmioGuest::new();
    other.device.restore(&state).unwrap();
    // The driver learns of it when it sets `FEATURES_OK`.
    assert_eq!(other.set_status(11), 3);
}

#[test]
fn unreachable_saved_state_is_refused() {
    let mut guest = MmioGuest::new();
    guest.start_device();
    let good = guest.device.save(Some(&IdleHandler)).unwrap();
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
        let mut other = MmioGuest::new();
        assert!(other.device.restore(&state).is_err(), "{number}");
        assert!(other.log.0.lock().unwrap().is_empty());
    }
    // Any position is accepted: the queue finds out.
    let mut state = good;
    (state.queues[0].next_available, state.queues[0].next_used) = (u16::MAX, 77);
    MmioGuest::new().device.restore(&state).unwrap();
}
