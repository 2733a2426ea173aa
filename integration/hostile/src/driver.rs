//! A virtio driver, of which every step can be left out or done wrong.

use chitin_vmm::arch::x86_64::layout::{VIRTIO_MMIO, VIRTIO_MMIO_BYTES};
pub use chitin_vmm::virtio::vsock::QUEUE_SIZES as SIZES;
use chitin_vmm::virtio::vsock::packet::{Address, HEADER_BYTES, Header, Op, TYPE_STREAM};
use chitin_vmm::virtio::vsock::{CHANNEL_PORT, GUEST_CID, HOST_CID};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_STATUS,
};

use crate::program::{Program, Width};

/// The vsock device.
pub const VSOCK: u64 = VIRTIO_MMIO.0;
/// The root image's.
pub const PMEM: u64 = VIRTIO_MMIO.0 + VIRTIO_MMIO_BYTES;

/// Queues of the vsock device.
pub const RECEIVE: u16 = 0;
/// What the guest sends.
pub const TRANSMIT: u16 = 1;

/// The size of the root image's queue.
pub const PMEM_SIZE: u16 = 16;

/// More descriptors follow.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// A table of descriptors.
pub const INDIRECT: u16 = 4;

/// Status after the driver has agreed on features, and after it is done.
pub const FEATURES_OK: u32 = 11;
/// See there.
pub const DRIVER_OK: u32 = 15;
/// The device wants to be reset.
pub const NEEDS_RESET: u32 = 64;

/// The guest's port of its first connection.
pub const PORT: u32 = 7;
/// What the guest says that it can take.
pub const WINDOW: u32 = 64 * 1024;

/// Where queues and buffers are, for each life of a device: after a reset it starts again with rings that are new.
const QUEUES: u64 = 0x40_0000;
const LIFE_BYTES: u64 = 0x20_0000;
const QUEUE_BYTES: u64 = 0x4000;
const AVAILABLE_AT: u64 = 0x2000;
const USED_AT: u64 = 0x3000;
const BUFFERS_AT: u64 = 0x2_0000;
const BUFFER_BYTES: u64 = 0x1000;
/// Buffers of each queue that is not the first begin after those of the ones before.
const BUFFERS: [u64; 3] = [0, 64, 192];

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// Guest physical.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next one's number.
    pub next: u16,
}

/// A driver of one device, which remembers what it has added to which queue.
pub struct Driver {
    /// The device.
    pub base: u64,
    life: u64,
    sizes: Vec<u16>,
    added: [u16; 3],
    received: u16,
    descriptors: [u16; 3],
}

impl Driver {
    /// A driver of the vsock device in its `life`th life, counted from zero.
    pub fn vsock(life: u64) -> Self {
        Self::new(VSOCK, life, &SIZES)
    }

    /// A driver of the root image's.
    pub fn pmem(life: u64) -> Self {
        // Beside the lives of the other device.
        Self::new(PMEM, life + 6, &[PMEM_SIZE])
    }

    fn new(base: u64, life: u64, sizes: &[u16]) -> Self {
        assert!(life < 14, "rings would leave the program's memory");
        let sizes = sizes.to_vec();
        Self { base, life, sizes, added: [0; 3], received: 0, descriptors: [0; 3] }
    }

    /// The descriptor table, the available and the used ring of a queue.
    pub fn rings(&self, queue: u16) -> [u64; 3] {
        let start = QUEUES + self.life * LIFE_BYTES + u64::from(queue) * QUEUE_BYTES;
        [start, start + AVAILABLE_AT, start + USED_AT]
    }

    /// The index of the available ring.
    pub fn available(&self, queue: u16) -> u64 {
        self.rings(queue)[1] + 2
    }

    /// The index of the used ring.
    pub fn used(&self, queue: u16) -> u64 {
        self.rings(queue)[2] + 2
    }

    /// A page that belongs to a descriptor.
    pub fn buffer(&self, queue: u16, index: u16) -> u64 {
        let index = BUFFERS[usize::from(queue)] + u64::from(index);
        QUEUES + self.life * LIFE_BYTES + BUFFERS_AT + index * BUFFER_BYTES
    }

    /// Writes a register.
    pub fn set(&self, program: &mut Program, register: u32, value: u32) {
        program.store(Width::W32, self.base + u64::from(register), value.into());
    }

    /// Writes the status register.
    pub fn status(&self, program: &mut Program, status: u32) {
        self.set(program, VIRTIO_MMIO_STATUS, status);
    }

