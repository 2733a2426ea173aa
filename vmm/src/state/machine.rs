//! The payload of a state file.

use super::malformed::Malformed;
use super::vcpu::{ChipState, VcpuState};
use super::wire::{Reader, Writer};
use crate::memory::PAGE_BYTES;
use crate::memory::memory_file::MAX_PARTS;
use crate::memory::page_run::{MAX_RUNS, PageRun, WorkingSet};
use crate::spec::{MAX_BINDING_BYTES, MAX_VCPUS};

/// The devices with queues of a microVM: vsock and the root image.
const MAX_DEVICES: u16 = 2;
/// The most queues of a device: vsock has three.
const MAX_QUEUES: u16 = 3;

/// The state of a microVM, except for its memory.
#[derive(Clone)]
pub struct MachineState {
    /// The identity of the files that belong to this state, as the host gave it.
    pub binding: String,
    /// The guest's clock: nanoseconds since it booted.
    pub clock_ns: u64,
    /// The interrupt controllers.
    pub chips: ChipState,
    /// The vCPUs, by index.
    pub vcpus: Vec<VcpuState>,
    /// The devices, in the order of their addresses.
    pub devices: Vec<DeviceState>,
    /// The parts of the memory file that have data; the rest is zero.
    pub parts: Vec<PageRun>,
    /// The pages that the guest uses first.
    pub working_set: WorkingSet,
}

/// One virtio device: its registers, and the progress of its running half.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceState {
    /// The status register.
    pub status: u32,
    /// Interrupts that the driver has not acknowledged.
    pub interrupts: u32,
    /// The features that the driver accepted.
    pub features: u64,
    /// The queue, and the halves of the features, that the driver selected last.
    pub selected: [u32; 3],
    /// The queues, in order.
    pub queues: Vec<QueueState>,
    /// A connection that the guest has requested and that was not answered yet.
    pub request: Option<ConnectionRequest>,
}

/// One queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// The size that the driver set.
    pub size: u32,
    /// The ready bit that the driver set.
    pub ready: bool,
    /// The addresses of descriptors, available ring and used ring.
    pub rings: [u64; 3],
    /// The number of chains taken from the available ring, modulo 2¹⁶.
    pub next_available: u16,
    /// The number of chains put into the used ring, modulo 2¹⁶.
    pub next_used: u16,
}

/// The request of a guest that waits for the host to accept its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionRequest {
    /// The guest's port.
    pub port: u32,
    /// The guest's receive buffer, in bytes.
    pub buf_alloc: u32,
    /// The bytes that the guest has taken out of the buffer: zero in a request of any usual driver.
    pub fwd_cnt: u32,
}

impl MachineState {
    /// Returns the payload of a state file.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        let bytes = self.binding.as_bytes();
        writer.write_list(bytes, MAX_BINDING_BYTES, |writer, byte| writer.write_value(byte));
        writer.write_value(&self.clock_ns);
        self.chips.encode(&mut writer);
        writer.write_list(&self.vcpus, MAX_VCPUS.into(), |writer, vcpu| vcpu.encode(writer));
        writer.write_list(&self.devices, MAX_DEVICES, |writer, device| device.encode(writer));
        encode_runs(&mut writer, &self.parts, MAX_PARTS);
        let WorkingSet { written, read, image } = &self.working_set;
        for runs in [written, read, image] {
            encode_runs(&mut writer, runs, MAX_RUNS);
        }
        writer.into_bytes()
    }

    /// Decodes the payload of a guest with this number of vCPUs, memory size and image size.
    ///
    /// # Errors
    /// The payload is malformed.
    pub fn decode(
        payload: &[u8],
        vcpus: u8,
        memory_bytes: u64,
        image_bytes: u64,
    ) -> Result<Self, Malformed> {
        let mut reader = Reader::new(payload);
        let binding = reader.read_list(MAX_BINDING_BYTES, |reader| reader.read_value::<u8>())?;
        let this = Self {
            binding: String::from_utf8(binding).map_err(|_| Malformed::Binding)?,
            clock_ns: reader.read_value()?,
            chips: ChipState::decode(&mut reader)?,
            vcpus: reader.read_list(MAX_VCPUS.into(), VcpuState::decode)?,
            devices: reader.read_list(MAX_DEVICES, DeviceState::decode)?,
            parts: decode_runs(&mut reader, MAX_PARTS, memory_bytes)?,
            working_set: WorkingSet {
                written: decode_runs(&mut reader, MAX_RUNS, memory_bytes)?,
                read: decode_runs(&mut reader, MAX_RUNS, memory_bytes)?,
                image: decode_runs(&mut reader, MAX_RUNS, image_bytes)?,
            },
        };
        reader.finish()?;
        if this.vcpus.len() != usize::from(vcpus) || this.devices.len() != usize::from(MAX_DEVICES)
        {
            return Err(Malformed::Count);
        }
        Ok(this)
    }
}

impl DeviceState {
    fn encode(&self, writer: &mut Writer) {
        writer.write_value(&self.status);
        writer.write_value(&self.interrupts);
        writer.write_value(&self.features);
        writer.write_value(&self.selected);
        writer.write_list(&self.queues, MAX_QUEUES, |writer, queue| queue.encode(writer));
        writer.write_value(&u8::from(self.request.is_some()));
        if let Some(ConnectionRequest { port, buf_alloc, fwd_cnt }) = self.request {
            writer.write_value(&[port, buf_alloc, fwd_cnt]);
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            status: reader.read_value()?,
            interrupts: reader.read_value()?,
            features: reader.read_value()?,
            selected: reader.read_value()?,
            queues: reader.read_list(MAX_QUEUES, QueueState::decode)?,
            request: if reader.read_flag()? {
                let [port, buf_alloc, fwd_cnt] = reader.read_value()?;
                Some(ConnectionRequest { port, buf_alloc, fwd_cnt })
            } else {
                None
            },
        })
    }
}

impl QueueState {
    fn encode(&self, writer: &mut Writer) {
        writer.write_value(&self.size);
        writer.write_value(&u8::from(self.ready));
        writer.write_value(&self.rings);
        writer.write_value(&self.next_available);
        writer.write_value(&self.next_used);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            size: reader.read_value()?,
            ready: reader.read_flag()?,
            rings: reader.read_value()?,
            next_available: reader.read_value()?,
            next_used: reader.read_value()?,
        })
    }
}

/// Appends runs in ascending order, each as its distance from the end of the one before, and its
/// length.
fn encode_runs(writer: &mut Writer, runs: &[PageRun], max: u16) {
    let mut end = 0;
    let runs = &runs[..runs.len().min(usize::from(max))];
    writer.write_list(runs, max, |writer, run| {
        writer.write_varint(run.first - end);
        writer.write_varint(run.count);
        end = run.end();
    });
}

fn decode_runs(reader: &mut Reader<'_>, max: u16, bytes: u64) -> Result<Vec<PageRun>, Malformed> {
    let mut end = 0u32;
    reader.read_list(max, |reader| {
        let (gap, count) = (reader.read_varint()?, reader.read_varint()?);
        let first = end.checked_add(gap).ok_or(Malformed::Page)?;
        end = first.checked_add(count).ok_or(Malformed::Page)?;
        if count == 0 || u64::from(end) > bytes / PAGE_BYTES {
            return Err(Malformed::Page);
        }
        Ok(PageRun { first, count })
    })
}
