use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};

use super::*;
use crate::virtio::test_ram;

const NEXT: u32 = VRING_DESC_F_NEXT;
const WRITE: u32 = VRING_DESC_F_WRITE;
const RAM: usize = 1 << 20;
/// Where the buffers of these tests are.
const DATA: u64 = 0x8000;

#[derive(Default)]
pub(crate) struct Counter(pub(crate) AtomicUsize);

impl Interrupt for Counter {
    fn trigger(&self, _: Signal) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A driver's view of one queue, and the device's.
pub(crate) struct Driver {
    ram: Arc<GuestRam>,
    descriptors: GuestAddress,
    available: GuestAddress,
    used: GuestAddress,
    size: u16,
    added: u16,
    next_descriptor: u16,
    pub(crate) interrupts: Arc<Counter>,
}

impl Driver {
    pub(crate) fn new(ram: &Arc<GuestRam>, start: u64, size: u16) -> Self {
        // virtio-queue's own mock lets the available ring overlap the used ring, so rings are laid out here.
        let table = 16 * u64::from(size);
        Self {
            ram: Arc::clone(ram),
            descriptors: GuestAddress(start),
            available: GuestAddress(start + table),
            used: GuestAddress(start + 2 * table),
            size,
            added: 0,
            next_descriptor: 0,
            interrupts: Arc::default(),
        }
    }

    pub(crate) fn device(&self, index: u16) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(self.descriptors).unwrap();
        queue.try_set_avail_ring_address(self.available).unwrap();
        queue.try_set_used_ring_address(self.used).unwrap();
        queue.set_ready(true);
        let interrupt: Arc<dyn Interrupt> = Arc::clone(&self.interrupts) as _;
        let kick = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        ActiveQueue::new(index, queue, Arc::clone(&self.ram), interrupt, kick)
    }

    /// Makes one chain available: (address, length, flags) of each descriptor; `NEXT` is added where it belongs.
    pub(crate) fn add(&mut self, buffers: &[(u64, u32, u32)]) {
        let first = self.next_descriptor;
        for (number, (address, len, flags)) in buffers.iter().enumerate() {
            let last = number + 1 == buffers.len();
            let flags = flags | if last { 0 } else { NEXT };
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            self.descriptor(index, *address, *len, flags, self.next_descriptor);
        }
        self.available(first);
    }

    fn descriptor(&self, index: u16, address: u64, len: u32, flags: u32, next: u16) {
        let descriptor = Descriptor::new(address, len, u16::try_from(flags).unwrap(), next);
        let at = self.descriptors.0 + u64::from(index) * 16;
        self.ram.write_obj(RawDescriptor::from(descriptor), GuestAddress(at)).unwrap();
    }

    fn available(&mut self, head: u16) {
        let at = self.available.0 + 4 + u64::from(self.added % self.size) * 2;
        self.ram.write_obj(head, GuestAddress(at)).unwrap();
        self.added = self.added.wrapping_add(1);
        self.set_available_index(self.added);
    }

    fn set_available_index(&self, index: u16) {
        self.ram.write_obj(index, GuestAddress(self.available.0 + 2)).unwrap();
    }

    /// (head, bytes written) of what the device has given back.
    pub(crate) fn used(&self) -> Vec<(u32, u32)> {
        let count: u16 = self.ram.read_obj(GuestAddress(self.used.0 + 2)).unwrap();
        let element = |number: u16| {
            let at = self.used.0 + 4 + u64::from(number % self.size) * 8;
            let [head, len]: [u32; 2] = self.ram.read_obj(GuestAddress(at)).unwrap();
            (head, len)
        };
        (0..count).map(element).collect()
    }
}

fn setup() -> (Driver, ActiveQueue) {
    let ram = test_ram(RAM);
    let driver = Driver::new(&ram, 0, 16);
    let queue = driver.device(0);
    (driver, queue)
}

fn done(_: &mut Chain<'_>) -> Result<Completion, GuestFault> {
    Ok(Completion::Done { len: 0 })
}

