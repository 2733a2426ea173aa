//! What is saved of a microVM, beside its memory.

use super::Malformed;
use super::wire::{Reader, Writer};
use crate::arch::x86_64::state::{ChipState, VcpuState};
use crate::memory::PAGE_BYTES;
use crate::spec::{MAX_BINDING_BYTES, MAX_VCPUS};

/// A microVM has two devices with queues: vsock and the root image.
const MAX_DEVICES: u16 = 2;
/// The most queues of a device of ours: vsock has three.
const MAX_QUEUES: u16 = 3;
/// The most parts of the memory file that are mapped; see [`memory`](crate::memory).
pub const MAX_PARTS: u16 = 64;
/// The most runs of pages in one list of a [`WorkingSet`]; one that is longer is cut off, and costs its page faults.
pub const MAX_RUNS: u16 = 4096;

/// Everything but memory.
#[derive(Clone)]
pub struct MachineState {
    /// What the host identifies the files by that belong to this state.
    pub binding: String,
    /// The guest's clock: nanoseconds since it booted.
    pub clock_ns: u64,
    /// The interrupt controllers.
    pub chips: ChipState,
    /// The vCPUs, by number.
    pub vcpus: Vec<VcpuState>,
    /// The devices, in the order of their addresses.
    pub devices: Vec<DeviceState>,
    /// Which parts of the memory file hold something; the rest is zero.
    pub parts: Vec<PageRun>,
    /// What the guest uses first.
    pub working_set: WorkingSet,
}

/// One virtio device: its registers, and where its running half has got to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceState {
    /// The status register.
    pub status: u32,
    /// Interrupts that the driver has not acknowledged.
    pub interrupts: u32,
    /// The features that the driver accepted.
    pub features: u64,
    /// Which queue, and which half of the features, the driver looked at last.
    pub selected: [u32; 3],
    /// The queues, in order.
    pub queues: Vec<QueueState>,
    /// A connection that the guest has asked for, and that has not been answered.
    pub request: Option<ConnectionRequest>,
}

/// One queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// As the driver set it.
    pub size: u32,
    /// As the driver set it.
    pub ready: bool,
    /// Addresses of descriptors, available ring and used ring.
    pub rings: [u64; 3],
    /// How many chains have been taken from the available ring, modulo 2¹⁶.
    pub next_available: u16,
    /// How many have been put into the used ring, modulo 2¹⁶.
    pub next_used: u16,
}

/// A guest that waits for the host to take its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionRequest {
    /// The guest's port.
    pub port: u32,
    /// The guest's receive buffer, in bytes.
    pub buf_alloc: u32,
    /// What it has taken out of that; zero, unless the guest is of a strange make.
    pub fwd_cnt: u32,
}

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The number of the first, from the start of the memory (which has no holes when counted like this) or image.
    pub first: u32,
    /// How many; never zero.
    pub count: u32,
}

/// Pages that the guest uses between being restored and having done something once. They are prepared together, which
/// costs a fraction of what a page fault in the guest does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Pages of memory that it writes to.
    pub written: Vec<PageRun>,
    /// Pages of memory that it only reads.
    pub read: Vec<PageRun>,
    /// Pages of the root image.
    pub image: Vec<PageRun>,
}

