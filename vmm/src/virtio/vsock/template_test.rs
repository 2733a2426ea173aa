use std::io::Write;

use super::packet::{Header, Op, SHUTDOWN_BOTH, VsockAddr};
use super::test_guest::*;
use super::*;
use crate::state::machine::ConnectionRequest;
use crate::virtio::queue::QueuePosition;

/// Makes a guest that becomes a template: it has sent something and closed its connection.
fn closed_template() -> (TestGuest, UnixStream) {
    let (ours, mut theirs) = channel_pair();
    let mut guest = TestGuest::with_device(&mut make_device(Some(ours), true));
    guest.add_buffers(16, 4096);
    guest.send(header(Op::Request));
    guest.send_payload(b"last");
    guest.send(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) });
    assert_eq!(guest.received_ops(), [Op::Response, Op::Rst]);
    assert_eq!(read_to_end(&mut theirs), b"last");
    (guest, theirs)
}

fn request_from(port: u32) -> Header {
    Header { source: VsockAddr { cid: GUEST_CID, port }, ..header(Op::Request) }
}

const REQUEST: ConnectionRequest =
    ConnectionRequest { port: SECOND_PORT, buf_alloc: WINDOW, fwd_cnt: 0 };

#[test]
fn template_is_saved_with_pending_connection() {
    let (mut guest, _host) = closed_template();
    assert!(guest.handler.save().is_err());
    assert_eq!(guest.send(request_from(SECOND_PORT)), Flow::AwaitSnapshot);
    assert!(guest.received().is_empty());
    let HandlerState { positions, request } = guest.handler.save().unwrap();
    assert_eq!(request, Some(REQUEST));
    assert_eq!(positions[1], QueuePosition { next_available: 4, next_used: 4 });
    assert_eq!(positions[0].next_used, 2);
    assert_eq!(guest.faults.total(), 0);
    // A third connection is refused, and the second still waits.
    guest.send(request_from(PORT + 2));
    let refused = guest.received();
    assert_eq!((refused[0].0.op, refused[0].0.destination.port), (Some(Op::Rst), PORT + 2));
    assert_eq!(guest.handler.save().unwrap().request, Some(REQUEST));
}

#[test]
fn guest_with_unfinished_work_is_not_saved() {
    let quiescent = |guest: &TestGuest| guest.handler.save().is_ok();
    // An open connection.
    let (guest, _host) = TestGuest::connected();
    assert!(!quiescent(&guest));
    // A packet that was not handled.
    let (mut guest, _host) = closed_template();
    guest.send(request_from(SECOND_PORT));
    assert!(quiescent(&guest));
    guest.transmit.add_chain(&[(TRANSMIT_AT, 44, 0)]);
    assert_eq!(guest.handler.save(), Err(NotQuiescent::PendingPackets));
    // A reply that was not received.
    let (mut guest, _host) = closed_template();
    guest.send(request_from(SECOND_PORT));
    for port in 10..30 {
        guest.send(request_from(port));
    }
    assert_eq!(guest.handler.save(), Err(NotQuiescent::PendingReplies));
    // A request that was withdrawn, by a reset or by a packet that makes no sense.
    for op in [Op::Rst, Op::Rw, Op::CreditUpdate] {
        let (mut guest, _host) = closed_template();
        guest.send(request_from(SECOND_PORT));
        let flow = guest.send(Header { op: Some(op), ..request_from(SECOND_PORT) });
        assert_eq!((flow, quiescent(&guest)), (Flow::Continue, false));
        // The guest may request again.
        assert_eq!(guest.send(request_from(PORT + 3)), Flow::AwaitSnapshot);
    }
}

#[test]
fn second_connection_waits_for_first_to_drain() {
    let (ours, mut host) = channel_pair();
    let mut guest = TestGuest::with_device(&mut make_device(Some(ours), true));
    guest.add_buffers(64, 4096);
    guest.send(header(Op::Request));
    let chunk = vec![7; 65536];
    let mut sent = 0;
    while guest.handler.is_drained() {
        guest.send_payload(&chunk);
        sent += chunk.len();
    }
    guest.send(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) });
    assert_eq!(guest.send(request_from(SECOND_PORT)), Flow::Continue);
    assert!(guest.handler.save().is_err());
    let reader = std::thread::spawn(move || read_to_end(&mut host).len());
    while !guest.handler.is_drained() {
        guest.signal_channel(false, true);
    }
    assert_eq!(guest.signal_channel(false, true), Flow::AwaitSnapshot);
    assert_eq!(guest.handler.save().unwrap().request, Some(REQUEST));
    assert_eq!(reader.join().unwrap(), sent);
}

