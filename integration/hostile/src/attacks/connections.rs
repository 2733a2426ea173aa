//! Attacks by requests, resets, shutdowns and floods on vsock connections.

use chitin_vmm::virtio::PacketFault;
use chitin_vmm::virtio::vsock::CHANNEL_PORT;
use chitin_vmm::virtio::vsock::connection::MAX_PENDING_CONTROL;
use chitin_vmm::virtio::vsock::packet::{
    CHANNEL_ADDR, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, VsockAddr,
};

use super::{AttackList, CARRIED_ON, CUT_OFF, Expected, carried_on_after, connected_driver};
use crate::PING;
use crate::driver::{
    DRIVER_OK, Driver, RECEIVE, TRANSMIT, VSOCK_QUEUE_SIZES, header, payload_header,
};
use crate::host::HostBehavior;
use crate::program::{Program, Width};

pub(super) fn add_to(list: &mut AttackList) {
    add_requests(list);
    add_refusals_without_buffers(list);
    add_hosts_that_never_read(list);
    add_shutdowns(list);
}

fn add_requests(list: &mut AttackList) {
    list.add(
        "10,000 resets without a connection",
        carried_on_after(PacketFault::NotConnected),
        |program| {
            let mut driver = Driver::vsock(0);
            driver.start(program);
            send_flood(program, &mut driver, &header(Op::Rst), 10_000, |_, _| {});
            driver.connect(program);
            driver.exchange_ping(program);
            program.write_log(CARRIED_ON);
        },
    );
    list.add_survived(
        "10,000 requests beside an open connection",
        carried_on_after(PacketFault::SecondConnection),
        |program, driver| {
            send_flood(program, driver, &header(Op::Request), 10_000, |program, driver| {
                // The refusal has used one buffer. Two were used before the flood, so that there is
                // always room in the ring.
                program.add_to_u16(driver.available_index(RECEIVE), 1);
                driver.notify(program, RECEIVE);
            });
            driver.skip_received(program, 10_002);
        },
    );
    list.add_survived(
        "requests to closed ports",
        carried_on_after(PacketFault::ClosedPort),
        |program, driver| {
            for port in [0, 22, CHANNEL_PORT - 1, CHANNEL_PORT + 1, u32::MAX] {
                driver.send(program, request_to(port), &[]);
                driver.receive(program, Op::Rst);
            }
        },
    );
    list.add(
        "request after a reset of the connection",
        Expected::CutOff(Some(PacketFault::SecondConnection.into())),
        |program| {
            let mut driver = connected_driver(program);
            driver.send(program, header(Op::Rst), &[]);
            driver.send(program, header(Op::Request), &[]);
            driver.receive(program, Op::Rst);
            program.write_log(CUT_OFF);
        },
    );
}

fn request_to(port: u32) -> Header {
    let destination = VsockAddr { port, ..CHANNEL_ADDR };
    Header { destination, ..header(Op::Request) }
}

fn add_refusals_without_buffers(list: &mut AttackList) {
    list.add(
        "refusals without receive buffers",
        carried_on_after(PacketFault::ClosedPort),
        |program| {
            let mut driver = Driver::vsock(0);
            driver.start(program);
            driver.write_status(program, 0);
            program.store(Width::W16, driver.available_index(RECEIVE), 0);
            driver.negotiate(program);
            driver.set_up_queues(program);
            driver.write_status(program, DRIVER_OK);
            let packet = driver.put_packet(program, request_to(9), &[], 1);
            let buffers = VSOCK_QUEUE_SIZES[usize::from(RECEIVE)];
            let (sent, pending) = (100, u16::try_from(MAX_PENDING_CONTROL).unwrap_or(u16::MAX));
            for _ in 0..sent {
                driver.add_chain(program, TRANSMIT, &packet);
            }
            // The device takes as many packets as it keeps refusals, then as many more as there are
            // buffers each time.
            program.wait_until(driver.used_index(TRANSMIT), pending);
            for added in (buffers..sent + buffers).step_by(buffers.into()) {
                program.add_to_u16(driver.available_index(RECEIVE), buffers);
                driver.notify(program, RECEIVE);
                program.wait_until(driver.used_index(TRANSMIT), sent.min(pending + added));
                program.wait_until(driver.used_index(RECEIVE), sent.min(added));
            }
            driver.skip_received(program, sent);
            driver.connect(program);
            driver.exchange_ping(program);
            program.write_log(CARRIED_ON);
        },
    );
}

