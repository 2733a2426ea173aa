use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::super::queue::Completion;
use super::super::test_driver::TestDriver;
use super::*;

const NEXT: u32 = VRING_DESC_F_NEXT;
const WRITE: u32 = VRING_DESC_F_WRITE;
const RAM: usize = 1 << 20;
/// The address of the buffers.
const DATA: u64 = 0x8000;

fn complete(_: &mut Chain<'_>) -> Result<Completion, GuestFault> {
    Ok(Completion::EMPTY)
}

#[test]
fn chain_that_loops_or_leaves_table_is_a_fault() {
    for (flags, next) in [(NEXT, 0), (NEXT, 16), (NEXT, u16::MAX)] {
        let (mut driver, mut queue) = TestDriver::with_queue(RAM);
        driver.write_descriptor(0, DATA, 1, flags, next);
        driver.add_head(0);
        assert_eq!(
            queue.drain(complete),
            Err(GuestFault::Chain { queue: 0, head: 0 }),
            "{flags} {next}"
        );
    }
    for head in [16, u16::MAX] {
        let (mut driver, mut queue) = TestDriver::with_queue(RAM);
        driver.add_head(head);
        assert_eq!(queue.drain(complete), Err(GuestFault::Chain { queue: 0, head }));
    }
}

#[test]
fn buffer_outside_guest_memory_is_a_fault() {
    let end = RAM as u64;
    for (address, len) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2), (0, u32::MAX)]
    {
        for flags in [0, WRITE] {
            let (mut driver, mut queue) = TestDriver::with_queue(RAM);
            driver.add_chain(&[(address, len, flags)]);
            let fault = Err(GuestFault::BufferAddress { queue: 0, head: 0 });
            assert_eq!(queue.drain(complete), fault, "{address:#x} {len}");
        }
    }
}

#[test]
fn chain_over_4_gib_is_a_fault() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.write_descriptor(0, 0, u32::MAX, NEXT, 1);
    driver.write_descriptor(1, 0, u32::MAX, 0, 0);
    driver.add_head(0);
    assert!(queue.drain(complete).is_err());
}

#[test]
fn zero_length_descriptors_are_empty_buffers() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.add_chain(&[(DATA, 0, 0), (DATA, 4, 0), (0, 0, WRITE)]);
    queue
        .drain(|chain| {
            assert_eq!((chain.readable.len(), chain.writable.len()), (4, 0));
            complete(chain)
        })
        .unwrap();
    assert_eq!(driver.used_chains().len(), 1);
}

#[test]
fn readable_after_writable_is_a_fault() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.add_chain(&[(DATA, 4, WRITE), (DATA, 4, 0)]);
    assert_eq!(queue.drain(complete), Err(GuestFault::Chain { queue: 0, head: 0 }));
}

#[test]
fn flags_that_were_not_negotiated_are_a_fault() {
    // Whatever the table contains: a valid chain, another table, or nothing.
    let table = 0x4_0000;
    for inner in [0, NEXT, VRING_DESC_F_INDIRECT] {
        for outer in (2..16).map(|bit| 1 << bit) {
            for flags in [outer, outer | NEXT, outer | WRITE] {
                let (mut driver, mut queue) = TestDriver::with_queue(RAM);
                let descriptor = Descriptor::new(DATA, 1, u16::try_from(inner).unwrap(), 1);
                driver.ram.write_obj(descriptor, GuestAddress(table)).unwrap();
                driver.write_descriptor(0, table, 16, flags, 1);
                driver.write_descriptor(1, DATA, 1, 0, 0);
                driver.add_head(0);
                let flags = u16::try_from(flags).unwrap();
                assert_eq!(
                    queue.drain(complete),
                    Err(GuestFault::DescriptorFlags { queue: 0, head: 0, flags })
                );
                assert!(driver.used_chains().is_empty());
            }
        }
    }
}

#[test]
fn flag_in_the_middle_of_a_chain_is_a_fault() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.add_chain(&[(DATA, 4, 0), (DATA, 16, VRING_DESC_F_INDIRECT), (DATA, 4, WRITE)]);
    let flags = u16::try_from(VRING_DESC_F_INDIRECT | NEXT).unwrap();
    let fault = GuestFault::DescriptorFlags { queue: 0, head: 0, flags };
    assert_eq!(queue.drain(complete), Err(fault));
}

#[test]
fn chain_may_use_the_whole_table_and_no_more() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.add_chain(&[(DATA, 1, 0); 16]);
    let mut length = 0;
    queue
        .drain(|chain| {
            length = chain.readable.len();
            complete(chain)
        })
        .unwrap();
    assert_eq!(length, 16);
}

#[test]
fn bytes_cross_descriptors_both_ways() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.ram.write_slice(b"hello, world", GuestAddress(DATA)).unwrap();
    driver.add_chain(&[
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
            chain.readable.read_bytes(&mut greeting).unwrap();
            assert_eq!(&greeting, b"hello");
            assert!(chain.readable.read_bytes(&mut [0; 8]).is_none());
            let mut front = chain.readable.split_front(2);
            let mut bytes = VecDeque::new();
            front.append_to(&mut bytes);
            assert_eq!(bytes, b", ");
            assert_eq!(chain.readable.write_to_fd(theirs.as_fd()).unwrap(), 5);
            assert!(chain.readable.is_empty());

            assert!(chain.writable.write_bytes(&[0; 13]).is_none());
            chain.writable.write_bytes(b"abcd").unwrap();
            ours.write_all(b"efgh").unwrap();
            assert_eq!(chain.writable.read_from_fd(theirs.as_fd()).unwrap(), 4);
            assert_eq!(chain.writable.len(), 4);
            complete(chain)
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