#[test]
fn chains_come_in_order_and_go_back_with_one_interrupt() {
    let (mut driver, mut queue) = setup();
    driver.add(&[(DATA, 3, 0), (DATA + 16, 5, WRITE)]);
    driver.add(&[(DATA, 7, 0)]);
    let mut seen = Vec::new();
    queue
        .drain(|chain| {
            seen.push((chain.readable.len(), chain.writable.len()));
            Ok(Completion::Done { len: u32::try_from(chain.writable.len()).unwrap() })
        })
        .unwrap();
    assert_eq!(seen, [(3, 5), (7, 0)]);
    assert_eq!(driver.used(), [(0, 5), (2, 0)]);
    assert_eq!(driver.interrupts.0.load(Ordering::SeqCst), 1);
}

#[test]
fn a_stopped_chain_is_seen_again() {
    let (mut driver, mut queue) = setup();
    driver.add(&[(DATA, 1, 0)]);
    driver.add(&[(DATA, 2, 0)]);
    queue.drain(|_| Ok(Completion::Stop)).unwrap();
    assert!(driver.used().is_empty());
    let mut seen = Vec::new();
    queue
        .drain(|chain| {
            seen.push(chain.readable.len());
            done(chain)
        })
        .unwrap();
    assert_eq!(seen, [1, 2]);
}

#[test]
fn a_deferred_chain_goes_back_later() {
    let (mut driver, mut queue) = setup();
    driver.add(&[(DATA, 1, WRITE)]);
    queue.drain(|_| Ok(Completion::Deferred)).unwrap();
    assert!(driver.used().is_empty());
    queue.complete(0, 9).unwrap();
    assert_eq!(driver.used(), [(0, 9)]);
    assert_eq!(driver.interrupts.0.load(Ordering::SeqCst), 1);
}

#[test]
fn an_endless_supply_gives_others_a_turn() {
    let ram = test_ram(RAM);
    let mut driver = Driver::new(&ram, 0, 16);
    let mut queue = driver.device(0);
    driver.add(&[(DATA, 1, 0)]);
    let mut count = 0;
    // A driver that makes the same descriptor available again whenever it was taken.
    queue
        .drain(|_| {
            count += 1;
            driver.available(0);
            Ok(Completion::Done { len: 0 })
        })
        .unwrap();
    assert_eq!(count, CHAINS_PER_TURN);
    assert_eq!(queue.kick().read().unwrap(), 1);
}

#[test]
fn the_available_index_may_not_run_ahead() {
    let (mut driver, mut queue) = setup();
    driver.add(&[(DATA, 1, 0)]);
    driver.set_available_index(17);
    assert_eq!(queue.drain(done), Err(GuestFault::AvailableRing { queue: 0 }));
    driver.set_available_index(u16::MAX);
    assert_eq!(queue.drain(done), Err(GuestFault::AvailableRing { queue: 0 }));
}

#[test]
fn loops_and_jumps_out_of_the_table_are_broken_chains() {
    for (flags, next) in [(NEXT, 0), (NEXT, 16), (NEXT, u16::MAX)] {
        let (mut driver, mut queue) = setup();
        driver.descriptor(0, DATA, 1, flags, next);
        driver.available(0);
        assert_eq!(
            queue.drain(done),
            Err(GuestFault::Chain { queue: 0, head: 0 }),
            "{flags} {next}"
        );
    }
    for head in [16, u16::MAX] {
        let (mut driver, mut queue) = setup();
        driver.available(head);
        assert_eq!(queue.drain(done), Err(GuestFault::Chain { queue: 0, head }));
    }
}

#[test]
fn buffers_stay_in_memory() {
    let end = RAM as u64;
    for (address, len) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2), (0, u32::MAX)]
    {
        for flags in [0, WRITE] {
            let (mut driver, mut queue) = setup();
            driver.add(&[(address, len, flags)]);
            let fault = Err(GuestFault::Buffer { queue: 0, head: 0 });
            assert_eq!(queue.drain(done), fault, "{address:#x} {len}");
        }
    }
}

#[test]
fn more_than_4_gib_in_a_chain_is_broken() {
    let ram = test_ram(RAM);
    let mut driver = Driver::new(&ram, 0, 16);
    let mut queue = driver.device(0);
    driver.descriptor(0, 0, u32::MAX, NEXT, 1);
    driver.descriptor(1, 0, u32::MAX, 0, 0);
    driver.available(0);
    assert!(queue.drain(done).is_err());
}

