//! Packets, receive buffers and a host that does anything, on a vsock device that was started by
//! the rules.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use chitin_fuzz::{Choices, DeviceUnderTest, RAM_BYTES};
use chitin_vmm::virtio::vsock::packet::{Header, Op};
use chitin_vmm::virtio::vsock::{ChannelSlot, QUEUE_SIZES, Vsock};
use chitin_vmm::virtio::{Flow, GuestFault, QueueHandler, Ready};
use libfuzzer_sys::fuzz_target;

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
/// The address of the packets that the guest sends.
const TRANSMIT_BUFFERS: u64 = 0x4_0000;
/// The address of the buffers that the guest receives into.
const RECEIVE_BUFFERS: u64 = 0x6_0000;
const HEADER_BYTES: u32 = 44;
const WRITE: u16 = 2;
const OPS: [Op; 7] =
    [Op::Request, Op::Response, Op::Rst, Op::Shutdown, Op::Rw, Op::CreditUpdate, Op::CreditRequest];

struct FuzzGuest {
    device: DeviceUnderTest,
    added: [u16; 2],
}

impl FuzzGuest {
    /// Adds a chain of descriptors: address, length and flags of each. Does not notify.
    fn add_chain(&mut self, queue: u64, chain: &[(u64, u32, u16)]) {
        let [table, available, _] = DeviceUnderTest::rings(queue);
        let (added, size) = (&mut self.added[queue as usize], QUEUE_SIZES[queue as usize]);
        let head = *added % size;
        for (offset, (address, len, flags)) in (0u16..).zip(chain) {
            let (index, next) = ((head + offset) % size, (head + offset + 1) % size);
            let more = if usize::from(offset) + 1 < chain.len() { 1 } else { 0 };
            let entry = [
                &address.to_le_bytes()[..],
                &len.to_le_bytes(),
                &(flags | more).to_le_bytes(),
                &next.to_le_bytes(),
            ];
            self.device.write_memory(table + u64::from(index) * 16, &entry.concat());
        }
        self.device.write_memory(available + 4 + u64::from(head) * 2, &head.to_le_bytes());
        *added = added.wrapping_add(1);
        self.device.write_memory(available + 2, &added.to_le_bytes());
    }

    fn call(&mut self, call: impl FnOnce(&mut dyn QueueHandler) -> Result<Flow, GuestFault>) {
        self.device.with_handler(call);
    }

    fn notify(&mut self) {
        self.call(|handler| handler.on_kick());
    }

    fn signal_channel(&mut self, ready: Ready) {
        self.call(|handler| handler.on_source(0, ready));
    }

    /// Sends a packet that is valid but for one chosen field, in three descriptors.
    fn send_packet(&mut self, choices: &mut Choices<'_>) {
        let op = OPS[usize::from(choices.take_u8()) % OPS.len()];
        let len = choices.take_u16();
        let mutation = choices.take_u8();
        let port = 7 + u32::from(mutation & 1);
        let mut header = Header {
            len: if op == Op::Rw { len.into() } else { 0 },
            flags: choices.take_u8().into(),
            buf_alloc: choices.take_u32(),
            fwd_cnt: choices.take_u16().into(),
            ..Header::guest_to_host(op, port, 0)
        };
        match mutation >> 4 {
            1 => header.op = None,
            2 => header.socket_type = choices.take_u16(),
            3 => header.source.cid = choices.take_number(8),
            4 => header.destination.cid = choices.take_number(8),
            5 => header.destination.port = choices.take_u32(),
            6 => header.len = choices.take_u32(),
            7 => header.fwd_cnt = choices.take_u32(),
            _ => {}
        }
        self.device.write_memory(TRANSMIT_BUFFERS, &header.to_bytes());
        let split = u32::from(choices.take_u8()) % HEADER_BYTES;
        let chain = [
            (TRANSMIT_BUFFERS, split, 0),
            (TRANSMIT_BUFFERS + u64::from(split), HEADER_BYTES - split, 0),
            (TRANSMIT_BUFFERS + u64::from(HEADER_BYTES), len.into(), 0),
        ];
        self.add_chain(TRANSMIT, &chain);
        self.notify();
    }

    /// Adds a chain of any descriptors to either queue.
    fn add_any_chain(&mut self, choices: &mut Choices<'_>) {
        let queue = u64::from(choices.take_u8() & 1);
        let count = usize::from(choices.take_u8() % 5) + 1;
        let chain: Vec<_> = (0..count)
            .map(|_| (choices.take_number(3), choices.take_u16().into(), choices.take_u16() & 7))
            .collect();
        self.add_chain(queue, &chain);
        self.notify();
    }

    fn add_receive_buffers(&mut self, choices: &mut Choices<'_>) {
        let size = u32::from(choices.take_u16());
        for _ in 0..choices.take_u8() % 65 {
            self.add_chain(RECEIVE, &[(RECEIVE_BUFFERS, size, WRITE)]);
        }
        self.notify();
    }

    fn write_any_memory(&mut self, choices: &mut Choices<'_>) {
        let (address, count) = (choices.take_number(3) % RAM_BYTES, choices.take_u8());
        self.device.write_memory(address, choices.take_bytes(count.into()));
        self.notify();
    }
}

fn make_channel() -> (UnixStream, UnixStream) {
    let (ours, host) = UnixStream::pair().expect("a channel");
    ours.set_nonblocking(true).expect("a channel");
    host.set_nonblocking(true).expect("a channel");
    (ours, host)
}

fuzz_target!(init: {
    // As in the monitor, a write to a closed channel is an error and does not end the process.
    // SAFETY: ignoring a signal runs no handler, and no other thread exists yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}, |data: &[u8]| {
    let mut choices = Choices(data);
    let is_template = choices.take_u8() & 1 != 0;
    let (ours, mut host) = make_channel();
    let slot = ChannelSlot::default();
    let _ = slot.set(Arc::new(ours));
    let device = DeviceUnderTest::new(Box::new(Vsock::new(slot, is_template)));
    let mut guest = FuzzGuest { device, added: [0; 2] };
    guest.device.start_device();
    let mut bytes = vec![0; 64 * 1024];
    while !choices.is_empty() {
        match choices.take_u8() % 10 {
            0 | 1 => guest.send_packet(&mut choices),
            2 => guest.add_any_chain(&mut choices),
            3 | 4 => guest.add_receive_buffers(&mut choices),
            5 => {
                let count = usize::from(choices.take_u16());
                let _ = host.write(&bytes[..count]);
                guest.signal_channel(Ready { readable: true, ..Ready::default() });
            }
            6 => {
                let count = usize::from(choices.take_u16());
                let _ = host.read(&mut bytes[..count]);
                guest.signal_channel(Ready { writable: true, ..Ready::default() });
            }
            7 => {
                let directions = [Shutdown::Read, Shutdown::Write, Shutdown::Both];
                let _ = host.shutdown(directions[usize::from(choices.take_u8()) % 3]);
                let bits = choices.take_u8();
                guest.signal_channel(Ready {
                    readable: bits & 1 != 0,
                    writable: bits & 2 != 0,
                    hung_up: bits & 4 != 0,
                });
            }
            8 => guest.write_any_memory(&mut choices),
            _ => {
                let device = Box::new(Vsock::new(ChannelSlot::default(), is_template));
                guest.device.save_and_restore(device);
            }
        }
    }
});
