use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::connection::MAX_ANSWERS;
use super::credit::BUFFER_BYTES;
use super::packet::{
    Address, HEADER_BYTES, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::*;
use crate::memory::GuestRam;
use crate::virtio::queue::tests::Driver;
use crate::virtio::{FaultCounter, activation, test_ram};

const WRITE: u32 = virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
const SIZE: u16 = 256;
/// Where packets to and from the guest are; each gets a slot.
const TRANSMIT_AT: u64 = 0x10_0000;
const RECEIVE_AT: u64 = 0x200_0000;
const SLOT: u64 = 0x2_0000;
const PORT: u32 = 5000;
const WINDOW: u32 = 256 * 1024;

struct Guest {
    ram: Arc<GuestRam>,
    receive: Driver,
    transmit: Driver,
    handler: Box<dyn QueueHandler>,
    /// By which the handler asks to be called again.
    kick: Arc<EventFd>,
    faults: Arc<FaultCounter>,
    sent: u64,
    offered: u64,
    seen: usize,
}

fn header(op: Op) -> Header {
    Header {
        source: Address { cid: GUEST_CID, port: PORT },
        destination: Address { cid: HOST_CID, port: CHANNEL_PORT },
        len: 0,
        kind: TYPE_STREAM,
        op: Some(op),
        flags: 0,
        buf_alloc: WINDOW,
        fwd_cnt: 0,
    }
}

fn device(channel: Option<UnixStream>, template: bool) -> Vsock {
    let slot = ChannelSlot::default();
    if let Some(channel) = channel {
        slot.set(Arc::new(channel)).unwrap();
    }
    Vsock::new(slot, template)
}

impl Guest {
    fn new() -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (Self::with(&mut device(Some(ours), false)), theirs)
    }

    fn with(device: &mut Vsock) -> Self {
        Self::restored(device, None)
    }

    fn restored(device: &mut Vsock, request: Option<ConnectionRequest>) -> Self {
        let ram = test_ram(256 << 20);
        let receive = Driver::new(&ram, 0, SIZE);
        let transmit = Driver::new(&ram, 0x4000, SIZE);
        let events = Driver::new(&ram, 0x8000, SIZE);
        let transmit_queue = transmit.device(1);
        let kick = Arc::clone(transmit_queue.kick());
        let activation = activation(vec![receive.device(0), transmit_queue, events.device(2)]);
        let activation = Activation { request, ..activation };
        let faults = Arc::clone(&activation.faults);
        let handler = device.activate(activation);
        Self { ram, receive, transmit, handler, kick, faults, sent: 0, offered: 0, seen: 0 }
    }

    /// Gives the device buffers of this size.
    fn offer(&mut self, count: usize, bytes: u32) -> Flow {
        for _ in 0..count {
            self.receive.add(&[(RECEIVE_AT + self.offered % 512 * SLOT, bytes, WRITE)]);
            self.offered += 1;
        }
        self.handler.on_kick().unwrap()
    }

    /// Sends a packet, its payload in pieces of this size.
    fn send_in(&mut self, header: Header, payload: &[u8], piece: usize) -> Flow {
        let at = TRANSMIT_AT + self.sent % 200 * SLOT;
        self.sent += 1;
        let bytes = [&header.to_bytes(), payload].concat();
        self.ram.write_slice(&bytes, GuestAddress(at)).unwrap();
        let pieces = bytes.len().div_ceil(piece);
        let chain: Vec<_> = (0..pieces)
            .map(|number| {
                let start = number * piece;
                let len = piece.min(bytes.len() - start);
                (at + start as u64, u32::try_from(len).unwrap(), 0)
            })
            .collect();
        self.transmit.add(&chain);
        self.handler.on_kick().unwrap()
    }

    fn send(&mut self, header: Header) -> Flow {
        self.send_in(header, &[], usize::MAX)
    }

    fn data(&mut self, payload: &[u8]) -> Flow {
        let len = u32::try_from(payload.len()).unwrap();
        self.send_in(Header { len, ..header(Op::Data) }, payload, usize::MAX)
    }

    /// What has arrived since the last call.
    fn arrived(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used = self.receive.used();
        let packets = used[self.seen..].iter().enumerate().map(|(number, (_, len))| {
            let slot = (self.seen + number) as u64 % 512;
            let mut bytes = vec![0; *len as usize];
            self.ram.read_slice(&mut bytes, GuestAddress(RECEIVE_AT + slot * SLOT)).unwrap();
            let header = Header::parse(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
            (header, bytes.split_off(HEADER_BYTES))
        });
        let packets = packets.collect();
        self.seen = used.len();
        packets
    }

    fn ops(&mut self) -> Vec<Op> {
        self.arrived().into_iter().map(|(header, _)| header.op.unwrap()).collect()
    }

    fn channel(&mut self, readable: bool, writable: bool) -> Flow {
        self.handler.on_source(0, Ready { readable, writable, hung_up: false }).unwrap()
    }

    /// A guest with an open connection and buffers.
    fn connected() -> (Self, UnixStream) {
        let (mut guest, host) = Self::new();
        guest.offer(16, 4096);
        guest.send(header(Op::Request));
        assert_eq!(guest.ops(), [Op::Response]);
        (guest, host)
    }

    fn faults(&self) -> u64 {
        self.faults.total()
    }
}

fn read(host: &mut UnixStream, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    host.read_exact(&mut data).unwrap();
    data
}

#[test]
fn bytes_go_both_ways() {
    let (mut guest, mut host) = Guest::connected();
    guest.data(b"ping");
    assert_eq!(read(&mut host, 4), b"ping");
    host.write_all(b"pong").unwrap();
    guest.channel(true, false);
    let packets = guest.arrived();
    assert_eq!(packets.len(), 1);
    assert_eq!((packets[0].0.op, packets[0].1.as_slice()), (Some(Op::Data), b"pong".as_slice()));
    assert_eq!(packets[0].0.fwd_cnt, 4);
    assert_eq!(guest.faults(), 0);
}

#[test]
fn a_packet_may_be_spread_over_many_descriptors() {
    let (mut guest, mut host) = Guest::connected();
    let payload: Vec<u8> = (0..65536u32).map(|index| u8::try_from(index % 251).unwrap()).collect();
    let len = 65536;
    // The header itself in pieces, and the largest payload in 200 of them.
    for (piece, bytes) in [(4, 100), (7000, len), (400, len)] {
        let payload = &payload[..bytes as usize];
        guest.send_in(Header { len: bytes, ..header(Op::Data) }, payload, piece);
        assert_eq!(read(&mut host, payload.len()), payload);
        guest.offer(1, 4096);
    }
    assert_eq!(guest.faults(), 0);
}

#[test]
fn only_the_first_connection_to_the_channel_port_is_taken() {
    let (mut guest, mut host) = Guest::new();
    guest.offer(16, 4096);
    let mut other = header(Op::Request);
    for port in [0, 1, 1023, 1025, u32::MAX] {
        other.destination.port = port;
        guest.send(other);
    }
    assert_eq!(guest.ops(), [Op::Reset; 5]);
    guest.send(header(Op::Request));
    assert_eq!(guest.ops(), [Op::Response]);
    let mut second = header(Op::Request);
    second.source.port = PORT + 1;
    guest.send(second);
    let refused = guest.arrived();
    assert_eq!((refused[0].0.op, refused[0].0.destination.port), (Some(Op::Reset), PORT + 1));
    // The first lives on.
    guest.data(b"x");
    assert_eq!(read(&mut host, 1), b"x");
}

#[test]
fn without_a_channel_every_connection_is_refused() {
    let mut guest = Guest::with(&mut device(None, false));
    guest.offer(4, 4096);
    guest.send(header(Op::Request));
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn what_is_not_addressed_right_is_refused_or_dropped() {
    let (mut guest, _host) = Guest::new();
    guest.offer(32, 4096);
    let request = header(Op::Request);
    let host = |cid| Address { cid, ..request.destination };
    let source = |cid| Address { cid, ..request.source };
    for (packet, answers) in [
        (Header { destination: host(0), ..request }, 1),
        (Header { destination: host(1), ..request }, 1),
        (Header { destination: host(GUEST_CID), ..request }, 1),
        (Header { destination: host(u64::MAX), ..request }, 1),
        (Header { source: source(HOST_CID), ..request }, 0),
        (Header { source: source(4), ..request }, 0),
        (Header { source: source(u64::MAX), ..request }, 0),
        (Header { kind: 2, ..request }, 1),
        (Header { kind: 0, ..request }, 1),
        (Header { op: None, ..request }, 1),
        (Header { op: Some(Op::Response), ..request }, 1),
        (Header { op: Some(Op::Data), ..request }, 1),
        (Header { op: Some(Op::Shutdown), flags: SHUTDOWN_BOTH, ..request }, 1),
        (Header { op: Some(Op::CreditUpdate), ..request }, 1),
        (Header { op: Some(Op::CreditRequest), ..request }, 1),
        (Header { op: Some(Op::Reset), ..request }, 0),
    ] {
        guest.send(packet);
        assert_eq!(guest.ops(), vec![Op::Reset; answers], "{packet:?}");
    }
    assert_eq!(guest.faults(), 16);
    // None of it spent the connection.
    guest.send(request);
    assert_eq!(guest.ops(), [Op::Response]);
}

#[test]
fn unknown_operations_end_the_connection_they_name() {
    for packet in [
        Header { op: None, ..header(Op::Data) },
        header(Op::Response),
        header(Op::Request),
        Header { len: 1, ..header(Op::Data) },
        Header { len: u32::MAX, ..header(Op::Data) },
    ] {
        let (mut guest, mut host) = Guest::connected();
        guest.data(b"before");
        assert_eq!(guest.send(packet), Flow::Continue);
        assert_eq!(guest.ops(), [Op::Reset], "{packet:?}");
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"before");
        guest.send(header(Op::Request));
        assert_eq!(guest.ops(), [Op::Reset]);
    }
}

#[test]
fn a_packet_shorter_than_a_header_is_dropped() {
    let (mut guest, _host) = Guest::connected();
    for len in [0, 1, 43] {
        guest.transmit.add(&[(TRANSMIT_AT, len, 0)]);
        guest.handler.on_kick().unwrap();
    }
    guest.transmit.add(&[(TRANSMIT_AT, 100, WRITE)]);
    guest.handler.on_kick().unwrap();
    assert_eq!(guest.faults(), 4);
    assert_eq!(guest.transmit.used().len(), 5);
    assert!(guest.arrived().is_empty());
}

#[test]
fn a_packet_over_64_kib_ends_the_connection() {
    let (mut guest, _host) = Guest::connected();
    guest.data(&vec![0; 65537]);
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn buffers_too_small_for_a_packet_are_a_fault() {
    for bytes in [0, 1, 44] {
        let (mut guest, _host) = Guest::new();
        guest.receive.add(&[(RECEIVE_AT, bytes, WRITE)]);
        guest.handler.on_kick().unwrap();
        guest.transmit.add(&[(TRANSMIT_AT, 44, 0)]);
        guest.ram.write_slice(&header(Op::Request).to_bytes(), GuestAddress(TRANSMIT_AT)).unwrap();
        let expected = GuestFault::Short { queue: 0, head: 0, bytes: bytes as usize };
        assert_eq!(guest.handler.on_kick(), Err(expected));
        // The connection was taken: no reset brings it back.
        assert!(!guest.handler.survives_reset());
    }
}

#[test]
fn a_host_that_never_reads_holds_nothing_up_and_costs_one_window() {
    let (mut guest, mut host) = Guest::connected();
    let chunk = vec![7; 32768];
    let mut sent = 0;
    let mut told = 0;
    // A guest that keeps the rules: as long as the window it knows of has room.
    while sent - told + chunk.len() <= BUFFER_BYTES as usize {
        assert_eq!(guest.data(&chunk), Flow::Continue);
        sent += chunk.len();
        for (header, _) in guest.arrived() {
            assert_eq!(header.op, Some(Op::CreditUpdate));
            told = header.fwd_cnt as usize;
            guest.offer(1, 4096);
        }
    }
    assert!(!guest.handler.is_drained());
    // Control packets are not stuck behind it.
    guest.send(header(Op::CreditRequest));
    assert_eq!(guest.ops(), [Op::CreditUpdate]);
    // And everything arrives once the host reads.
    let reader = std::thread::spawn(move || {
        let mut total = 0;
        let mut data = vec![0; 65536];
        while total < sent {
            total += host.read(&mut data).unwrap();
        }
        (total, host)
    });
    while !guest.handler.is_drained() {
        guest.channel(false, true);
    }
    let (total, _host) = reader.join().unwrap();
    assert_eq!(total, sent);
    assert_eq!(guest.faults(), 0);
}

#[test]
fn a_guest_that_overruns_its_window_is_cut_off() {
    let (mut guest, mut host) = Guest::connected();
    let chunk = vec![7; 65536];
    let mut sent = 0;
    while guest.faults() == 0 {
        guest.data(&chunk);
        guest.offer(1, 4096);
        sent += chunk.len();
        assert!(sent < 64 << 20, "never cut off");
    }
    assert_eq!(guest.ops().last(), Some(&Op::Reset));
    // What was within the window is delivered.
    let reader = std::thread::spawn(move || {
        let mut data = Vec::new();
        host.read_to_end(&mut data).unwrap();
        data.len()
    });
    while !guest.handler.is_drained() {
        guest.channel(false, true);
    }
    drop(guest);
    assert_eq!(reader.join().unwrap(), sent - chunk.len());
}

#[test]
fn the_guests_window_is_kept_whatever_it_claims() {
    let (mut guest, mut host) = Guest::new();
    guest.offer(16, 4096);
    guest.send(Header { buf_alloc: 10, ..header(Op::Request) });
    host.write_all(&[1; 100]).unwrap();
    guest.channel(true, false);
    let packets = guest.arrived();
    let ops: Vec<_> = packets.iter().map(|(header, _)| header.op.unwrap()).collect();
    // Ten bytes, and one question when the window is used up.
    assert_eq!(ops, [Op::Response, Op::Data, Op::CreditRequest]);
    assert_eq!(packets[1].1.len(), 10);
    // It claims to have taken out more than was ever sent.
    guest.send(Header { buf_alloc: 10, fwd_cnt: 11, ..header(Op::CreditUpdate) });
    guest.send(Header { buf_alloc: u32::MAX, fwd_cnt: 0x8000_0000, ..header(Op::CreditUpdate) });
    let shown: usize = guest.arrived().iter().map(|(_, payload)| payload.len()).sum();
    assert!(shown <= 90);
    // No window: no storm of questions.
    for _ in 0..100 {
        guest.send(Header { buf_alloc: 0, fwd_cnt: 10, ..header(Op::CreditUpdate) });
    }
    assert!(guest.arrived().len() <= 1);
    guest.send(Header { buf_alloc: 1000, fwd_cnt: 10, ..header(Op::CreditUpdate) });
    guest.channel(true, false);
}

#[test]
fn resets_are_never_answered_and_floods_of_requests_are_bounded() {
    let (mut guest, _host) = Guest::new();
    for _ in 0..10_000 {
        let mut reset = header(Op::Reset);
        reset.source.port += 1;
        guest.send(reset);
    }
    assert_eq!(guest.transmit.used().len(), 10_000);
    // Nobody takes the answers: the guest's own queue fills up, and nothing here.
    let stray = Header { destination: Address { cid: HOST_CID, port: 1 }, ..header(Op::Request) };
    for _ in 0..200 {
        guest.send(stray);
    }
    assert_eq!(guest.transmit.used().len(), 10_000 + MAX_ANSWERS);
    // With buffers it goes on where it stopped, and others get their turn in between.
    guest.offer(200, 4096);
    assert_eq!(guest.transmit.used().len(), 10_000 + MAX_ANSWERS * ROUNDS_PER_TURN);
    assert_eq!(guest.kick.read().unwrap(), 1);
    guest.handler.on_kick().unwrap();
    assert!(guest.kick.read().is_err());
    assert_eq!(guest.transmit.used().len(), 10_200);
    assert_eq!(guest.ops(), [Op::Reset; 200]);
}

#[test]
fn each_half_can_be_shut_down_by_itself() {
    let (mut guest, mut host) = Guest::connected();
    guest.data(b"last");
    guest.send(Header { flags: SHUTDOWN_SEND, ..header(Op::Shutdown) });
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    // The other direction is open.
    host.write_all(b"still").unwrap();
    guest.channel(true, false);
    assert_eq!(guest.arrived()[0].1, b"still");
    // Until the host ends it too, which looks like a hang-up and is none.
    host.shutdown(Shutdown::Write).unwrap();
    let ready = Ready { readable: true, writable: true, hung_up: true };
    assert_eq!(guest.handler.on_source(0, ready).unwrap(), Flow::Continue);
    let end = guest.arrived();
    assert_eq!((end[0].0.op, end[0].0.flags), (Some(Op::Shutdown), SHUTDOWN_SEND));
    // Payload after the end breaks a rule.
    guest.data(b"x");
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn a_host_that_ends_its_half_can_still_read() {
    let (mut guest, mut host) = Guest::connected();
    host.write_all(b"bye").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.channel(true, false), Flow::Continue);
    let packets = guest.arrived();
    assert_eq!(packets[0].1, b"bye");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (Some(Op::Shutdown), SHUTDOWN_SEND));
    guest.data(b"answer");
    assert_eq!(read(&mut host, 6), b"answer");
    guest.send(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) });
    assert_eq!(guest.ops(), [Op::Reset]);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_guest_that_takes_no_more_gets_no_more() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(Header { flags: SHUTDOWN_RECEIVE, ..header(Op::Shutdown) });
    assert!(host.write_all(b"x").is_err());
    guest.channel(true, true);
    assert!(guest.arrived().is_empty());
    guest.data(b"y");
    assert_eq!(read(&mut host, 1), b"y");
}