fn add_hosts_that_never_read(list: &mut AttackList) {
    let within =
        list.add("host that never reads, within the credit", Expected::Harmless, |program| {
            let mut driver = Driver::vsock(0);
            driver.start(program);
            driver.connect(program);
            let payload = [0; 4000];
            let packet = driver.put_packet(program, payload_header(&payload), &payload, 1);
            for _ in 0..64 {
                driver.add_chain(program, TRANSMIT, &packet);
            }
            driver.wait_until_used(program, TRANSMIT);
            driver.send(program, header(Op::CreditRequest), &[]);
            driver.receive(program, Op::CreditUpdate);
            program.write_log(CARRIED_ON);
        });
    within.host = HostBehavior::NeverReads;
    let beyond = list.add(
        "host that never reads, beyond the credit",
        Expected::CutOff(Some(PacketFault::CreditExceeded.into())),
        |program| {
            let mut driver = Driver::vsock(0);
            driver.start(program);
            driver.connect(program);
            // 64 packets use up the credit and a few more are on their way. Each one after that is
            // answered by a reset.
            send_flood(program, &mut driver, &payload_header(&[0; 4000]), 100, |_, _| {});
            driver.receive(program, Op::Rst);
            program.write_log(CUT_OFF);
        },
    );
    beyond.host = HostBehavior::NeverReads;
}

fn add_shutdowns(list: &mut AttackList) {
    let shutdown = |flags| Header { flags, ..header(Op::Shutdown) };
    list.add_survived(
        "SHUTDOWN with undefined flags only",
        Expected::Harmless,
        move |program, driver| driver.send(program, shutdown(!SHUTDOWN_BOTH), &[]),
    );
    for (name, flags) in [
        ("SHUTDOWN of the receiving half", SHUTDOWN_RECEIVE),
        ("SHUTDOWN of the sending half", SHUTDOWN_SEND),
    ] {
        list.add(name, Expected::Harmless, move |program| {
            let mut driver = connected_driver(program);
            driver.send(program, shutdown(flags), &[]);
            driver.send(program, header(Op::CreditRequest), &[]);
            driver.receive(program, Op::CreditUpdate);
            program.write_log(CARRIED_ON);
        });
    }
    list.add_cut_off("SHUTDOWN of both halves", None, move |program, driver| {
        driver.send(program, shutdown(SHUTDOWN_BOTH), &[]);
    });
    list.add_cut_off(
        "payload after SHUTDOWN",
        PacketFault::PayloadAfterShutdown,
        move |program, driver| {
            driver.send(program, shutdown(SHUTDOWN_SEND), &[]);
            driver.send(program, payload_header(PING), PING);
        },
    );
}

/// Sends the same header many times. Without payload each comes from another port, never the
/// guest's own.
fn send_flood(
    program: &mut Program,
    driver: &mut Driver,
    header: &Header,
    times: u16,
    after_each: impl Fn(&mut Program, &mut Driver),
) {
    let payload = vec![0; usize::try_from(header.len).unwrap_or(0)];
    let buffer = driver.fill_transmit_ring(program, &[&header.to_bytes()[..], &payload].concat());
    program.repeat(times.into(), |program| {
        if header.len == 0 {
            // The upper bits of the port are set as well, so that it never is the guest's own.
            program.store_loop_counter(buffer + 16);
            program.store(Width::W8, buffer + 19, 1);
        }
        program.add_to_u16(driver.available_index(TRANSMIT), 1);
        driver.notify(program, TRANSMIT);
        driver.wait_until_used(program, TRANSMIT);
        after_each(program, driver);
    });
    driver.record_added(times);
}
