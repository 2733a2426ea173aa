//! A guest for the tests of the vsock device: a driver, with the running half of the device.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::packet::{HEADER_BYTES, Header, Op};
use super::{ChannelSlot, Vsock};
use crate::memory::GuestRam;
use crate::state::machine::ConnectionRequest;
use crate::virtio::test_driver::{TestDriver, test_activation, test_ram};
use crate::virtio::{Activation, FaultCounter, Flow, QueueHandler, Ready, VirtioDevice};

pub const WRITE: u32 = virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
/// The addresses of the packets in each direction, a slot for each packet.
pub const TRANSMIT_AT: u64 = 0x10_0000;
pub const RECEIVE_AT: u64 = 0x200_0000;
const SLOT_BYTES: u64 = 0x2_0000;
const TRANSMIT_SLOTS: u64 = 200;
const RECEIVE_SLOTS: u64 = 512;
const QUEUE_SIZE: u16 = 256;

/// The guest's port of its first connection.
pub const PORT: u32 = 5000;
/// The guest's port of its second connection.
pub const SECOND_PORT: u32 = 5001;
/// The receive buffer that the guest announces.
pub const WINDOW: u32 = 256 * 1024;

/// A guest that drives the device.
pub struct TestGuest {
    pub ram: Arc<GuestRam>,
    pub receive: TestDriver,
    pub transmit: TestDriver,
    pub handler: Box<dyn QueueHandler>,
    pub faults: Arc<FaultCounter>,
    packets_sent: u64,
    buffers_added: u64,
    packets_seen: usize,
}

/// Makes a header from the guest's port to the channel.
pub fn header(op: Op) -> Header {
    Header::guest_to_host(op, PORT, WINDOW)
}

/// Makes a pair of sockets: the device's end of the channel, and the host's, which never waits for
/// ever.
pub fn channel_pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    (ours, theirs)
}

/// Makes the device's negotiation half.
pub fn make_device(channel: Option<UnixStream>, is_template: bool) -> Vsock {
    let slot = ChannelSlot::default();
    if let Some(channel) = channel {
        slot.set(Arc::new(channel)).unwrap();
    }
    Vsock::new(slot, is_template)
}

/// Reads exactly so many bytes from the host's end of the channel.
pub fn read_exact(host: &mut UnixStream, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    host.read_exact(&mut data).unwrap();
    data
}

/// Reads to the end of the stream.
pub fn read_to_end(host: &mut UnixStream) -> Vec<u8> {
    let mut data = Vec::new();
    host.read_to_end(&mut data).unwrap();
    data
}

impl TestGuest {
    /// Makes a guest that has not connected, and the host's end of its channel.
    pub fn new() -> (Self, UnixStream) {
        let (ours, theirs) = channel_pair();
        (Self::with_device(&mut make_device(Some(ours), false)), theirs)
    }

    /// Makes a guest with an open connection and receive buffers.
    pub fn connected() -> (Self, UnixStream) {
        let (mut guest, host) = Self::new();
        guest.add_buffers(16, 4096);
        guest.send(header(Op::Request));
        assert_eq!(guest.received_ops(), [Op::Response]);
        (guest, host)
    }

    /// Makes a guest whose driver has just started the device.
    pub fn with_device(device: &mut Vsock) -> Self {
        Self::restored(device, None)
    }

    /// Makes a guest that was saved with a request.
    pub fn restored(device: &mut Vsock, request: Option<ConnectionRequest>) -> Self {
        let ram = test_ram(256 << 20);
        let receive = TestDriver::new(&ram, 0, QUEUE_SIZE);
        let transmit = TestDriver::new(&ram, 0x4000, QUEUE_SIZE);
        let events = TestDriver::new(&ram, 0x8000, QUEUE_SIZE);
        let queues =
            vec![receive.device_queue(0), transmit.device_queue(1), events.device_queue(2)];
        let activation = Activation { request, ..test_activation(queues) };
        let faults = Arc::clone(&activation.faults);
        let handler = device.activate(activation);
        let (packets_sent, buffers_added, packets_seen) = Default::default();
        Self { ram, receive, transmit, handler, faults, packets_sent, buffers_added, packets_seen }
    }

    /// Adds receive buffers of this size.
    pub fn add_buffers(&mut self, count: usize, bytes: u32) -> Flow {
        for _ in 0..count {
            let slot = self.buffers_added % RECEIVE_SLOTS;
            self.receive.add_chain(&[(RECEIVE_AT + slot * SLOT_BYTES, bytes, WRITE)]);
            self.buffers_added += 1;
        }
        self.handler.on_kick().unwrap()
    }

    /// Sends a packet without payload.
    pub fn send(&mut self, header: Header) -> Flow {
        self.send_in_pieces(header, &[], usize::MAX)
    }

    /// Sends payload on the first connection.
    pub fn send_payload(&mut self, payload: &[u8]) -> Flow {
        let len = u32::try_from(payload.len()).unwrap();
        self.send_in_pieces(Header { len, ..header(Op::Rw) }, payload, usize::MAX)
    }

    /// Sends a packet spread over descriptors of this size.
    pub fn send_in_pieces(&mut self, header: Header, payload: &[u8], piece: usize) -> Flow {
        let at = TRANSMIT_AT + self.packets_sent % TRANSMIT_SLOTS * SLOT_BYTES;
        self.packets_sent += 1;
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
        self.transmit.add_chain(&chain);
        self.handler.on_kick().unwrap()
    }

    /// Tells the device that the channel is ready.
    pub fn signal_channel(&mut self, readable: bool, writable: bool) -> Flow {
        self.handler.on_source(0, Ready { readable, writable, hung_up: false }).unwrap()
    }

    /// Tells the device that the other end of the channel is closed.
    pub fn signal_hang_up(&mut self) -> Flow {
        let ready = Ready { readable: true, writable: true, hung_up: true };
        self.handler.on_source(0, ready).unwrap()
    }

    /// Returns the packets that were received since the last call.
    pub fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used = self.receive.used_chains();
        let packets = used[self.packets_seen..].iter().enumerate().map(|(number, (_, len))| {
            let slot = (self.packets_seen + number) as u64 % RECEIVE_SLOTS;
            let mut bytes = vec![0; *len as usize];
            self.ram.read_slice(&mut bytes, GuestAddress(RECEIVE_AT + slot * SLOT_BYTES)).unwrap();
            let header = Header::parse(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
            (header, bytes.split_off(HEADER_BYTES))
        });
        let packets = packets.collect();
        self.packets_seen = used.len();
        packets
    }

    /// Returns the operations of the packets that were received since the last call.
    pub fn received_ops(&mut self) -> Vec<Op> {
        self.received().into_iter().map(|(header, _)| header.op.unwrap()).collect()
    }
}
