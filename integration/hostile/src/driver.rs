//! A virtio driver as a program writes it, of which every step can be left out or done wrong.

use chitin_vmm::arch::x86_64::layout::{VIRTIO_MMIO, VIRTIO_MMIO_BYTES};
pub use chitin_vmm::virtio::vsock::QUEUE_SIZES as VSOCK_QUEUE_SIZES;
use chitin_vmm::virtio::vsock::packet::{HEADER_BYTES, Header, Op};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_STATUS,
};

use crate::program::{Program, Width};

/// The registers of the vsock device.
pub const VSOCK: u64 = VIRTIO_MMIO.0;
/// The registers of the root image's device.
pub const PMEM: u64 = VIRTIO_MMIO.0 + VIRTIO_MMIO_BYTES;

/// The receive queue of the vsock device.
pub const RECEIVE: u16 = 0;
/// The transmit queue of the vsock device.
pub const TRANSMIT: u16 = 1;

/// The size of the root image's queue.
const PMEM_QUEUE_SIZE: u16 = 16;

/// `VRING_DESC_F_NEXT`: another descriptor follows.
pub const NEXT: u16 = 1;
/// `VRING_DESC_F_WRITE`: the device writes to the buffer.
pub const WRITE: u16 = 2;
/// `VRING_DESC_F_INDIRECT`: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// The status after the driver has written its features.
pub const FEATURES_OK: u32 = 11;
/// The status of a running device.
pub const DRIVER_OK: u32 = 15;
/// The bit by which the device asks for a reset.
pub const NEEDS_RESET: u32 = 64;

/// The guest's port of its first connection.
pub const PORT: u32 = 7;
/// The receive buffer that the guest announces.
pub const WINDOW: u32 = 64 * 1024;

/// The start of the rings and buffers. Each generation of a device, from one reset to the next, has
/// rings of its own.
const QUEUES: u64 = 0x40_0000;
const GENERATION_BYTES: u64 = 0x20_0000;
const QUEUE_BYTES: u64 = 0x4000;
const AVAILABLE_AT: u64 = 0x2000;
const USED_AT: u64 = 0x3000;
const BUFFERS_AT: u64 = 0x2_0000;
const BUFFER_BYTES: u64 = 0x1000;
/// The index of each queue's first buffer.
const FIRST_BUFFERS: [u64; 3] = [0, 64, 192];

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// The buffer's guest physical address.
    pub address: u64,
    /// The buffer's length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The index of the next descriptor.
    pub next: u16,
}

impl Descriptor {
    /// Makes a descriptor that the device reads, the last of its chain.
    pub fn readable(address: u64, len: u32) -> Self {
        Self { address, len, flags: 0, next: 0 }
    }

    /// Makes a descriptor that the device writes, the last of its chain.
    pub fn writable(address: u64, len: u32) -> Self {
        Self { flags: WRITE, ..Self::readable(address, len) }
    }

    /// Makes another descriptor follow this one.
    pub fn chained(self) -> Self {
        Self { flags: self.flags | NEXT, ..self }
    }
}

/// A driver of one device. It keeps track of what it has added to which queue.
pub struct Driver {
    /// The device's registers.
    pub base: u64,
    generation: u64,
    queue_sizes: Vec<u16>,
    added: [u16; 3],
    received: u16,
    descriptors: [u16; 3],
}

impl Driver {
    /// Makes a driver of the vsock device after so many resets.
    pub fn vsock(generation: u64) -> Self {
        Self::new(VSOCK, generation, &VSOCK_QUEUE_SIZES)
    }

    /// Makes a driver of the root image's device after so many resets.
    pub fn pmem(generation: u64) -> Self {
        // The first six places belong to the vsock device.
        Self::new(PMEM, generation + 6, &[PMEM_QUEUE_SIZE])
    }

    fn new(base: u64, generation: u64, queue_sizes: &[u16]) -> Self {
        assert!(generation < 14, "rings would leave the program's memory");
        let queue_sizes = queue_sizes.to_vec();
        Self { base, generation, queue_sizes, added: [0; 3], received: 0, descriptors: [0; 3] }
    }

    fn memory(&self) -> u64 {
        QUEUES + self.generation * GENERATION_BYTES
    }

    /// Returns the addresses of a queue's descriptor table, available ring and used ring.
    pub fn rings(&self, queue: u16) -> [u64; 3] {
        let start = self.memory() + u64::from(queue) * QUEUE_BYTES;
        [start, start + AVAILABLE_AT, start + USED_AT]
    }

    /// Returns the address of the available ring's index.
    pub fn available_index(&self, queue: u16) -> u64 {
        self.rings(queue)[1] + 2
    }

    /// Returns the address of an entry of the available ring.
    fn available_entry(&self, queue: u16, position: u16) -> u64 {
        self.rings(queue)[1] + 4 + u64::from(position) * 2
    }