#[test]
fn zero_length_descriptors_are_empty_buffers() {
    let (mut driver, mut queue) = setup();
    driver.add(&[(DATA, 0, 0), (DATA, 4, 0), (0, 0, WRITE)]);
    queue
        .drain(|chain| {
            assert_eq!((chain.readable.len(), chain.writable.len()), (4, 0));
            done(chain)
        })
        .unwrap();
    assert_eq!(driver.used().len(), 1);
}

#[test]
fn readable_after_writable_is_broken() {
    let (mut driver, mut queue) = setup();
    driver.add(&[(DATA, 4, WRITE), (DATA, 4, 0)]);
    assert_eq!(queue.drain(done), Err(GuestFault::Chain { queue: 0, head: 0 }));
}

#[test]
fn indirect_tables_are_bounded() {
    // Not offered; the parser follows one all the same, so what it finds must be bounded.
    let (mut driver, mut queue) = setup();
    let table = 0x4_0000;
    for index in 0..4096u64 {
        let next = u16::try_from((index + 1) % 4096).unwrap();
        let descriptor = Descriptor::new(DATA, 1, u16::try_from(NEXT).unwrap(), next);
        driver.ram.write_obj(descriptor, GuestAddress(table + index * 16)).unwrap();
    }
    driver.descriptor(0, table, 4096 * 16, VRING_DESC_F_INDIRECT, 0);
    driver.available(0);
    assert_eq!(queue.drain(done), Err(GuestFault::Chain { queue: 0, head: 0 }));
    // A misaligned one, one that points at another, and one outside memory.
    for (address, len, flags) in
        [(table, 17, 0), (table, 16, VRING_DESC_F_INDIRECT), (RAM as u64, 16, 0), (table, 0, 0)]
    {
        let (mut driver, mut queue) = setup();
        let inner = Descriptor::new(table, 16, u16::try_from(flags).unwrap(), 0);
        driver.ram.write_obj(inner, GuestAddress(table)).unwrap();
        driver.descriptor(0, address, len, VRING_DESC_F_INDIRECT, 0);
        driver.available(0);
        assert_eq!(
            queue.drain(done),
            Err(GuestFault::Chain { queue: 0, head: 0 }),
            "{address:#x} {len}"
        );
    }
}

#[test]
fn a_fault_does_not_take_back_what_was_done() {
    let (mut driver, mut queue) = setup();
    driver.add(&[(DATA, 1, 0)]);
    driver.add(&[(u64::MAX, 1, 0)]);
    assert!(queue.drain(done).is_err());
    assert_eq!(driver.used(), [(0, 0)]);
    assert_eq!(driver.interrupts.0.load(Ordering::SeqCst), 1);
}

#[test]
fn bytes_cross_descriptors_in_both_directions() {
    let (mut driver, mut queue) = setup();
    driver.ram.write_slice(b"hello, world", GuestAddress(DATA)).unwrap();
    driver.add(&[
        (DATA, 2, 0),
        (DATA + 2, 0, 0),
        (DATA + 2, 10, 0),
        (DATA + 64, 3, WRITE),
        (DATA + 96, 9, WRITE),
    ]);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    queue
        .drain(|chain| {
            let mut greeting = [0; 5];
            chain.readable.take(&mut greeting).unwrap();
            assert_eq!(&greeting, b"hello");
            assert!(chain.readable.take(&mut [0; 8]).is_none());
            let mut front = chain.readable.split(2);
            let mut bytes = VecDeque::new();
            front.append_to(&mut bytes);
            assert_eq!(bytes, b", ");
            assert_eq!(chain.readable.write_to(theirs.as_fd()).unwrap(), 5);
            assert!(chain.readable.is_empty());

            assert!(chain.writable.put(&[0; 13]).is_none());
            chain.writable.put(b"abcd").unwrap();
            ours.write_all(b"efgh").unwrap();
            assert_eq!(chain.writable.read_from(theirs.as_fd()).unwrap(), 4);
            assert_eq!(chain.writable.len(), 4);
            done(chain)
        })
        .unwrap();
    let mut world = [0; 5];
    ours.read_exact(&mut world).unwrap();
    assert_eq!(&world, b"world");
    let mut written = [0; 3];
    driver.ram.read_slice(&mut written, GuestAddress(DATA + 64)).unwrap();
    assert_eq!(&written, b"abc");
    let mut written = [0; 5];
    driver.ram.read_slice(&mut written, GuestAddress(DATA + 96)).unwrap();
    assert_eq!(&written, b"defgh");
}