impl MachineState {
    /// The payload of a state file.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        let bytes = self.binding.as_bytes();
        writer.list(bytes, MAX_BINDING_BYTES, |writer, byte| writer.plain(byte));
        writer.plain(&self.clock_ns);
        self.chips.encode(&mut writer);
        writer.list(&self.vcpus, MAX_VCPUS.into(), |writer, vcpu| vcpu.encode(writer));
        writer.list(&self.devices, MAX_DEVICES, |writer, device| device.encode(writer));
        encode_runs(&mut writer, &self.parts, MAX_PARTS);
        let WorkingSet { written, read, image } = &self.working_set;
        for runs in [written, read, image] {
            encode_runs(&mut writer, runs, MAX_RUNS);
        }
        writer.into_bytes()
    }

    /// Reads a payload, of a guest with so many vCPUs, so much memory, and an image of this size.
    ///
    /// # Errors
    /// It is malformed.
    pub fn decode(
        payload: &[u8],
        vcpus: u8,
        memory_bytes: u64,
        image_bytes: u64,
    ) -> Result<Self, Malformed> {
        let mut reader = Reader::new(payload);
        let binding = reader.list(MAX_BINDING_BYTES, |reader| reader.plain::<u8>())?;
        let this = Self {
            binding: String::from_utf8(binding).map_err(|_| Malformed("its binding is no text"))?,
            clock_ns: reader.plain()?,
            chips: ChipState::decode(&mut reader)?,
            vcpus: reader.list(MAX_VCPUS.into(), VcpuState::decode)?,
            devices: reader.list(MAX_DEVICES, DeviceState::decode)?,
            parts: decode_runs(&mut reader, MAX_PARTS, memory_bytes)?,
            working_set: WorkingSet {
                written: decode_runs(&mut reader, MAX_RUNS, memory_bytes)?,
                read: decode_runs(&mut reader, MAX_RUNS, memory_bytes)?,
                image: decode_runs(&mut reader, MAX_RUNS, image_bytes)?,
            },
        };
        reader.end()?;
        if this.vcpus.len() != usize::from(vcpus) || this.devices.len() != usize::from(MAX_DEVICES)
        {
            return Err(Malformed("it has another number of vCPUs or devices than it says"));
        }
        Ok(this)
    }
}

impl DeviceState {
    fn encode(&self, writer: &mut Writer) {
        writer.plain(&self.status);
        writer.plain(&self.interrupts);
        writer.plain(&self.features);
        writer.plain(&self.selected);
        writer.list(&self.queues, MAX_QUEUES, |writer, queue| {
            writer.plain(&queue.size);
            writer.plain(&u8::from(queue.ready));
            writer.plain(&queue.rings);
            writer.plain(&queue.next_available);
            writer.plain(&queue.next_used);
        });
        writer.plain(&u8::from(self.request.is_some()));
        if let Some(ConnectionRequest { port, buf_alloc, fwd_cnt }) = self.request {
            writer.plain(&[port, buf_alloc, fwd_cnt]);
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            status: reader.plain()?,
            interrupts: reader.plain()?,
            features: reader.plain()?,
            selected: reader.plain()?,
            queues: reader.list(MAX_QUEUES, |reader| {
                Ok(QueueState {
                    size: reader.plain()?,
                    ready: reader.flag()?,
                    rings: reader.plain()?,
                    next_available: reader.plain()?,
                    next_used: reader.plain()?,
                })
            })?,
            request: if reader.flag()? {
                let [port, buf_alloc, fwd_cnt] = reader.plain()?;
                Some(ConnectionRequest { port, buf_alloc, fwd_cnt })
            } else {
                None
            },
        })
    }
}

/// Runs in ascending order, each as its distance from the one before and its length.
fn encode_runs(writer: &mut Writer, runs: &[PageRun], max: u16) {
    let mut end = 0;
    let runs = &runs[..runs.len().min(usize::from(max))];
    writer.list(runs, max, |writer, run| {
        writer.small(run.first - end);
        writer.small(run.count);
        end = run.first + run.count;
    });
}

fn decode_runs(reader: &mut Reader<'_>, max: u16, bytes: u64) -> Result<Vec<PageRun>, Malformed> {
    let outside = Malformed("a page is not in the memory");
    let mut end = 0u32;
    reader.list(max, |reader| {
        let (gap, count) = (reader.small()?, reader.small()?);
        let first = end.checked_add(gap).ok_or(outside)?;
        end = first.checked_add(count).ok_or(outside)?;
        if count == 0 || u64::from(end) > bytes / PAGE_BYTES {
            return Err(outside);
        }
        Ok(PageRun { first, count })
    })
}