#[test]
fn both_halves_at_once_are_confirmed_after_delivery() {
    let (mut guest, mut host) = Guest::connected();
    guest.data(b"all");
    guest.send(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) });
    assert_eq!(guest.ops(), [Op::Reset]);
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"all");
    // The guest goes on: its own end of the channel is no reason to stop it.
    let ready = Ready { readable: true, writable: true, hung_up: true };
    assert_eq!(guest.handler.on_source(0, ready).unwrap(), Flow::Continue);
}

#[test]
fn the_guest_is_stopped_when_the_host_closes_the_channel() {
    for connected in [false, true] {
        let (mut guest, host) = if connected { Guest::connected() } else { Guest::new() };
        drop(host);
        let ready = Ready { readable: true, writable: true, hung_up: true };
        assert!(matches!(guest.handler.on_source(0, ready).unwrap(), Flow::Stop(_)));
    }
    // Also when it is found out by writing.
    let (mut guest, host) = Guest::connected();
    drop(host);
    assert!(matches!(guest.data(b"x"), Flow::Stop(_)));
}

#[test]
fn a_reset_before_the_connection_is_harmless_and_after_it_final() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut device = device(Some(ours), false);
    let guest = Guest::with(&mut device);
    assert!(guest.handler.survives_reset());
    drop(guest);
    let mut guest = Guest::with(&mut device);
    guest.offer(4, 4096);
    guest.send(header(Op::Request));
    assert_eq!(guest.ops(), [Op::Response]);
    drop(guest);
    let mut guest = Guest::with(&mut device);
    guest.offer(4, 4096);
    guest.send(header(Op::Request));
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn host_data_waits_for_buffers_and_order_is_kept() {
    let (mut guest, mut host) = Guest::new();
    guest.offer(1, 4096);
    guest.send(header(Op::Request));
    guest.arrived();
    let payload: Vec<u8> = (0..50_000u32).map(|index| u8::try_from(index % 253).unwrap()).collect();
    host.write_all(&payload).unwrap();
    guest.channel(true, true);
    assert!(guest.arrived().is_empty());
    let mut got = Vec::new();
    while got.len() < payload.len() {
        guest.offer(3, 1000);
        for (header, part) in guest.arrived() {
            assert_eq!(header.op, Some(Op::Data));
            got.extend(part);
        }
    }
    assert_eq!(got, payload);
}