    /// Returns the address of the used ring's index.
    pub fn used_index(&self, queue: u16) -> u64 {
        self.rings(queue)[2] + 2
    }

    /// Returns the address of the page that belongs to a descriptor.
    pub fn buffer(&self, queue: u16, index: u16) -> u64 {
        let index = FIRST_BUFFERS[usize::from(queue)] + u64::from(index);
        self.memory() + BUFFERS_AT + index * BUFFER_BYTES
    }

    /// Writes a register.
    pub fn write_register(&self, program: &mut Program, register: u32, value: u32) {
        program.store(Width::W32, self.base + u64::from(register), value.into());
    }

    /// Writes the status register.
    pub fn write_status(&self, program: &mut Program, status: u32) {
        self.write_register(program, VIRTIO_MMIO_STATUS, status);
    }

    /// Ends the guest unless the status is this.
    pub fn expect_status(&self, program: &mut Program, status: u32, complaint: &str) {
        let register = self.base + u64::from(VIRTIO_MMIO_STATUS);
        program.expect(Width::W32, register, status.into(), complaint);
    }

    /// Goes from reset to `FEATURES_OK`, and accepts nothing but the modern interface.
    pub fn negotiate(&self, program: &mut Program) {
        for status in [0, 1, 3] {
            self.write_status(program, status);
        }
        for (select, features) in [(1, 1), (0, 0)] {
            self.write_register(program, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write_register(program, VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        self.write_status(program, FEATURES_OK);
        self.expect_status(program, FEATURES_OK, "the device does not accept the features");
    }

    /// Sets up one queue.
    pub fn set_up_queue(&self, program: &mut Program, queue: u16, size: u32, rings: [u64; 3]) {
        self.write_register(program, VIRTIO_MMIO_QUEUE_SEL, queue.into());
        self.write_register(program, VIRTIO_MMIO_QUEUE_NUM, size);
        let [table, available, used] = rings;
        for (low, high, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, table),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, used),
        ] {
            #[expect(clippy::cast_possible_truncation, reason = "each register takes 32 bits")]
            let halves = (address as u32, (address >> 32) as u32);
            self.write_register(program, low, halves.0);
            self.write_register(program, high, halves.1);
        }
        self.write_register(program, VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// Sets up all queues at their largest size.
    pub fn set_up_queues(&self, program: &mut Program) {
        for (queue, size) in (0..).zip(&self.queue_sizes) {
            self.set_up_queue(program, queue, (*size).into(), self.rings(queue));
        }
    }

    /// Goes from reset to `DRIVER_OK` by the rules. A vsock device gets buffers to receive into.
    pub fn start(&mut self, program: &mut Program) {
        self.negotiate(program);
        self.set_up_queues(program);
        if self.base == VSOCK {
            self.fill_receive_queue(program);
        }
        self.write_status(program, DRIVER_OK);
        self.expect_status(program, DRIVER_OK, "the device does not start");
    }

    fn fill_receive_queue(&self, program: &mut Program) {
        let size = VSOCK_QUEUE_SIZES[usize::from(RECEIVE)];
        for index in 0..size {
            let buffer = Descriptor::writable(self.buffer(RECEIVE, index), 4096);
            self.put_descriptor(program, RECEIVE, index, buffer);
            program.put_data(self.available_entry(RECEIVE, index), index.to_le_bytes());
        }
        program.store(Width::W16, self.available_index(RECEIVE), size.into());
    }

    /// Puts a descriptor into a queue's table before the program runs.
    pub fn put_descriptor(
        &self,
        program: &mut Program,
        queue: u16,
        index: u16,
        descriptor: Descriptor,
    ) {
        program.put_data(self.rings(queue)[0] + u64::from(index) * 16, encode(descriptor));
    }

    /// Notifies a queue.
    pub fn notify(&self, program: &mut Program, queue: u16) {
        self.write_register(program, VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
    }

    /// Adds a chain of descriptors that follow each other, and notifies. Does not wait.
    pub fn add_chain(&mut self, program: &mut Program, queue: u16, chain: &[Descriptor]) {
        let at = usize::from(queue);
        let first = self.descriptors[at];
        for (index, descriptor) in (first..).zip(chain) {
            let descriptor = Descriptor { next: index + 1, ..*descriptor };
            self.put_descriptor(program, queue, index, descriptor);
        }
        self.descriptors[at] += u16::try_from(chain.len()).expect("a short chain");
        assert!(self.descriptors[at] <= self.queue_sizes[at], "no more descriptors");
        self.add_head(program, queue, first);
    }

    /// Adds the chain that begins at a descriptor, and notifies. Does not wait.
    pub fn add_head(&mut self, program: &mut Program, queue: u16, head: u16) {
        let at = usize::from(queue);
        let entry = self.available_entry(queue, self.added[at] % self.queue_sizes[at]);
        program.store(Width::W16, entry, head.into());
        self.added[at] = self.added[at].wrapping_add(1);
        program.store(Width::W16, self.available_index(queue), self.added[at].into());
        self.notify(program, queue);
    }

    /// Waits until the device has used everything that was added.
    pub fn wait_until_used(&self, program: &mut Program, queue: u16) {
        program.wait_until_same(self.used_index(queue), self.available_index(queue));
    }

    /// Sends a packet in one descriptor and waits until it was used.
    pub fn send(&mut self, program: &mut Program, header: Header, payload: &[u8]) {
        let packet = self.put_packet(program, header, payload, 1);
        self.add_chain(program, TRANSMIT, &packet);
        self.wait_until_used(program, TRANSMIT);
    }

    /// Puts a packet into the next transmit buffers, in so many pieces. Returns its chain.
    pub fn put_packet(
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
        let descriptors = chunks.enumerate().zip(first..).map(|((piece, chunk), index)| {
            let address = self.buffer(TRANSMIT, index);
            program.put_data(address, chunk);
            let len = u32::try_from(chunk.len()).expect("a page");
            let descriptor = Descriptor::readable(address, len);
            if piece == last { descriptor } else { descriptor.chained() }
        });
        descriptors.collect()
    }

    /// Waits for the next packet, and ends the guest unless it is of this operation. Returns its
    /// address.
    pub fn receive(&mut self, program: &mut Program, op: Op) -> u64 {
        program.wait_while(self.used_index(RECEIVE), self.received);
        let buffer = self.buffer(RECEIVE, self.received % VSOCK_QUEUE_SIZES[0]);
        self.received = self.received.wrapping_add(1);
        let complaint = format!("packet {} from the device is not {op:?}", self.received);
        program.expect(Width::W16, buffer + 30, op as u64, &complaint);
        buffer
    }

    /// Opens the connection to the host.
    pub fn connect(&mut self, program: &mut Program) {
        self.send(program, header(Op::Request), &[]);
        self.receive(program, Op::Response);
    }

    /// Sends a ping to the host and waits for the pong.
    pub fn exchange_ping(&mut self, program: &mut Program) {
        self.send(program, payload_header(crate::PING), crate::PING);
        self.expect_pong(program);
    }

    /// Waits for the pong.
    pub fn expect_pong(&mut self, program: &mut Program) {
        let buffer = self.receive(program, Op::Rw) + HEADER_BYTES as u64;
        let pong = u32::from_le_bytes(*crate::PONG);
        program.expect(Width::W32, buffer, pong.into(), "the host's pong is garbled");
    }

    /// Makes every entry of the transmit queue's available ring point to the same bytes, so that a
    /// loop sends them by moving the ring's index alone. Returns the address of the bytes.
    pub fn fill_transmit_ring(&self, program: &mut Program, bytes: &[u8]) -> u64 {
        let size = VSOCK_QUEUE_SIZES[usize::from(TRANSMIT)];
        let last = size - 1;
        let address = self.buffer(TRANSMIT, last);
        program.put_data(address, bytes);
        let len = u32::try_from(bytes.len()).expect("a page");
        self.put_descriptor(program, TRANSMIT, last, Descriptor::readable(address, len));
        for position in 0..size {
            program.store(Width::W16, self.available_entry(TRANSMIT, position), last.into());
        }
        address
    }

    /// Records that a loop has added so many chains to the transmit queue.
    pub fn record_added(&mut self, chains: u16) {
        let added = &mut self.added[usize::from(TRANSMIT)];
        *added = added.wrapping_add(chains);
    }

    /// Waits until so many packets have arrived in all, and skips those that were not received yet.
    pub fn skip_received(&mut self, program: &mut Program, received: u16) {
        program.wait_until(self.used_index(RECEIVE), received);
        self.received = received;
    }

    /// Waits for the device to ask for a reset.
    pub fn wait_for_needs_reset(&self, program: &mut Program) {
        let register = self.base + u64::from(VIRTIO_MMIO_STATUS);
        program.wait_for_bits(register, NEEDS_RESET, NEEDS_RESET);
    }
}

/// Encodes a descriptor as it is in guest memory.
pub fn encode(descriptor: Descriptor) -> Vec<u8> {
    let Descriptor { address, len, flags, next } = descriptor;
    [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
        .concat()
}

/// Makes a header from the guest's port to the channel.
pub fn header(op: Op) -> Header {
    Header::guest_to_host(op, PORT, WINDOW)
}

/// Makes the header of a packet with this payload.
pub fn payload_header(payload: &[u8]) -> Header {
    Header { len: u32::try_from(payload.len()).expect("a packet"), ..header(Op::Rw) }
}
