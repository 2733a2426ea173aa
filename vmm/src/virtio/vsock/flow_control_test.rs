use std::io::{Read, Write};

use super::connection::MAX_PENDING_CONTROL;
use super::credit::BUFFER_BYTES;
use super::packet::{Header, Op, VsockAddr};
use super::test_guest::*;
use super::*;
use crate::virtio::PacketFault;

#[test]
fn unread_payload_is_bounded_and_blocks_nothing() {
    let (mut guest, mut host) = TestGuest::connected();
    let chunk = vec![7; 32768];
    let mut sent = 0;
    let mut forwarded = 0;
    // The guest sends as long as it has credit.
    while sent - forwarded + chunk.len() <= BUFFER_BYTES as usize {
        assert_eq!(guest.send_payload(&chunk), Flow::Continue);
        sent += chunk.len();
        for (header, _) in guest.received() {
            assert_eq!(header.op, Some(Op::CreditUpdate));
            forwarded = header.fwd_cnt as usize;
            guest.add_buffers(1, 4096);
        }
    }
    assert!(!guest.handler.is_drained());
    // Control packets are not stuck behind the payload.
    guest.send(header(Op::CreditRequest));
    assert_eq!(guest.received_ops(), [Op::CreditUpdate]);
    // All payload arrives once the host reads.
    let reader = std::thread::spawn(move || {
        let mut total = 0;
        let mut data = vec![0; 65536];
        while total < sent {
            total += host.read(&mut data).unwrap();
        }
        (total, host)
    });
    while !guest.handler.is_drained() {
        guest.signal_channel(false, true);
    }
    let (total, _host) = reader.join().unwrap();
    assert_eq!(total, sent);
    assert_eq!(guest.faults.total(), 0);
}

#[test]
fn guest_that_exceeds_credit_is_cut_off() {
    let (mut guest, mut host) = TestGuest::connected();
    let chunk = vec![7; 65536];
    let mut sent = 0;
    while guest.faults.total() == 0 {
        guest.send_payload(&chunk);
        guest.add_buffers(1, 4096);
        sent += chunk.len();
        assert!(sent < 64 << 20, "never cut off");
    }
    assert_eq!(guest.received_ops().last(), Some(&Op::Rst));
    assert_eq!(guest.faults.first(), Some(PacketFault::CreditExceeded.into()));
    // The payload within the credit is delivered.
    let reader = std::thread::spawn(move || read_to_end(&mut host).len());
    while !guest.handler.is_drained() {
        guest.signal_channel(false, true);
    }
    drop(guest);
    assert_eq!(reader.join().unwrap(), sent - chunk.len());
}

#[test]
fn false_credit_claims_do_not_widen_window() {
    let (mut guest, mut host) = TestGuest::new();
    guest.add_buffers(16, 4096);
    guest.send(Header { buf_alloc: 10, ..header(Op::Request) });
    host.write_all(&[1; 100]).unwrap();
    guest.signal_channel(true, false);
    let packets = guest.received();
    let ops: Vec<_> = packets.iter().map(|(header, _)| header.op.unwrap()).collect();
    // The guest gets ten bytes, and one request for credit when its buffer is full.
    assert_eq!(ops, [Op::Response, Op::Rw, Op::CreditRequest]);
    assert_eq!(packets[1].1.len(), 10);
    // The guest claims to have taken out more than was ever sent.
    guest.send(Header { buf_alloc: 10, fwd_cnt: 11, ..header(Op::CreditUpdate) });
    guest.send(Header { buf_alloc: u32::MAX, fwd_cnt: 0x8000_0000, ..header(Op::CreditUpdate) });
    let shown: usize = guest.received().iter().map(|(_, payload)| payload.len()).sum();
    assert!(shown <= 90);
    // Updates without credit cause no storm of requests.
    for _ in 0..100 {
        guest.send(Header { buf_alloc: 0, fwd_cnt: 10, ..header(Op::CreditUpdate) });
    }
    assert!(guest.received().len() <= 1);
    guest.send(Header { buf_alloc: 1000, fwd_cnt: 10, ..header(Op::CreditUpdate) });
    guest.signal_channel(true, false);
}

#[test]
fn flood_of_requests_stalls_the_guest_queue() {
    let (mut guest, _host) = TestGuest::new();
    for _ in 0..10_000 {
        let mut reset = header(Op::Rst);
        reset.source.port += 1;
        guest.send(reset);
    }
    assert_eq!(guest.transmit.used_chains().len(), 10_000);
    // The guest takes no answers: its own queue fills up, and nothing grows in the device.
    let stray = Header { destination: VsockAddr { cid: HOST_CID, port: 1 }, ..header(Op::Request) };
    for _ in 0..200 {
        guest.send(stray);
    }
    assert_eq!(guest.transmit.used_chains().len(), 10_000 + MAX_PENDING_CONTROL);
    // With buffers the device goes on where it stopped, in several turns.
    guest.add_buffers(200, 4096);
    assert_eq!(guest.transmit.used_chains().len(), 10_000 + MAX_PENDING_CONTROL * ROUNDS_PER_TURN);
    assert_eq!(guest.transmit.take_kicks(), 1);
    guest.handler.on_kick().unwrap();
    assert_eq!(guest.transmit.take_kicks(), 0);
    assert_eq!(guest.transmit.used_chains().len(), 10_200);
    assert_eq!(guest.received_ops(), [Op::Rst; 200]);
}

#[test]
fn host_data_waits_for_buffers_in_order() {
    let (mut guest, mut host) = TestGuest::new();
    guest.add_buffers(1, 4096);
    guest.send(header(Op::Request));
    guest.received();
    let payload: Vec<u8> = (0..50_000u32).map(|index| u8::try_from(index % 253).unwrap()).collect();
    host.write_all(&payload).unwrap();
    guest.signal_channel(true, true);
    assert!(guest.received().is_empty());
    let mut got = Vec::new();
    while got.len() < payload.len() {
        guest.add_buffers(3, 1000);
        for (header, part) in guest.received() {
            assert_eq!(header.op, Some(Op::Rw));
            got.extend(part);
        }
    }
    assert_eq!(got, payload);
}
