//! Attacks by the headers and the payload of vsock packets.

use chitin_vmm::virtio::PacketFault;
use chitin_vmm::virtio::vsock::packet::{CHANNEL_ADDR, Header, Op, VsockAddr};

use super::{AttackList, CARRIED_ON, Expected, carried_on_after};
use crate::PING;
use crate::driver::{Descriptor, Driver, PORT, RECEIVE, TRANSMIT, header, payload_header};

pub(super) fn add_to(list: &mut AttackList) {
    add_addresses(list);
    add_types_and_operations(list);
    add_lengths(list);
    add_credit(list);
}

fn add_addresses(list: &mut AttackList) {
    list.add_survived(
        "packet from another CID",
        carried_on_after(PacketFault::SourceCid),
        |program, driver| {
            for cid in [0, 1, 2, 4, u64::MAX] {
                let source = VsockAddr { cid, port: PORT };
                driver.send(program, Header { source, ..payload_header(PING) }, PING);
            }
        },
    );
    list.add_survived(
        "packet to another CID",
        carried_on_after(PacketFault::DestinationCid),
        |program, driver| {
            for cid in [0, 1, 3, 4, u64::MAX] {
                let destination = VsockAddr { cid, ..CHANNEL_ADDR };
                driver.send(program, Header { destination, ..payload_header(PING) }, PING);
                driver.receive(program, Op::Rst);
            }
        },
    );
    list.add(
        "payload without a connection",
        carried_on_after(PacketFault::NotConnected),
        |program| {
            let mut driver = Driver::vsock(0);
            driver.start(program);
            driver.send(program, payload_header(PING), PING);
            driver.receive(program, Op::Rst);
            driver.connect(program);
            driver.exchange_ping(program);
            program.write_log(CARRIED_ON);
        },
    );
}

fn add_types_and_operations(list: &mut AttackList) {
    list.add_cut_off("unknown operation", PacketFault::UnknownOp, |program, driver| {
        driver.send(program, Header { op: None, ..header(Op::Rw) }, &[]);
    });
    list.add_cut_off(
        "packet of another socket type",
        PacketFault::SocketType,
        |program, driver| {
            driver.send(program, Header { socket_type: 2, ..payload_header(PING) }, PING);
        },
    );
    list.add_cut_off(
        "response without a request",
        PacketFault::UnexpectedResponse,
        |program, driver| driver.send(program, header(Op::Response), &[]),
    );
}

fn add_lengths(list: &mut AttackList) {
    list.add_cut_off(
        "length of 4 GiB in a packet of four bytes",
        PacketFault::LengthBeyondBuffers,
        |program, driver| {
            driver.send(program, Header { len: u32::MAX, ..payload_header(PING) }, PING);
        },
    );
    list.add_cut_off(
        "packet of more than 64 KiB with all its payload",
        PacketFault::PayloadTooLong,
        |program, driver| {
            let len = 64 * 1024 + 1;
            let header = Header { len, ..header(Op::Rw) };
            let first = driver.put_packet(program, header, &[], 1)[0].chained();
            let payload = Descriptor::readable(driver.buffer(RECEIVE, 0), len);
            driver.add_chain(program, TRANSMIT, &[first, payload]);
        },
    );
    list.add_survived("packet over twelve descriptors", Expected::Harmless, |program, driver| {
        let chain = driver.put_packet(program, payload_header(PING), PING, 12);
        assert_eq!(chain.len(), 12);
        driver.add_chain(program, TRANSMIT, &chain);
        driver.expect_pong(program);
    });
}

fn add_credit(list: &mut AttackList) {
    list.add_survived("fwd_cnt beyond what was sent", Expected::Harmless, |program, driver| {
        // Such a guest has no credit, so the pong does not come.
        driver.send(program, Header { fwd_cnt: 1000, ..payload_header(PING) }, PING);
        driver.receive(program, Op::CreditRequest);
        let update = Header { buf_alloc: u32::MAX, fwd_cnt: 4, ..header(Op::CreditUpdate) };
        driver.send(program, update, &[]);
        driver.expect_pong(program);
    });
}
