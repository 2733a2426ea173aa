use super::super::test_driver::TestDriver;
use super::*;

const RAM: usize = 1 << 20;
/// The address of the buffers.
const DATA: u64 = 0x8000;
const WRITE: u32 = virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

fn complete(_: &mut Chain<'_>) -> Result<Completion, GuestFault> {
    Ok(Completion::EMPTY)
}

#[test]
fn drain_completes_in_order_with_one_interrupt() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.add_chain(&[(DATA, 3, 0), (DATA + 16, 5, WRITE)]);
    driver.add_chain(&[(DATA, 7, 0)]);
    let mut seen = Vec::new();
    queue
        .drain(|chain| {
            seen.push((chain.readable.len(), chain.writable.len()));
            Ok(Completion::Done { len: u32::try_from(chain.writable.len()).unwrap() })
        })
        .unwrap();
    assert_eq!(seen, [(3, 5), (7, 0)]);
    assert_eq!(driver.used_chains(), [(0, 5), (2, 0)]);
    assert_eq!(driver.interrupt_count(), 1);
}

#[test]
fn stopped_chain_is_taken_again() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.add_chain(&[(DATA, 1, 0)]);
    driver.add_chain(&[(DATA, 2, 0)]);
    queue.drain(|_| Ok(Completion::Stop)).unwrap();
    assert!(driver.used_chains().is_empty());
    let mut seen = Vec::new();
    queue
        .drain(|chain| {
            seen.push(chain.readable.len());
            complete(chain)
        })
        .unwrap();
    assert_eq!(seen, [1, 2]);
}

#[test]
fn deferred_chain_is_completed_later() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.add_chain(&[(DATA, 1, WRITE)]);
    queue.drain(|_| Ok(Completion::Deferred)).unwrap();
    assert!(driver.used_chains().is_empty());
    queue.complete(0, 9).unwrap();
    assert_eq!(driver.used_chains(), [(0, 9)]);
    assert_eq!(driver.interrupt_count(), 1);
}

#[test]
fn endless_chains_yield_after_one_turn() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.add_chain(&[(DATA, 1, 0)]);
    let mut count = 0;
    // The driver makes the same descriptor available again whenever it was taken.
    queue
        .drain(|_| {
            count += 1;
            driver.add_head(0);
            Ok(Completion::Done { len: 0 })
        })
        .unwrap();
    assert_eq!(count, CHAINS_PER_TURN);
    assert_eq!(driver.take_kicks(), 1);
}

#[test]
fn available_index_too_far_ahead_is_a_fault() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.add_chain(&[(DATA, 1, 0)]);
    driver.set_available_index(17);
    assert_eq!(queue.drain(complete), Err(GuestFault::AvailableRing { queue: 0 }));
    driver.set_available_index(u16::MAX);
    assert_eq!(queue.drain(complete), Err(GuestFault::AvailableRing { queue: 0 }));
}

#[test]
fn fault_keeps_completed_chains() {
    let (mut driver, mut queue) = TestDriver::with_queue(RAM);
    driver.add_chain(&[(DATA, 1, 0)]);
    driver.add_chain(&[(u64::MAX, 1, 0)]);
    assert!(queue.drain(complete).is_err());
    assert_eq!(driver.used_chains(), [(0, 0)]);
    assert_eq!(driver.interrupt_count(), 1);
}