/// A guest that is to become a template, which has said something and closed its connection.
fn frozen() -> (Guest, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut guest = Guest::with(&mut device(Some(ours), true));
    guest.offer(16, 4096);
    guest.send(header(Op::Request));
    guest.data(b"last");
    guest.send(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) });
    assert_eq!(guest.ops(), [Op::Response, Op::Reset]);
    let mut all = Vec::new();
    theirs.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    (guest, theirs)
}

fn request_from(port: u32) -> Header {
    Header { source: Address { cid: GUEST_CID, port }, ..header(Op::Request) }
}

const REQUEST: ConnectionRequest =
    ConnectionRequest { port: PORT + 1, buf_alloc: WINDOW, fwd_cnt: 0 };

#[test]
fn a_template_is_saved_with_its_second_connection_waiting() {
    let (mut guest, _host) = frozen();
    assert!(guest.handler.save().is_err());
    assert_eq!(guest.send(request_from(PORT + 1)), Flow::Waiting);
    assert!(guest.arrived().is_empty());
    let (positions, request) = guest.handler.save().unwrap();
    assert_eq!(request, Some(REQUEST));
    assert_eq!(positions[1], Position { next_available: 4, next_used: 4 });
    assert_eq!(positions[0].next_used, 2);
    assert_eq!(guest.faults(), 0);
    // One connection waits, and no other.
    guest.send(request_from(PORT + 2));
    let refused = guest.arrived();
    assert_eq!((refused[0].0.op, refused[0].0.destination.port), (Some(Op::Reset), PORT + 2));
    assert_eq!(guest.handler.save().unwrap().1, Some(REQUEST));
}

