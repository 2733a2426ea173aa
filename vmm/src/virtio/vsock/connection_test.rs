use std::io::{Read, Write};
use std::net::Shutdown;

use vm_memory::{Bytes, GuestAddress};

use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, VsockAddr};
use super::test_guest::*;
use super::*;
use crate::virtio::{PacketFault, StopReason};

#[test]
fn bytes_flow_both_ways() {
    let (mut guest, mut host) = TestGuest::connected();
    guest.send_payload(b"ping");
    assert_eq!(read_exact(&mut host, 4), b"ping");
    host.write_all(b"pong").unwrap();
    guest.signal_channel(true, false);
    let packets = guest.received();
    assert_eq!(packets.len(), 1);
    assert_eq!((packets[0].0.op, packets[0].1.as_slice()), (Some(Op::Rw), b"pong".as_slice()));
    assert_eq!(packets[0].0.fwd_cnt, 4);
    assert_eq!(guest.faults.total(), 0);
}

#[test]
fn packet_may_span_many_descriptors() {
    let (mut guest, mut host) = TestGuest::connected();
    let payload: Vec<u8> = (0..65536u32).map(|index| u8::try_from(index % 251).unwrap()).collect();
    let len = 65536;
    // The header itself is split, and the largest payload is in 200 pieces.
    for (piece, bytes) in [(4, 100), (7000, len), (400, len)] {
        let payload = &payload[..bytes as usize];
        guest.send_in_pieces(Header { len: bytes, ..header(Op::Rw) }, payload, piece);
        assert_eq!(read_exact(&mut host, payload.len()), payload);
        guest.add_buffers(1, 4096);
    }
    assert_eq!(guest.faults.total(), 0);
}

#[test]
fn only_first_connection_to_channel_port_is_accepted() {
    let (mut guest, mut host) = TestGuest::new();
    guest.add_buffers(16, 4096);
    let mut other = header(Op::Request);
    for port in [0, 1, 1023, 1025, u32::MAX] {
        other.destination.port = port;
        guest.send(other);
    }
    assert_eq!(guest.received_ops(), [Op::Rst; 5]);
    guest.send(header(Op::Request));
    assert_eq!(guest.received_ops(), [Op::Response]);
    let mut second = header(Op::Request);
    second.source.port = SECOND_PORT;
    guest.send(second);
    let refused = guest.received();
    assert_eq!((refused[0].0.op, refused[0].0.destination.port), (Some(Op::Rst), SECOND_PORT));
    // The first connection is still open.
    guest.send_payload(b"x");
    assert_eq!(read_exact(&mut host, 1), b"x");
}

#[test]
fn connection_without_channel_is_refused() {
    let mut guest = TestGuest::with_device(&mut make_device(None, false));
    guest.add_buffers(4, 4096);
    guest.send(header(Op::Request));
    assert_eq!(guest.received_ops(), [Op::Rst]);
}

#[test]
fn misaddressed_packet_is_refused_or_dropped() {
    let (mut guest, _host) = TestGuest::new();
    guest.add_buffers(32, 4096);
    let request = header(Op::Request);
    let host = |cid| VsockAddr { cid, ..request.destination };
    let source = |cid| VsockAddr { cid, ..request.source };
    for (packet, answers) in [
        (Header { destination: host(0), ..request }, 1),
        (Header { destination: host(1), ..request }, 1),
        (Header { destination: host(GUEST_CID), ..request }, 1),
        (Header { destination: host(u64::MAX), ..request }, 1),
        (Header { source: source(HOST_CID), ..request }, 0),
        (Header { source: source(4), ..request }, 0),
        (Header { source: source(u64::MAX), ..request }, 0),
        (Header { socket_type: 2, ..request }, 1),
        (Header { socket_type: 0, ..request }, 1),
        (Header { op: None, ..request }, 1),
        (Header { op: Some(Op::Response), ..request }, 1),
        (Header { op: Some(Op::Rw), ..request }, 1),
        (Header { op: Some(Op::Shutdown), flags: SHUTDOWN_BOTH, ..request }, 1),
        (Header { op: Some(Op::CreditUpdate), ..request }, 1),
        (Header { op: Some(Op::CreditRequest), ..request }, 1),
        (Header { op: Some(Op::Rst), ..request }, 0),
    ] {
        guest.send(packet);
        assert_eq!(guest.received_ops(), vec![Op::Rst; answers], "{packet:?}");
    }
    assert_eq!(guest.faults.total(), 16);
    // The guest can still connect.
    guest.send(request);
    assert_eq!(guest.received_ops(), [Op::Response]);
}

#[test]
fn invalid_packet_ends_its_connection() {
    for (packet, fault) in [
        (Header { op: None, ..header(Op::Rw) }, PacketFault::UnknownOp),
        (header(Op::Response), PacketFault::UnexpectedResponse),
        (header(Op::Request), PacketFault::SecondConnection),
        (Header { len: 1, ..header(Op::Rw) }, PacketFault::LengthBeyondBuffers),
        (Header { len: u32::MAX, ..header(Op::Rw) }, PacketFault::LengthBeyondBuffers),
    ] {
        let (mut guest, mut host) = TestGuest::connected();
        guest.send_payload(b"before");
        assert_eq!(guest.send(packet), Flow::Continue);
        assert_eq!(guest.received_ops(), [Op::Rst], "{packet:?}");
        assert_eq!(guest.faults.first(), Some(fault.into()));
        assert_eq!(read_to_end(&mut host), b"before");
        guest.send(header(Op::Request));
        assert_eq!(guest.received_ops(), [Op::Rst]);
    }
}

