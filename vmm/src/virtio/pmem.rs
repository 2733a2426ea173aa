//! The root image as persistent memory. The guest maps the image's pages directly, so that all
//! microVMs share the host's page cache and no block is ever copied.
//!
//! The memory itself is a read-only memory slot of KVM. The device only tells the guest its
//! address, and answers flush requests, for which a read-only image has nothing to do. Source:
//! VIRTIO 1.2, section 5.19.

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use vm_memory::GuestAddress;

use super::chain::Chain;
use super::queue::{ActiveQueue, Completion};
use super::{Activation, Flow, GuestFault, HandlerState, NotQuiescent, QueueHandler, VirtioDevice};

/// Linux sends one flush request at a time.
const QUEUE_SIZES: [u16; 1] = [16];
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`.
const REQUEST_FLUSH: u32 = 0;
/// The `ret` field of a successful response.
const FLUSH_SUCCEEDED: u32 = 0;

/// The negotiation half.
pub struct Pmem {
    config: [u8; 16],
}

impl Pmem {
    /// Makes a device whose memory is at `start` in the guest, `bytes` long.
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

/// The running half.
struct PmemHandler {
    queues: Vec<ActiveQueue>,
}

impl QueueHandler for PmemHandler {
    fn on_kick(&mut self) -> Result<Flow, GuestFault> {
        for queue in &mut self.queues {
            let index = queue.index();
            queue.drain(|chain| handle_request(index, chain))?;
        }
        Ok(Flow::Continue)
    }

    fn save(&self) -> Result<HandlerState, NotQuiescent> {
        // A request that was added and not taken is found again from the saved position.
        let positions = self.queues.iter().map(ActiveQueue::position).collect();
        Ok(HandlerState { positions, request: None })
    }
}

/// Answers a flush request. Nothing was written to the image, so there is nothing to make durable.
fn handle_request(queue: u16, chain: &mut Chain<'_>) -> Result<Completion, GuestFault> {
    let head = chain.head;
    let too_small = |bytes| GuestFault::BufferTooSmall { queue, head, bytes };
    let mut kind = [0; 4];
    let bytes = chain.readable.len();
    chain.readable.read_bytes(&mut kind).ok_or(too_small(bytes))?;
    let kind = u32::from_le_bytes(kind);
    if kind != REQUEST_FLUSH {
        return Err(GuestFault::UnknownRequest { queue, kind });
    }
    let bytes = chain.writable.len();
    chain.writable.write_bytes(&FLUSH_SUCCEEDED.to_le_bytes()).ok_or(too_small(bytes))?;
    Ok(Completion::Done { len: 4 })
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::test_driver::{TestDriver, test_activation, test_ram};
    use super::*;

    const WRITE: u32 = virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

    #[test]
    fn flush_is_answered_and_other_requests_are_faults() {
        for (kind, answer_bytes, expected) in [
            (0u32, 4, Ok(Flow::Continue)),
            (1, 4, Err(GuestFault::UnknownRequest { queue: 0, kind: 1 })),
            (0, 3, Err(GuestFault::BufferTooSmall { queue: 0, head: 0, bytes: 3 })),
        ] {
            let ram = test_ram(1 << 20);
            let mut driver = TestDriver::new(&ram, 0, 16);
            ram.write_obj(kind, GuestAddress(0x8000)).unwrap();
            ram.write_obj(u32::MAX, GuestAddress(0x9000)).unwrap();
            driver.add_chain(&[(0x8000, 4, 0), (0x9000, answer_bytes, WRITE)]);
            let mut device = Pmem::new(GuestAddress(1 << 32), 2 << 20);
            let mut handler = device.activate(test_activation(vec![driver.device_queue(0)]));
            assert_eq!(handler.on_kick(), expected);
            if expected.is_ok() {
                assert_eq!(ram.read_obj::<u32>(GuestAddress(0x9000)).unwrap(), 0);
                assert_eq!(driver.used_chains(), [(0, 4)]);
            }
        }
    }
}