    /// Ends the guest unless the status is this.
    pub fn expect_status(&self, program: &mut Program, status: u32, complaint: &str) {
        program.expect(
            Width::W32,
            self.base + u64::from(VIRTIO_MMIO_STATUS),
            status.into(),
            complaint,
        );
    }

    /// From reset to `FEATURES_OK`, with nothing accepted but the modern interface.
    pub fn negotiate(&self, program: &mut Program) {
        for status in [0, 1, 3] {
            self.status(program, status);
        }
        for (select, features) in [(1, 1), (0, 0)] {
            self.set(program, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.set(program, VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        self.status(program, FEATURES_OK);
        self.expect_status(program, FEATURES_OK, "the device does not take the features");
    }

    /// Sets up one queue.
    pub fn queue(&self, program: &mut Program, queue: u16, size: u32, rings: [u64; 3]) {
        self.set(program, VIRTIO_MMIO_QUEUE_SEL, queue.into());
        self.set(program, VIRTIO_MMIO_QUEUE_NUM, size);
        let [table, available, used] = rings;
        for (low, high, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, table),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, used),
        ] {
            #[expect(clippy::cast_possible_truncation, reason = "its two halves")]
            let halves = (address as u32, (address >> 32) as u32);
            self.set(program, low, halves.0);
            self.set(program, high, halves.1);
        }
        self.set(program, VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// All queues, at their largest size.
    pub fn queues(&self, program: &mut Program) {
        for (queue, size) in (0..).zip(&self.sizes) {
            self.queue(program, queue, (*size).into(), self.rings(queue));
        }
    }

    /// From reset to `DRIVER_OK`, as a driver does it that keeps the rules; a vsock device has buffers to receive into.
    pub fn start(&mut self, program: &mut Program) {
        self.negotiate(program);
        self.queues(program);
        if self.base == VSOCK {
            for index in 0..SIZES[0] {
                self.put_descriptor(
                    program,
                    RECEIVE,
                    index,
                    Descriptor {
                        address: self.buffer(RECEIVE, index),
                        len: 4096,
                        flags: WRITE,
                        next: 0,
                    },
                );
                self.put_available(program, RECEIVE, index, index);
            }
            program.store(Width::W16, self.available(RECEIVE), SIZES[0].into());
        }
        self.status(program, DRIVER_OK);
        self.expect_status(program, DRIVER_OK, "the device does not start");
    }

    /// Puts a descriptor into a queue's table, before the program runs.
    pub fn put_descriptor(
        &self,
        program: &mut Program,
        queue: u16,
        index: u16,
        descriptor: Descriptor,
    ) {
        program.data(self.rings(queue)[0] + u64::from(index) * 16, encode(&[descriptor]));
    }

    /// Puts a head into the available ring, before the program runs.
    pub fn put_available(&self, program: &mut Program, queue: u16, position: u16, head: u16) {
        program.data(self.rings(queue)[1] + 4 + u64::from(position) * 2, head.to_le_bytes());
    }

    /// Notifies a queue.
    pub fn kick(&self, program: &mut Program, queue: u16) {
        self.set(program, VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
    }

    /// Adds a chain of descriptors, whose `next` is made to follow, and notifies. Does not wait.
    pub fn add(&mut self, program: &mut Program, queue: u16, chain: &[Descriptor]) {
        let at = usize::from(queue);
        let first = self.descriptors[at];
        for (offset, descriptor) in (0..).zip(chain) {
            let index = first + offset;
            self.put_descriptor(
                program,
                queue,
                index,
                Descriptor { next: index + 1, ..*descriptor },
            );
        }
        self.descriptors[at] += u16::try_from(chain.len()).expect("a short chain");
        assert!(self.descriptors[at] <= self.sizes[at], "no more descriptors");
        self.add_head(program, queue, first);
    }

    /// Adds whatever is at a head, and notifies.
    pub fn add_head(&mut self, program: &mut Program, queue: u16, head: u16) {
        let at = usize::from(queue);
        let place = u64::from(self.added[at] % self.sizes[at]);
        program.store(Width::W16, self.rings(queue)[1] + 4 + place * 2, head.into());
        self.added[at] = self.added[at].wrapping_add(1);
        program.store(Width::W16, self.available(queue), self.added[at].into());
        self.kick(program, queue);
    }

    /// Sends a packet and waits until it was taken.
    pub fn send(&mut self, program: &mut Program, header: Header, payload: &[u8]) {
        let [descriptor] = self.packet(program, header, payload, 1)[..] else { return };
        self.add(program, TRANSMIT, &[descriptor]);
        self.taken(program, TRANSMIT);
    }

    /// Puts a packet into the buffers of the descriptors that are next, in pieces.
    pub fn packet(
        &self,
        program: &mut Program,
        header: Header,
        payload: &[u8],
        pieces: usize,
    ) -> Vec<Descriptor> {
        let bytes = [&header.to_bytes()[..], payload].concat();
        let first = self.descriptors[usize::from(TRANSMIT)];
        let chunks = bytes.chunks(bytes.len().div_ceil(pieces));
        let last = chunks.len() - 1;
        let descriptors = (0u16..).zip(chunks).map(|(offset, chunk)| {
            let address = self.buffer(TRANSMIT, first + offset);
            program.data(address, chunk);
            let flags = if usize::from(offset) == last { 0 } else { NEXT };
            Descriptor { address, len: u32::try_from(chunk.len()).expect("a page"), flags, next: 0 }
        });
        descriptors.collect()
    }

    /// Waits until everything that was added was taken.
    pub fn taken(&self, program: &mut Program, queue: u16) {
        program.wait_equal(self.used(queue), self.available(queue));
    }

    /// Waits for the next packet, which must be of this operation. Returns where it is.
    pub fn receive(&mut self, program: &mut Program, op: Op) -> u64 {
        program.wait_while(self.used(RECEIVE), self.received);
        let buffer = self.buffer(RECEIVE, self.received % SIZES[0]);
        self.received = self.received.wrapping_add(1);
        let complaint = format!("packet {} from the device is no {op:?}", self.received);
        program.expect(Width::W16, buffer + 30, op as u64, &complaint);
        buffer
    }

    /// Opens the connection to the host.
    pub fn connect(&mut self, program: &mut Program) {
        self.send(program, header(Op::Request), &[]);
        self.receive(program, Op::Response);
    }

    /// Says something to the host, and hears what it says to that.
    pub fn talk(&mut self, program: &mut Program) {
        self.send(program, data(crate::PING), crate::PING);
        self.hear(program);
    }

    /// Hears what the host says to the ping.
    pub fn hear(&mut self, program: &mut Program) {
        let buffer = self.receive(program, Op::Data) + HEADER_BYTES as u64;
        let pong = u32::from_le_bytes(*crate::PONG);
        program.expect(Width::W32, buffer, pong.into(), "the host's answer is garbled");
    }

    /// Puts the same bytes behind every place of the transmit queue's ring, so that a loop need only move its index. Returns
    /// where they are.
    pub fn spread(&self, program: &mut Program, bytes: &[u8]) -> u64 {
        let last = SIZES[1] - 1;
        let address = self.buffer(TRANSMIT, last);
        program.data(address, bytes);
        let len = u32::try_from(bytes.len()).expect("a page");
        self.put_descriptor(
            program,
            TRANSMIT,
            last,
            Descriptor { address, len, flags: 0, next: 0 },
        );
        let ring = self.rings(TRANSMIT)[1] + 4;
        for position in 0..SIZES[1] {
            program.store(Width::W16, ring + u64::from(position) * 2, last.into());
        }
        address
    }

    /// Takes note of so many chains that a loop has added.
    pub fn looped(&mut self, chains: u16) {
        let added = &mut self.added[usize::from(TRANSMIT)];
        *added = added.wrapping_add(chains);
    }

    /// Takes note of packets that came otherwise: there are so many by now.
    pub fn skip_to(&mut self, program: &mut Program, received: u16) {
        program.wait_until(self.used(RECEIVE), received);
        self.received = received;
    }

    /// Waits for the device to say that it is of no use.
    pub fn wait_for_needs_reset(&self, program: &mut Program) {
        program.wait_for(self.base + u64::from(VIRTIO_MMIO_STATUS), NEEDS_RESET, NEEDS_RESET);
    }
}

/// Descriptors as they are in memory.
pub fn encode(table: &[Descriptor]) -> Vec<u8> {
    let bytes = |entry: &Descriptor| {
        let Descriptor { address, len, flags, next } = *entry;
        [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
            .concat()
    };
    table.iter().flat_map(bytes).collect()
}

/// A header from the guest's port to the host's.
pub fn header(op: Op) -> Header {
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

/// A header for payload.
pub fn data(payload: &[u8]) -> Header {
    Header { len: u32::try_from(payload.len()).expect("a packet"), ..header(Op::Data) }
}
