//! The guest kernel: an ELF `vmlinux`, mapped into guest memory copy-on-write instead of being copied, so that its pages
//! are shared between microVMs and cost nothing at boot.
//!
//! linux-loader reads segments into memory, which is the copy this avoids, and does not bound what a file makes it
//! allocate; so the few fields needed are read here, each checked before use.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use crate::memory::{self, GuestRam, MemoryError, PAGE_BYTES};

const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const ELF_CLASS_64: u8 = 2;
const ELF_LITTLE_ENDIAN: u8 = 1;
const ELF_MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;

/// The most program headers read. A `vmlinux` has five or six; a file with more is something else.
const MAX_PROGRAM_HEADERS: u16 = 32;

/// A file that cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file has no ELF header.
    #[error("not an ELF file: give the uncompressed `vmlinux`{}", hint(*compressed))]
    NotElf {
        /// Whether it is a compressed `bzImage`.
        compressed: bool,
    },
    /// An ELF file of another kind.
    #[error("not a 64-bit little-endian x86-64 ELF file: give a `vmlinux` built for x86-64")]
    WrongMachine,
    /// The program headers are not what a kernel has.
    #[error(
        "{count} program headers of {bytes} bytes: a kernel has 1 to {MAX_PROGRAM_HEADERS} of 56 bytes"
    )]
    ProgramHeaders {
        /// How many.
        count: u16,
        /// The size of each.
        bytes: u16,
    },
    /// The file ends before what its headers promise.
    #[error("truncated: {what} ends at byte {end}, the file at {length}: build or copy it again")]
    Truncated {
        /// What lies past the end.
        what: &'static str,
        /// Where that would end.
        end: u64,
        /// Where the file ends.
        length: u64,
    },
    /// A segment is outside the memory a guest of this size has for a kernel.
    #[error(
        "a segment at {address:#x} of {bytes} bytes is outside guest memory ({from:#x} to {to:#x}): raise `memory_mib`"
    )]
    OutsideMemory {
        /// Guest physical.
        address: u64,
        /// Its size in memory.
        bytes: u64,
        /// Where a kernel may start.
        from: u64,
        /// Where it must end.
        to: u64,
    },
    /// A segment is larger in the file than in memory.
    #[error("a segment at {address:#x} has {file} bytes in the file and {memory} in memory")]
    SegmentSize {
        /// Guest physical.
        address: u64,
        /// Bytes in the file.
        file: u64,
        /// Bytes in memory.
        memory: u64,
    },
    /// Two segments claim the same memory.
    #[error("segments overlap at {address:#x}")]
    Overlap {
        /// Guest physical.
        address: u64,
    },
    /// Nothing to load, or an entry point that is in no segment.
    #[error("the entry point {entry:#x} is in no loaded segment")]
    Entry {
        /// Guest physical.
        entry: u64,
    },
    /// Reading failed.
    #[error("read {what}")]
    Read {
        /// What was to be read.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Mapping failed.
    #[error("map a segment")]
    Map(#[source] MemoryError),
    /// The ends of a segment that do not fill a page could not be copied.
    #[error("copy {bytes} bytes to guest address {address:#x}")]
    Copy {
        /// Guest physical.
        address: u64,
        /// How many.
        bytes: usize,
        /// Why not.
        source: vm_memory::GuestMemoryError,
    },
}

fn hint(compressed: bool) -> &'static str {
    if compressed { ", not the compressed `bzImage`" } else { "" }
}

/// One loadable part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.address + self.memory_bytes
    }
}

/// A kernel whose headers were checked against its file and the guest's memory.
#[derive(Debug)]
pub struct KernelImage {
    entry: GuestAddress,
    segments: Vec<Segment>,
}

