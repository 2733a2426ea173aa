//! The guest kernel: an ELF `vmlinux`.
//!
//! It is mapped into guest memory copy-on-write instead of being copied, so that microVMs share its
//! pages and they cost nothing at boot, unless the guest has private memory. linux-loader copies
//! segments into memory, and does not bound the allocations that a file makes it do; so the few
//! fields needed are read here, each checked before use.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use crate::memory::{self, FileSharing, GuestRam, MemoryError, PAGE_BYTES};

const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const ELF_CLASS_64: u8 = 2;
const ELF_LITTLE_ENDIAN: u8 = 1;
const ELF_MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;

/// The magic of a compressed `bzImage`, which is not at its start.
const BZ_IMAGE_MAGIC: &[u8; 4] = b"HdrS";
const BZ_IMAGE_MAGIC_OFFSET: u64 = 0x202;

/// The most program headers of a kernel. A `vmlinux` has five or six; a file with more is something
/// else.
const MAX_PROGRAM_HEADERS: u16 = 32;

/// The file cannot be booted.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum KernelError {
    /// The file has no ELF header.
    #[error("not an ELF file: give the uncompressed `vmlinux`{}", compression_hint(*compressed))]
    NotElf { compressed: bool },
    /// The file is an ELF file of another kind.
    #[error("not a 64-bit little-endian x86-64 ELF file: give a `vmlinux` built for x86-64")]
    WrongMachine,
    /// The program headers are not those of a kernel.
    #[error(
        "{count} program headers of {bytes} bytes: a kernel has 1 to {MAX_PROGRAM_HEADERS} of 56 \
         bytes"
    )]
    ProgramHeaders { count: u16, bytes: u16 },
    /// The file is shorter than its headers say.
    #[error("truncated: {what} ends at byte {end}, the file at {length}: build or copy it again")]
    Truncated { what: &'static str, end: u64, length: u64 },
    /// A segment is outside the memory that a guest of this size has for a kernel.
    #[error(
        "a segment at {address:#x} of {bytes} bytes is outside guest memory ({from:#x} to \
         {to:#x}): raise `memory_mib`"
    )]
    OutsideMemory { address: u64, bytes: u64, from: u64, to: u64 },
    /// A segment is larger in the file than in memory.
    #[error("a segment at {address:#x} has {file} bytes in the file and {memory} in memory")]
    SegmentSize { address: u64, file: u64, memory: u64 },
    /// Two segments claim the same memory.
    #[error("segments overlap at {address:#x}")]
    Overlap { address: u64 },
    /// No segment has the entry point.
    #[error("the entry point {entry:#x} is in no loaded segment")]
    Entry { entry: u64 },
    /// Reading failed.
    #[error("read {what}")]
    Read { what: &'static str, source: std::io::Error },
    /// Mapping failed.
    #[error("map a segment")]
    Map(#[source] MemoryError),
    /// The ends of a segment that do not fill a page could not be copied.
    #[error("copy {bytes} bytes to guest address {address:#x}")]
    Copy { address: u64, bytes: usize, source: vm_memory::GuestMemoryError },
}

fn compression_hint(compressed: bool) -> &'static str {
    if compressed { ", not the compressed `bzImage`" } else { "" }
}