#[test]
fn packet_shorter_than_header_is_dropped() {
    let (mut guest, _host) = TestGuest::connected();
    for len in [0, 1, 43] {
        guest.transmit.add_chain(&[(TRANSMIT_AT, len, 0)]);
        guest.handler.on_kick().unwrap();
    }
    guest.transmit.add_chain(&[(TRANSMIT_AT, 100, WRITE)]);
    guest.handler.on_kick().unwrap();
    assert_eq!(guest.faults.total(), 4);
    assert_eq!(guest.transmit.used_chains().len(), 5);
    assert!(guest.received().is_empty());
}

#[test]
fn packet_over_64_kib_ends_connection() {
    let (mut guest, _host) = TestGuest::connected();
    guest.send_payload(&vec![0; 65537]);
    assert_eq!(guest.received_ops(), [Op::Rst]);
}

#[test]
fn buffer_too_small_for_packet_is_a_fault() {
    for bytes in [0, 1, 44] {
        let (mut guest, _host) = TestGuest::new();
        guest.receive.add_chain(&[(RECEIVE_AT, bytes, WRITE)]);
        guest.handler.on_kick().unwrap();
        guest.transmit.add_chain(&[(TRANSMIT_AT, 44, 0)]);
        guest.ram.write_slice(&header(Op::Request).to_bytes(), GuestAddress(TRANSMIT_AT)).unwrap();
        let expected = GuestFault::BufferTooSmall { queue: 0, head: 0, bytes: bytes as usize };
        assert_eq!(guest.handler.on_kick(), Err(expected));
        // The connection was accepted, and no reset brings it back.
        assert!(!guest.handler.survives_reset());
    }
}

#[test]
fn guest_can_shut_down_sending_half_alone() {
    let (mut guest, mut host) = TestGuest::connected();
    guest.send_payload(b"last");
    guest.send(Header { flags: SHUTDOWN_SEND, ..header(Op::Shutdown) });
    assert_eq!(read_to_end(&mut host), b"last");
    // The other direction is still open.
    host.write_all(b"still").unwrap();
    guest.signal_channel(true, false);
    assert_eq!(guest.received()[0].1, b"still");
    // The host ends it too, which looks like a hang-up and is not one.
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.signal_hang_up(), Flow::Continue);
    let end = guest.received();
    assert_eq!((end[0].0.op, end[0].0.flags), (Some(Op::Shutdown), SHUTDOWN_SEND));
    // Payload after the end is a fault.
    guest.send_payload(b"x");
    assert_eq!(guest.received_ops(), [Op::Rst]);
}

#[test]
fn host_can_read_after_ending_its_half() {
    let (mut guest, mut host) = TestGuest::connected();
    host.write_all(b"bye").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.signal_channel(true, false), Flow::Continue);
    let packets = guest.received();
    assert_eq!(packets[0].1, b"bye");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (Some(Op::Shutdown), SHUTDOWN_SEND));
    guest.send_payload(b"answer");
    assert_eq!(read_exact(&mut host, 6), b"answer");
    guest.send(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) });
    assert_eq!(guest.received_ops(), [Op::Rst]);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn guest_with_receiving_half_shut_gets_nothing() {
    let (mut guest, mut host) = TestGuest::connected();
    guest.send(Header { flags: SHUTDOWN_RECEIVE, ..header(Op::Shutdown) });
    assert!(host.write_all(b"x").is_err());
    guest.signal_channel(true, true);
    assert!(guest.received().is_empty());
    guest.send_payload(b"y");
    assert_eq!(read_exact(&mut host, 1), b"y");
}

#[test]
fn full_shutdown_is_confirmed_after_delivery() {
    let (mut guest, mut host) = TestGuest::connected();
    guest.send_payload(b"all");
    guest.send(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) });
    assert_eq!(guest.received_ops(), [Op::Rst]);
    assert_eq!(read_to_end(&mut host), b"all");
    // The guest goes on: the hang-up is the result of its own shutdown.
    assert_eq!(guest.signal_hang_up(), Flow::Continue);
}

#[test]
fn guest_is_stopped_when_host_closes_channel() {
    for connected in [false, true] {
        let (mut guest, host) = if connected { TestGuest::connected() } else { TestGuest::new() };
        drop(host);
        assert_eq!(guest.signal_hang_up(), Flow::Stop(StopReason::ChannelClosed));
    }
    // A failed write has the same effect.
    let (mut guest, host) = TestGuest::connected();
    drop(host);
    assert_eq!(guest.send_payload(b"x"), Flow::Stop(StopReason::ChannelClosed));
}

#[test]
fn device_reset_after_connection_is_final() {
    let (ours, _theirs) = channel_pair();
    let mut device = make_device(Some(ours), false);
    let guest = TestGuest::with_device(&mut device);
    assert!(guest.handler.survives_reset());
    drop(guest);
    let mut guest = TestGuest::with_device(&mut device);
    guest.add_buffers(4, 4096);
    guest.send(header(Op::Request));
    assert_eq!(guest.received_ops(), [Op::Response]);
    drop(guest);
    let mut guest = TestGuest::with_device(&mut device);
    guest.add_buffers(4, 4096);
    guest.send(header(Op::Request));
    assert_eq!(guest.received_ops(), [Op::Rst]);
}
