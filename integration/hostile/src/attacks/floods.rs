//! Attacks by large numbers of notifications, chains and resets, and by resets at a bad moment.

use chitin_vmm::virtio::vsock::packet::Op;
use chitin_vmm::virtio::{GuestFault, PacketFault};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_STATUS,
};

use super::{
    AttackList, CUT_OFF, Expected, carried_on_after, connect_and_carry_on, connected_driver,
};
use crate::driver::{Driver, RECEIVE, TRANSMIT, VSOCK, VSOCK_QUEUE_SIZES, header, payload_header};

/// `VIRTIO_CONFIG_S_FAILED`.
const FAILED: u32 = 128;

pub(super) fn add_to(list: &mut AttackList) {
    add_notifications(list);
    add_malformed_chains(list);
    add_resets(list);
}

fn add_notifications(list: &mut AttackList) {
    list.add_survived(
        "100,000 notifications of empty queues",
        Expected::Harmless,
        |program, driver| {
            program.repeat(50_000, |program| {
                driver.notify(program, TRANSMIT);
                driver.notify(program, RECEIVE);
            });
        },
    );
    list.add_survived(
        "notifications of queues that do not exist",
        Expected::CarriedOn(GuestFault::Notification { queue: 3 }),
        |program, driver| {
            for queue in [3, 0xffff, u32::MAX] {
                driver.write_register(program, VIRTIO_MMIO_QUEUE_NOTIFY, queue);
            }
        },
    );
    list.add(
        "notifications before the device is ready",
        Expected::CarriedOn(GuestFault::Notification { queue: RECEIVE.into() }),
        |program| {
            let driver = Driver::vsock(0);
            driver.notify(program, RECEIVE);
            program.repeat(1000, |program| driver.notify(program, TRANSMIT));
            connect_and_carry_on(program, 0);
        },
    );
}

fn add_malformed_chains(list: &mut AttackList) {
    list.add_survived(
        "25,600 malformed chains, with interrupts",
        carried_on_after(PacketFault::ShortHeader),
        |program, driver| {
            let size = VSOCK_QUEUE_SIZES[usize::from(TRANSMIT)];
            driver.fill_transmit_ring(program, &[0; 4]);
            program.repeat(200, |program| {
                program.add_to_u16(driver.available_index(TRANSMIT), size);
                driver.notify(program, TRANSMIT);
                driver.wait_until_used(program, TRANSMIT);
                driver.write_register(program, VIRTIO_MMIO_INTERRUPT_ACK, 1);
            });
            driver.record_added(size.wrapping_mul(200));
        },
    );
}

fn add_resets(list: &mut AttackList) {
    list.add("2,000 resets", Expected::Harmless, |program| {
        let driver = Driver::vsock(0);
        program.repeat(2000, |program| {
            for status in [1, 3, 0] {
                driver.write_status(program, status);
            }
        });
        connect_and_carry_on(program, 1);
    });
    list.add("300 resets of a device in use", Expected::Harmless, |program| {
        program.repeat(300, |program| Driver::vsock(0).start(program));
        Driver::vsock(0).start(program);
        connect_and_carry_on(program, 1);
    });
    list.add(
        "reset during a transfer",
        Expected::CutOff(Some(PacketFault::SecondConnection.into())),
        |program| {
            let mut driver = connected_driver(program);
            let payload = [0; 4000];
            let packet = driver.put_packet(program, payload_header(&payload), &payload, 1);
            for _ in 0..16 {
                driver.add_chain(program, TRANSMIT, &packet);
            }
            let mut driver = Driver::vsock(1);
            driver.start(program);
            driver.send(program, header(Op::Request), &[]);
            driver.receive(program, Op::Rst);
            program.write_log(CUT_OFF);
        },
    );
    list.add("driver that sets FAILED", Expected::Harmless, |program| {
        let mut driver = Driver::vsock(0);
        driver.start(program);
        driver.write_status(program, FAILED);
        let register = VSOCK + u64::from(VIRTIO_MMIO_STATUS);
        program.expect_bits(register, FAILED, FAILED, "FAILED is not kept");
        driver.notify(program, TRANSMIT);
        connect_and_carry_on(program, 1);
    });
}