#[test]
fn what_is_going_on_is_not_saved() {
    let quiescent = |guest: &Guest| guest.handler.save().is_ok();
    // Open, with or without anything asked for.
    let (guest, _host) = Guest::connected();
    assert!(!quiescent(&guest));
    // A packet that was not looked at.
    let (mut guest, _host) = frozen();
    guest.send(request_from(PORT + 1));
    assert!(quiescent(&guest));
    guest.transmit.add(&[(TRANSMIT_AT, 44, 0)]);
    assert_eq!(
        guest.handler.save(),
        Err(NotQuiescent("the guest has packets that were not taken"))
    );
    // An answer that was not taken.
    let (mut guest, _host) = frozen();
    guest.send(request_from(PORT + 1));
    for port in 10..30 {
        guest.send(request_from(port));
    }
    assert_eq!(
        guest.handler.save(),
        Err(NotQuiescent("the guest has not taken the answers to what it sent"))
    );
    // The guest changes its mind, or is confused.
    for op in [Op::Reset, Op::Data, Op::CreditUpdate] {
        let (mut guest, _host) = frozen();
        guest.send(request_from(PORT + 1));
        let flow = guest.send(Header { op: Some(op), ..request_from(PORT + 1) });
        assert_eq!((flow, quiescent(&guest)), (Flow::Continue, false));
        // And asks again.
        assert_eq!(guest.send(request_from(PORT + 3)), Flow::Waiting);
    }
}