#[test]
fn fault_while_closing_forfeits_second_connection() {
    let (ours, mut host) = channel_pair();
    let mut guest = TestGuest::with_device(&mut make_device(Some(ours), true));
    guest.add_buffers(64, 4096);
    guest.send(header(Op::Request));
    while guest.handler.is_drained() {
        guest.send_payload(&[7; 65536]);
    }
    guest.send(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) });
    guest.send(request_from(SECOND_PORT));
    guest.received();
    guest.send_payload(b"after the end");
    assert_eq!(guest.received_ops(), [Op::Rst]);
    let reader = std::thread::spawn(move || read_to_end(&mut host).len());
    while !guest.handler.is_drained() {
        guest.signal_channel(false, true);
    }
    assert_eq!(guest.signal_channel(false, true), Flow::Continue);
    assert_eq!(guest.handler.save(), Err(NotQuiescent::NoRequest));
    assert_eq!(guest.send(request_from(SECOND_PORT + 1)), Flow::Continue);
    assert_eq!(guest.received_ops(), [Op::Rst]);
    drop(guest);
    reader.join().unwrap();
}

#[test]
fn only_template_that_closed_itself_may_wait() {
    // The guest does not become a template.
    let (mut guest, _host) = TestGuest::connected();
    guest.send(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) });
    guest.received();
    guest.send(request_from(SECOND_PORT));
    assert_eq!(guest.received_ops(), [Op::Rst]);
    // A fault ended the connection.
    let (ours, _theirs) = channel_pair();
    let mut guest = TestGuest::with_device(&mut make_device(Some(ours), true));
    guest.add_buffers(16, 4096);
    guest.send(header(Op::Request));
    guest.send(header(Op::Response));
    assert_eq!(guest.received_ops(), [Op::Response, Op::Rst]);
    guest.send(request_from(SECOND_PORT));
    assert_eq!(guest.received_ops(), [Op::Rst]);
    assert!(guest.handler.save().is_err());
}

#[test]
fn restored_guest_gets_its_connection_and_data() {
    let (ours, mut host) = channel_pair();
    host.write_all(b"hello").unwrap();
    let mut guest = TestGuest::restored(&mut make_device(Some(ours), false), Some(REQUEST));
    guest.add_buffers(4, 4096);
    let packets = guest.received();
    assert_eq!(packets.len(), 2);
    assert_eq!((packets[0].0.op, packets[0].0.destination.port), (Some(Op::Response), SECOND_PORT));
    assert_eq!((packets[1].0.op, packets[1].1.as_slice()), (Some(Op::Rw), b"hello".as_slice()));
    guest.send_in_pieces(
        Header { len: 2, op: Some(Op::Rw), ..request_from(SECOND_PORT) },
        b"hi",
        64,
    );
    assert_eq!(read_exact(&mut host, 2), b"hi");
    assert!(!guest.handler.survives_reset());
    assert_eq!(guest.faults.total(), 0);
    // No other connection is accepted.
    guest.send(header(Op::Request));
    assert_eq!(guest.received_ops(), [Op::Rst]);
}

#[test]
fn restored_guest_respects_window_and_needs_channel() {
    let (ours, mut host) = channel_pair();
    host.write_all(&[1; 100]).unwrap();
    let request = ConnectionRequest { buf_alloc: 10, fwd_cnt: 0, ..REQUEST };
    let mut guest = TestGuest::restored(&mut make_device(Some(ours), false), Some(request));
    guest.add_buffers(8, 4096);
    let ops = guest.received();
    assert_eq!(ops[1].1.len(), 10);
    // The saved request claims to have taken out bytes that were never sent.
    let request = ConnectionRequest { buf_alloc: u32::MAX, fwd_cnt: 1, ..REQUEST };
    let (ours, mut host) = channel_pair();
    host.write_all(&[1; 100]).unwrap();
    let mut guest = TestGuest::restored(&mut make_device(Some(ours), false), Some(request));
    guest.add_buffers(8, 4096);
    assert!(guest.received().iter().all(|(_, payload)| payload.is_empty()));
    let mut guest = TestGuest::restored(&mut make_device(None, false), Some(REQUEST));
    guest.add_buffers(8, 4096);
    assert!(guest.received().is_empty());
}