impl KernelImage {
    /// Reads and checks the headers. Segments may lie in guest memory from `from` to `to`.
    ///
    /// # Errors
    /// The first thing in the file that is not as it must be.
    pub fn read(file: &File, from: GuestAddress, to: GuestAddress) -> Result<Self, KernelError> {
        let length = file
            .metadata()
            .map_err(|source| KernelError::Read { what: "the length", source })?
            .len();
        let header = Fields(read_at::<ELF_HEADER_BYTES>(file, 0, length, "the ELF header")?);
        if header.bytes(0) != *b"\x7fELF" {
            // A bzImage says `HdrS` at 0x202.
            let compressed =
                read_at::<4>(file, 0x202, length, "").is_ok_and(|magic: [u8; 4]| magic == *b"HdrS");
            return Err(KernelError::NotElf { compressed });
        }
        if header.bytes(4) != [ELF_CLASS_64, ELF_LITTLE_ENDIAN]
            || header.u16(18) != ELF_MACHINE_X86_64
        {
            return Err(KernelError::WrongMachine);
        }
        let (entry, table) = (header.u64(24), header.u64(32));
        let (bytes, count) = (header.u16(54), header.u16(56));
        if usize::from(bytes) != PROGRAM_HEADER_BYTES || !(1..=MAX_PROGRAM_HEADERS).contains(&count)
        {
            return Err(KernelError::ProgramHeaders { count, bytes });
        }

        let mut segments = Vec::new();
        for number in 0..u64::from(count) {
            let at = table.saturating_add(number * PROGRAM_HEADER_BYTES as u64);
            let header =
                Fields(read_at::<PROGRAM_HEADER_BYTES>(file, at, length, "a program header")?);
            let segment = Segment {
                offset: header.u64(8),
                address: header.u64(24),
                file_bytes: header.u64(32),
                memory_bytes: header.u64(40),
            };
            if header.u32(0) == SEGMENT_LOAD && segment.memory_bytes > 0 {
                check(&segment, length, from.0, to.0)?;
                segments.push(segment);
            }
        }
        segments.sort_by_key(|segment| segment.address);
        if let Some(pair) = segments.windows(2).find(|pair| pair[0].end() > pair[1].address) {
            return Err(KernelError::Overlap { address: pair[1].address });
        }
        if !segments.iter().any(|segment| (segment.address..segment.end()).contains(&entry)) {
            return Err(KernelError::Entry { entry });
        }
        Ok(Self { entry: GuestAddress(entry), segments })
    }

    /// Where the guest starts.
    pub fn entry(&self) -> GuestAddress {
        self.entry
    }

    /// Maps the segments into fresh, zeroed guest memory. What of a segment does not fill a page is copied; what it has
    /// beyond the file is zero already.
    ///
    /// # Errors
    /// The host refuses a mapping, or the file was cut since [`read`](Self::read).
    pub fn map(&self, file: &File, ram: &GuestRam) -> Result<(), KernelError> {
        for segment in &self.segments {
            let end = segment.address + segment.file_bytes;
            let first_page = segment.address.next_multiple_of(PAGE_BYTES);
            let last_page = end - end % PAGE_BYTES;
            let same_phase = segment.offset % PAGE_BYTES == segment.address % PAGE_BYTES;
            if same_phase && first_page < last_page {
                let offset = segment.offset + (first_page - segment.address);
                memory::map_file(
                    ram,
                    GuestAddress(first_page),
                    file,
                    offset,
                    last_page - first_page,
                )
                .map_err(KernelError::Map)?;
                copy(file, segment, segment.address, first_page, ram)?;
                copy(file, segment, last_page, end, ram)?;
            } else {
                copy(file, segment, segment.address, end, ram)?;
            }
        }
        Ok(())
    }
}

fn check(segment: &Segment, length: u64, from: u64, to: u64) -> Result<(), KernelError> {
    let &Segment { offset, address, file_bytes, memory_bytes } = segment;
    if file_bytes > memory_bytes {
        return Err(KernelError::SegmentSize { address, file: file_bytes, memory: memory_bytes });
    }
    let end = offset.saturating_add(file_bytes);
    if end > length {
        return Err(KernelError::Truncated { what: "a segment", end, length });
    }
    let fits = address >= from && address.checked_add(memory_bytes).is_some_and(|end| end <= to);
    if !fits {
        return Err(KernelError::OutsideMemory { address, bytes: memory_bytes, from, to });
    }
    Ok(())
}

/// Copies what of a segment belongs to guest addresses `from` to `to`, a page at a time.
fn copy(
    file: &File,
    segment: &Segment,
    from: u64,
    to: u64,
    ram: &GuestRam,
) -> Result<(), KernelError> {
    let mut page = [0; 4096];
    let mut address = from;
    while address < to {
        let bytes = usize::try_from(to - address).unwrap_or(usize::MAX).min(page.len());
        let chunk = &mut page[..bytes];
        file.read_exact_at(chunk, segment.offset + (address - segment.address))
            .map_err(|source| KernelError::Read { what: "a segment", source })?;
        ram.write_slice(chunk, GuestAddress(address)).map_err(|source| KernelError::Copy {
            address,
            bytes,
            source,
        })?;
        address += bytes as u64;
    }
    Ok(())
}

fn read_at<const N: usize>(
    file: &File,
    at: u64,
    length: u64,
    what: &'static str,
) -> Result<[u8; N], KernelError> {
    let end = at.saturating_add(N as u64);
    if end > length {
        return Err(KernelError::Truncated { what, end, length });
    }
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, at).map_err(|source| KernelError::Read { what, source })?;
    Ok(bytes)
}

/// Little-endian fields of a header, at offsets that are constants within it.
struct Fields<const N: usize>([u8; N]);

impl<const N: usize> Fields<N> {
    fn bytes<const M: usize>(&self, at: usize) -> [u8; M] {
        std::array::from_fn(|index| self.0[at + index])
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

#[cfg(test)]
#[path = "kernel_test.rs"]
mod tests;