#[test]
fn a_second_connection_waits_for_what_the_first_one_said() {
    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut guest = Guest::with(&mut device(Some(ours), true));
    guest.offer(64, 4096);
    guest.send(header(Op::Request));
    let chunk = vec![7; 65536];
    let mut sent = 0;
    while guest.handler.is_drained() {
        guest.data(&chunk);
        sent += chunk.len();
    }
    guest.send(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) });
    assert_eq!(guest.send(request_from(PORT + 1)), Flow::Continue);
    assert!(guest.handler.save().is_err());
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        all.len()
    });
    while !guest.handler.is_drained() {
        guest.channel(false, true);
    }
    assert_eq!(guest.channel(false, true), Flow::Waiting);
    assert_eq!(guest.handler.save().unwrap().1, Some(REQUEST));
    assert_eq!(reader.join().unwrap(), sent);
}

#[test]
fn only_a_template_that_ended_its_connection_itself_gets_to_wait() {
    // No template.
    let (mut guest, _host) = Guest::connected();
    guest.send(Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) });
    guest.arrived();
    guest.send(request_from(PORT + 1));
    assert_eq!(guest.ops(), [Op::Reset]);
    // A template whose connection was cut off.
    let (ours, _theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut guest = Guest::with(&mut device(Some(ours), true));
    guest.offer(16, 4096);
    guest.send(header(Op::Request));
    guest.send(header(Op::Response));
    assert_eq!(guest.ops(), [Op::Response, Op::Reset]);
    guest.send(request_from(PORT + 1));
    assert_eq!(guest.ops(), [Op::Reset]);
    assert!(guest.handler.save().is_err());
}