/// One loadable segment of the file.
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

    /// Checks that the segment lies in a file of `length` bytes, and in guest memory from `from` to
    /// `to`.
    fn check_bounds(&self, length: u64, from: u64, to: u64) -> Result<(), KernelError> {
        let &Segment { offset, address, file_bytes: file, memory_bytes: memory } = self;
        if file > memory {
            return Err(KernelError::SegmentSize { address, file, memory });
        }
        let end = offset.saturating_add(file);
        if end > length {
            return Err(KernelError::Truncated { what: "a segment", end, length });
        }
        let fits = address >= from && address.checked_add(memory).is_some_and(|end| end <= to);
        if !fits {
            return Err(KernelError::OutsideMemory { address, bytes: memory, from, to });
        }
        Ok(())
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
    /// The first header that is invalid.
    pub fn read_headers(
        file: &File,
        from: GuestAddress,
        to: GuestAddress,
    ) -> Result<Self, KernelError> {
        let length = file
            .metadata()
            .map_err(|source| KernelError::Read { what: "the length", source })?
            .len();
        let header = read_elf_header(file, length)?;
        let (entry, table) = (header.u64(24), header.u64(32));
        let (bytes, count) = (header.u16(54), header.u16(56));
        if usize::from(bytes) != PROGRAM_HEADER_BYTES || !(1..=MAX_PROGRAM_HEADERS).contains(&count)
        {
            return Err(KernelError::ProgramHeaders { count, bytes });
        }

        let mut segments = Vec::new();
        for number in 0..u64::from(count) {
            let at = table.saturating_add(number * PROGRAM_HEADER_BYTES as u64);
            if let Some(segment) = read_segment(file, at, length)? {
                segment.check_bounds(length, from.0, to.0)?;
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

    /// Returns the entry point.
    pub fn entry(&self) -> GuestAddress {
        self.entry
    }

    /// Maps the segments into new, zeroed guest memory. The ends of a segment that do not fill a
    /// page are copied; the memory of a segment beyond its bytes in the file is zero already.
    ///
    /// # Errors
    /// The host refuses a mapping, or the file was cut since [`read_headers`](Self::read_headers).
    pub fn map_segments(
        &self,
        file: &File,
        ram: &GuestRam,
        sharing: FileSharing,
    ) -> Result<(), KernelError> {
        for segment in &self.segments {
            let end = segment.address + segment.file_bytes;
            let first_page = segment.address.next_multiple_of(PAGE_BYTES);
            let last_page = end - end % PAGE_BYTES;
            let same_phase = segment.offset % PAGE_BYTES == segment.address % PAGE_BYTES;
            if same_phase && first_page < last_page {
                let offset = segment.offset + (first_page - segment.address);
                let bytes = last_page - first_page;
                memory::map_file(ram, GuestAddress(first_page), file, offset, bytes, sharing)
                    .map_err(KernelError::Map)?;
                copy_bytes(file, segment, segment.address, first_page, ram)?;
                copy_bytes(file, segment, last_page, end, ram)?;
            } else {
                copy_bytes(file, segment, segment.address, end, ram)?;
            }
        }
        Ok(())
    }
}

/// Reads the ELF header and checks that it is that of an x86-64 file.
fn read_elf_header(
    file: &File,
    length: u64,
) -> Result<HeaderFields<ELF_HEADER_BYTES>, KernelError> {
    let header = HeaderFields(read_bytes_at(file, 0, length, "the ELF header")?);
    if header.bytes(0) != *b"\x7fELF" {
        let magic = read_bytes_at(file, BZ_IMAGE_MAGIC_OFFSET, length, "");
        let compressed = magic.is_ok_and(|magic: [u8; 4]| magic == *BZ_IMAGE_MAGIC);
        return Err(KernelError::NotElf { compressed });
    }
    if header.bytes(4) != [ELF_CLASS_64, ELF_LITTLE_ENDIAN] || header.u16(18) != ELF_MACHINE_X86_64
    {
        return Err(KernelError::WrongMachine);
    }
    Ok(header)
}

/// Reads a program header. Returns `None` if it has nothing to load.
fn read_segment(file: &File, at: u64, length: u64) -> Result<Option<Segment>, KernelError> {
    let bytes = read_bytes_at::<PROGRAM_HEADER_BYTES>(file, at, length, "a program header")?;
    let header = HeaderFields(bytes);
    let segment = Segment {
        offset: header.u64(8),
        address: header.u64(24),
        file_bytes: header.u64(32),
        memory_bytes: header.u64(40),
    };
    Ok((header.u32(0) == SEGMENT_LOAD && segment.memory_bytes > 0).then_some(segment))
}

/// Copies the bytes of a segment that belong to guest addresses `from` to `to`, a page at a time.
fn copy_bytes(
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

fn read_bytes_at<const N: usize>(
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

/// The little-endian fields of a header, at offsets that are constants within it.
struct HeaderFields<const N: usize>([u8; N]);

impl<const N: usize> HeaderFields<N> {
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
