//! Packets, buffers and a host that does anything, on a device that was set up as it should be.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use chitin_fuzz::{Choices, Device, RAM_BYTES};
use chitin_vmm::virtio::vsock::packet::{Address, Header, Op, TYPE_STREAM};
use chitin_vmm::virtio::vsock::{CHANNEL_PORT, ChannelSlot, GUEST_CID, HOST_CID, Vsock};
use chitin_vmm::virtio::{QueueHandler, Ready};
use libfuzzer_sys::fuzz_target;

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const SIZES: [u16; 2] = [64, 128];
const BUFFERS: u64 = 0x4_0000;
const OPS: [Op; 7] = [
    Op::Request,
    Op::Response,
    Op::Reset,
    Op::Shutdown,
    Op::Data,
    Op::CreditUpdate,
    Op::CreditRequest,
];

struct Guest {
    device: Device,
    added: [u16; 2],
}

impl Guest {
    /// Adds a chain of descriptors and says so.
    fn add(&mut self, queue: u64, chain: &[(u64, u32, u16)]) {
        let [table, available, _] = Device::rings(queue);
        let (position, size) = (&mut self.added[queue as usize], SIZES[queue as usize]);
        let head = *position % size;
        for (offset, (address, len, flags)) in (0u16..).zip(chain) {
            let (index, next) = ((head + offset) % size, (head + offset + 1) % size);
            let more = if usize::from(offset) + 1 < chain.len() { 1 } else { 0 };
            let entry = [
                &address.to_le_bytes()[..],
                &len.to_le_bytes(),
                &(flags | more).to_le_bytes(),
                &next.to_le_bytes(),
            ];
            self.device.put(table + u64::from(index) * 16, &entry.concat());
        }
        self.device.put(available + 4 + u64::from(head) * 2, &head.to_le_bytes());
        *position = position.wrapping_add(1);
        self.device.put(available + 2, &position.to_le_bytes());
    }

    fn turn(&mut self, f: impl FnOnce(&mut dyn QueueHandler) -> Turn) {
        self.device.with_handler(f);
    }
}

type Turn = Result<chitin_vmm::virtio::Flow, chitin_vmm::virtio::GuestFault>;

fuzz_target!(init: {
    // As the monitor does: a channel whose other end is gone is an error, not the end.
    // SAFETY: a number, and what to do about it.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}, |data: &[u8]| {
    let mut choices = Choices(data);
    let template = choices.byte() & 1 != 0;
    let (ours, mut host) = UnixStream::pair().expect("a channel");
    ours.set_nonblocking(true).expect("a channel");
    host.set_nonblocking(true).expect("a channel");
    let slot = ChannelSlot::default();
    let _ = slot.set(Arc::new(ours));
    let mut guest = Guest { device: Device::new(Box::new(Vsock::new(slot, template))), added: [0; 2] };
    guest.device.start();
    let mut bytes = vec![0; 64 * 1024];
    while !choices.is_empty() {
        match choices.byte() % 10 {
            // A packet that is right but for what is chosen.
            0 | 1 => {
                let op = OPS[usize::from(choices.byte()) % OPS.len()];
                let len = choices.short();
                let wrong = choices.byte();
                let mut header = Header {
                    source: Address { cid: GUEST_CID, port: 7 + u32::from(wrong & 1) },
                    destination: Address { cid: HOST_CID, port: CHANNEL_PORT },
                    len: if op == Op::Data { len.into() } else { 0 },
                    kind: TYPE_STREAM,
                    op: Some(op),
                    flags: choices.byte().into(),
                    buf_alloc: choices.word(),
                    fwd_cnt: choices.short().into(),
                };
                match wrong >> 4 {
                    1 => header.op = None,
                    2 => header.kind = choices.short(),
                    3 => header.source.cid = choices.number(8),
                    4 => header.destination.cid = choices.number(8),
                    5 => header.destination.port = choices.word(),
                    6 => header.len = choices.word(),
                    7 => header.fwd_cnt = choices.word(),
                    _ => {}
                }
                guest.device.put(BUFFERS, &header.to_bytes());
                let split = u32::from(choices.byte()) % 44;
                let chain = [
                    (BUFFERS, split, 0),
                    (BUFFERS + u64::from(split), 44 - split, 0),
                    (BUFFERS + 44, len.into(), 0),
                ];
                guest.add(TRANSMIT, &chain);
                guest.turn(|handler| handler.on_kick());
            }
            // Any chain at all.
            2 => {
                let queue = u64::from(choices.byte() & 1);
                let count = usize::from(choices.byte() % 5) + 1;
                let chain: Vec<_> = (0..count)
                    .map(|_| (choices.number(3), choices.short().into(), choices.short() & 7))
                    .collect();
                guest.add(queue, &chain);
                guest.turn(|handler| handler.on_kick());
            }
            3 | 4 => {
                let size = u32::from(choices.short());
                for _ in 0..choices.byte() % 65 {
                    guest.add(RECEIVE, &[(BUFFERS + 0x2_0000, size, 2)]);
                }
                guest.turn(|handler| handler.on_kick());
            }
            5 => {
                let count = usize::from(choices.short());
                let _ = host.write(&bytes[..count]);
                guest.turn(|handler| {
                    handler.on_source(0, Ready { readable: true, ..Ready::default() })
                });
            }
            6 => {
                let count = usize::from(choices.short());
                let _ = host.read(&mut bytes[..count]);
                guest.turn(|handler| {
                    handler.on_source(0, Ready { writable: true, ..Ready::default() })
                });
            }
            7 => {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both];
                let _ = host.shutdown(how[usize::from(choices.byte()) % 3]);
                let ready = choices.byte();
                let ready =
                    Ready { readable: ready & 1 != 0, writable: ready & 2 != 0, hung_up: ready & 4 != 0 };
                guest.turn(|handler| handler.on_source(0, ready));
            }
            8 => {
                let (address, count) = (choices.number(3) % RAM_BYTES, choices.byte());
                guest.device.put(address, choices.bytes(count.into()));
                guest.turn(|handler| handler.on_kick());
            }
            _ => {
                let model = Box::new(Vsock::new(ChannelSlot::default(), template));
                guest.device.save_and_restore(model);
            }
        }
    }
});
