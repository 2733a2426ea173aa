//! The root image as persistent memory: the guest maps the image's pages directly, so that every microVM shares the host's
//! page cache and no block is ever copied.
//!
//! The memory itself is a read-only slot of KVM's; this device only says where it is, and answers flush requests, which a
//! read-only image has none of. Source: VIRTIO 1.2, section 5.19.

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use vm_memory::GuestAddress;

use super::queue::{ActiveQueue, Completion, Position};
use super::{Activation, Flow, GuestFault, NotQuiescent, QueueHandler, VirtioDevice};
use crate::state::machine::ConnectionRequest;

/// Flush requests come one at a time.
const QUEUE_SIZES: [u16; 1] = [16];
const REQUEST_FLUSH: u32 = 0;
const FLUSHED: u32 = 0;

/// The negotiation half.
pub struct Pmem {
    config: [u8; 16],
}

impl Pmem {
    /// A device whose memory the guest finds at `start`, `bytes` long.
    pub fn new(start: GuestAddress, bytes: u64) -> Self {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&start.0.to_le_bytes());
        config[8..].copy_from_slice(&bytes.to_le_bytes());
        Self { config }
    }
}

impl VirtioDevice for Pmem {
    fn kind(&self) -> u32 {
        VIRTIO_ID_PMEM
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn activate(&mut self, activation: Activation) -> Box<dyn QueueHandler> {
        Box::new(PmemHandler { queues: activation.queues })
    }
}

struct PmemHandler {
    queues: Vec<ActiveQueue>,
}

impl QueueHandler for PmemHandler {
    fn on_kick(&mut self) -> Result<Flow, GuestFault> {
        for queue in &mut self.queues {
            let index = queue.index();
            queue.drain(|chain| {
                let (head, bytes) = (chain.head, chain.readable.len());
                let short = GuestFault::Short { queue: index, head, bytes };
                let mut kind = [0; 4];
                chain.readable.take(&mut kind).ok_or(short)?;
                let kind = u32::from_le_bytes(kind);
                if kind != REQUEST_FLUSH {
                    return Err(GuestFault::Request { queue: index, kind });
                }
                // Nothing was written, so that there is nothing to make durable.
                let bytes = chain.writable.len();
                let short = GuestFault::Short { queue: index, head, bytes };
                chain.writable.put(&FLUSHED.to_le_bytes()).ok_or(short)?;
                Ok(Completion::Done { len: 4 })
            })?;
        }
        Ok(Flow::Continue)
    }

    fn save(&self) -> Result<(Vec<Position>, Option<ConnectionRequest>), NotQuiescent> {
        // A request that was added and not yet taken is found again by whoever goes on from this position.
        Ok((self.queues.iter().map(ActiveQueue::position).collect(), None))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::queue::tests::Driver;
    use super::super::{activation, test_ram};
    use super::*;

    const WRITE: u32 = virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

    #[test]
    fn flush_is_answered_and_anything_else_is_a_fault() {
        for (kind, answer_bytes, expected) in [
            (0u32, 4, Ok(Flow::Continue)),
            (1, 4, Err(GuestFault::Request { queue: 0, kind: 1 })),
            (0, 3, Err(GuestFault::Short { queue: 0, head: 0, bytes: 3 })),
        ] {
            let ram = test_ram(1 << 20);
            let mut driver = Driver::new(&ram, 0, 16);
            ram.write_obj(kind, GuestAddress(0x8000)).unwrap();
            ram.write_obj(u32::MAX, GuestAddress(0x9000)).unwrap();
            driver.add(&[(0x8000, 4, 0), (0x9000, answer_bytes, WRITE)]);
            let mut device = Pmem::new(GuestAddress(1 << 32), 2 << 20);
            let mut handler = device.activate(activation(vec![driver.device(0)]));
            assert_eq!(handler.on_kick(), expected);
            if expected.is_ok() {
                assert_eq!(ram.read_obj::<u32>(GuestAddress(0x9000)).unwrap(), 0);
                assert_eq!(driver.used(), [(0, 4)]);
            }
        }
    }
}
