//! Attacks by the addresses, sizes and indices of queues.

use chitin_vmm::arch::x86_64::layout::DEVICE_HOLE;
use chitin_vmm::virtio::{GuestFault, PacketFault};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL,
};

use super::{AttackList, Expected, carried_on_after, connect_and_carry_on, connected_driver};
use crate::PING;
use crate::driver::{
    DRIVER_OK, Descriptor, Driver, FEATURES_OK, NEEDS_RESET, RECEIVE, TRANSMIT, VSOCK,
    VSOCK_QUEUE_SIZES, payload_header,
};
use crate::program::{Program, RAM_END, Width};

/// The queue that reports events.
const EVENT: u16 = 2;
const RECEIVE_SIZE: u16 = VSOCK_QUEUE_SIZES[0];
const TRANSMIT_SIZE: u16 = VSOCK_QUEUE_SIZES[1];

pub(super) fn add_to(list: &mut AttackList) {
    add_unusable_queues(list);
    add_invalid_indices(list);
    add_changes_in_use(list);
}

fn add_unusable_queues(list: &mut AttackList) {
    let unusable = |queue| Expected::CarriedOn(GuestFault::UnusableQueue { queue });
    for (name, size) in [
        ("queue of size zero", 0),
        ("queue size that is not a power of two", 3),
        ("queue of more than the largest size", 128),
        ("queue of 2¹⁶ descriptors", 1 << 16),
        ("queue of 2³¹ descriptors", 1 << 31),
    ] {
        list.add(name, unusable(RECEIVE), move |program| {
            let driver = Driver::vsock(0);
            set_up_unusable_queue(program, &driver, RECEIVE, size, driver.rings(RECEIVE));
        });
    }
    type Move = fn([u64; 3]) -> [u64; 3];
    let moves: [(&str, Move); 7] = [
        ("misaligned descriptor table", |[table, available, used]| [table + 8, available, used]),
        ("misaligned available ring", |[table, available, used]| [table, available + 1, used]),
        ("misaligned used ring", |[table, available, used]| [table, available, used + 2]),
        ("rings across the end of memory", |[_, available, used]| [RAM_END - 16, available, used]),
        ("rings in the device hole", |[table, available, _]| [table, available, VSOCK]),
        ("rings from memory into the device hole", |[table, available, _]| {
            [table, available, DEVICE_HOLE.0 - 4]
        }),
        ("rings at the end of the address space", |[table, _, used]| [table, u64::MAX - 1, used]),
    ];
    for (name, change) in moves {
        list.add(name, unusable(TRANSMIT), move |program| {
            let driver = Driver::vsock(0);
            let rings = change(driver.rings(TRANSMIT));
            set_up_unusable_queue(program, &driver, TRANSMIT, TRANSMIT_SIZE.into(), rings);
        });
    }
    list.add("queue that is not ready", unusable(TRANSMIT), |program| {
        let driver = Driver::vsock(0);
        driver.negotiate(program);
        driver.set_up_queue(program, RECEIVE, RECEIVE_SIZE.into(), driver.rings(RECEIVE));
        expect_start_refused(program, &driver);
    });
}

/// Sets up one queue differently, and expects the device to refuse to start.
fn set_up_unusable_queue(
    program: &mut Program,
    driver: &Driver,
    queue: u16,
    size: u32,
    rings: [u64; 3],
) {
    driver.negotiate(program);
    driver.set_up_queues(program);
    driver.write_register(program, VIRTIO_MMIO_QUEUE_SEL, queue.into());
    driver.write_register(program, VIRTIO_MMIO_QUEUE_READY, 0);
    driver.set_up_queue(program, queue, size, rings);
    expect_start_refused(program, driver);
}

fn expect_start_refused(program: &mut Program, driver: &Driver) {
    driver.write_status(program, DRIVER_OK);
    let refused = FEATURES_OK | NEEDS_RESET;
    driver.expect_status(program, refused, "the device starts with an unusable queue");
    connect_and_carry_on(program, 1);
}

fn add_invalid_indices(list: &mut AttackList) {
    list.add_needs_reset(
        "available index ahead by more than the queue size",
        GuestFault::AvailableRing { queue: TRANSMIT },
        |program, driver| {
            let index = driver.available_index(TRANSMIT);
            program.store(Width::W16, index, u64::from(TRANSMIT_SIZE) + 1);
            driver.notify(program, TRANSMIT);
        },
    );
    list.add(
        "available index of the receive queue too far ahead",
        Expected::Ended(GuestFault::AvailableRing { queue: RECEIVE }),
        |program| {
            let mut driver = connected_driver(program);
            // Two packets have been received, so this is ahead by two more than the size.
            let index = driver.available_index(RECEIVE);
            program.store(Width::W16, index, u64::from(RECEIVE_SIZE) + 4);
            driver.send(program, payload_header(PING), PING);
            program.repeat_forever(|_| {});
        },
    );
    list.add(
        "used ring overlapping the descriptor table",
        carried_on_after(PacketFault::ShortHeader),
        |program| {
            let mut driver = Driver::vsock(0);
            driver.negotiate(program);
            let [table, available, _] = driver.rings(TRANSMIT);
            for queue in [RECEIVE, EVENT] {
                let size = VSOCK_QUEUE_SIZES[usize::from(queue)];
                driver.set_up_queue(program, queue, size.into(), driver.rings(queue));
            }
            let rings = [table, available, table];
            driver.set_up_queue(program, TRANSMIT, TRANSMIT_SIZE.into(), rings);
            driver.write_status(program, DRIVER_OK);
            let buffer = Descriptor::readable(driver.buffer(TRANSMIT, 0), 4);
            driver.add_chain(program, TRANSMIT, &[buffer]);
            program.wait_until(table + 2, 1);
            connect_and_carry_on(program, 1);
        },
    );
}

fn add_changes_in_use(list: &mut AttackList) {
    for (name, register, value) in [
        ("queue moved while in use", VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000),
        ("queue resized while in use", VIRTIO_MMIO_QUEUE_NUM, 2),
        ("queue disabled while in use", VIRTIO_MMIO_QUEUE_READY, 0),
    ] {
        let fault = GuestFault::RegisterWrite { offset: register.into(), status: DRIVER_OK };
        list.add_survived(name, Expected::CarriedOn(fault), move |program, driver| {
            for queue in [RECEIVE, TRANSMIT, EVENT] {
                driver.write_register(program, VIRTIO_MMIO_QUEUE_SEL, queue.into());
                driver.write_register(program, register, value);
            }
        });
    }
}