#[test]
fn a_restored_guest_finds_its_connection_granted_and_what_was_said_behind_it() {
    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    host.write_all(b"hello").unwrap();
    let mut guest = Guest::restored(&mut device(Some(ours), false), Some(REQUEST));
    guest.offer(4, 4096);
    let packets = guest.arrived();
    assert_eq!(packets.len(), 2);
    assert_eq!((packets[0].0.op, packets[0].0.destination.port), (Some(Op::Response), PORT + 1));
    assert_eq!((packets[1].0.op, packets[1].1.as_slice()), (Some(Op::Data), b"hello".as_slice()));
    guest.send_in(Header { len: 2, op: Some(Op::Data), ..request_from(PORT + 1) }, b"hi", 64);
    assert_eq!(read(&mut host, 2), b"hi");
    assert!(!guest.handler.survives_reset());
    assert_eq!(guest.faults(), 0);
    // Nothing else is granted.
    guest.send(header(Op::Request));
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn a_restored_guest_keeps_to_its_window_and_needs_a_channel() {
    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    host.write_all(&[1; 100]).unwrap();
    let request = ConnectionRequest { buf_alloc: 10, fwd_cnt: 0, ..REQUEST };
    let mut guest = Guest::restored(&mut device(Some(ours), false), Some(request));
    guest.offer(8, 4096);
    let ops = guest.arrived();
    assert_eq!(ops[1].1.len(), 10);
    // A state that says it has taken what was never sent.
    let request = ConnectionRequest { buf_alloc: u32::MAX, fwd_cnt: 1, ..REQUEST };
    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    host.write_all(&[1; 100]).unwrap();
    let mut guest = Guest::restored(&mut device(Some(ours), false), Some(request));
    guest.offer(8, 4096);
    assert!(guest.arrived().iter().all(|(_, payload)| payload.is_empty()));
    let mut guest = Guest::restored(&mut device(None, false), Some(REQUEST));
    guest.offer(8, 4096);
    assert!(guest.arrived().is_empty());
}
