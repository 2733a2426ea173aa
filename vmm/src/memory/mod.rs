//! Guest memory.
//!
//! RAM is anonymous, private, and reserved without being committed (`MAP_NORESERVE`): a guest of 16
//! GiB costs the host the pages that it touches. Small guests are kept out of transparent huge
//! pages, see [`HUGE_PAGES_FROM`].

mod mapping;
pub mod memory_file;
pub mod page_run;
pub mod recorder;
pub mod working_set;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use self::mapping::{Advice, FileAccess, advise, map_anonymous, replace_pages};
pub use self::mapping::{map_file_copy, map_shared_file};

/// A guest's RAM.
pub type GuestRam = GuestMemoryMmap<()>;

/// The page size of host and guest; x86-64 has no other.
pub const PAGE_BYTES: u64 = 4096;

/// The size from which guests are left to the host's policy on huge pages.
///
/// A smaller guest touches some 15 MiB scattered over its memory until it runs, and a huge page
/// zeroes 2 MiB for the first byte: without huge pages a guest of 128 MiB reaches init in 247
/// instead of 269 ms of the nested host's clock, with 15.6 instead of 24.0 MiB of private memory. A
/// larger guest fills a 64th of its memory with page descriptors, densely, and benefits from huge
/// pages.
pub const HUGE_PAGES_FROM: u64 = 512 << 20;

/// The unit of copies of a file.
const COPY_CHUNK: usize = 256 * 1024;

/// Guest memory could not be made or filled.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum MemoryError {
    /// The host refuses to map RAM.
    #[error(
        "map {bytes} bytes of guest memory: lower `memory_mib`, or raise the host's address-space \
         limits"
    )]
    Map { bytes: u64, source: MmapRegionError },
    /// Ranges of RAM overlap, which only a fault of the monitor explains.
    #[error("arrange guest memory")]
    Arrange(#[source] vm_memory::GuestRegionCollectionError),
    /// The guest has no RAM where a file is to be mapped.
    #[error("no guest memory at {address:#x} for {bytes} bytes of a file")]
    OutOfRange { address: u64, bytes: u64 },
    /// The host refuses to map a file.
    #[error("map {bytes} bytes of a file at guest address {address:#x}")]
    MapFile { address: u64, bytes: u64, source: io::Error },
}

/// Reserves RAM, all zero, in ranges of guest addresses, lowest first.
///
/// # Errors
/// [`MemoryError::Map`] if the host does not give the address space.
pub fn create_ram(ranges: &[(GuestAddress, u64)]) -> Result<GuestRam, MemoryError> {
    let total: u64 = ranges.iter().map(|(_, bytes)| bytes).sum();
    let regions = ranges
        .iter()
        .map(|(start, bytes)| create_region(*start, *bytes, total < HUGE_PAGES_FROM))
        .collect::<Result<Vec<_>, _>>()?;
    GuestRam::from_regions(regions).map_err(MemoryError::Arrange)
}

fn create_region(
    start: GuestAddress,
    bytes: u64,
    is_small: bool,
) -> Result<GuestRegionMmap<()>, MemoryError> {
    let region = usize::try_from(bytes)
        .map_err(|_| MmapRegionError::InvalidPointer)
        .and_then(|bytes| map_anonymous(bytes, libc::PROT_READ | libc::PROT_WRITE))
        .map_err(|source| MemoryError::Map { bytes, source })?;
    if is_small {
        // A host without huge pages refuses the advice, and does not need it.
        let _ = advise(&region, 0, region.size(), Advice::NoHugePages);
    }
    let _ = advise(&region, 0, region.size(), Advice::DontDump);
    // Only a range past the end of the address space is refused.
    GuestRegionMmap::new(region, start).ok_or(MemoryError::OutOfRange { address: start.0, bytes })
}

/// The relation of a guest's memory to the files that it is filled from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSharing {
    /// Pages of a file are the host's page cache, which other guests share, until they are written
    /// to.
    Shared,
    /// Pages of a file are copied, so that no other process has them.
    Private,
}

/// Maps pages of a file into guest memory, copy-on-write, without reading them: they stay the
/// host's page cache until the guest writes to them. If the memory is private, they are copied.
///
/// `address`, `offset` and `bytes` are multiples of [`PAGE_BYTES`]. The file must not shrink while
/// the guest lives.
///
/// # Errors
/// [`MemoryError::OutOfRange`] if the pages are not all in one range of RAM or not aligned;
/// [`MemoryError::MapFile`] if the host refuses.
pub fn map_file(
    ram: &GuestRam,
    address: GuestAddress,
    file: &File,
    offset: u64,
    bytes: u64,
    sharing: FileSharing,
) -> Result<(), MemoryError> {
    let out_of_range = || MemoryError::OutOfRange { address: address.0, bytes };
    if !(address.0 | offset | bytes).is_multiple_of(PAGE_BYTES) || bytes == 0 {
        return Err(out_of_range());
    }
    let (region, start) = ram.to_region_addr(address).ok_or_else(out_of_range)?;
    if start.0.checked_add(bytes).is_none_or(|end| end > region.len()) {
        return Err(out_of_range());
    }
    let (Ok(start), Ok(length)) = (usize::try_from(start.0), usize::try_from(bytes)) else {
        return Err(out_of_range());
    };
    let done = match sharing {
        FileSharing::Shared => {
            replace_pages(region, start, length, (file, offset), FileAccess::CopyOnWrite)
        }
        FileSharing::Private => copy_pages(ram, address, file, offset, length),
    };
    done.map_err(|source| MemoryError::MapFile { address: address.0, bytes, source })
}

/// Copies pages of a file into memory that is zero. Pages that are zero in the file are left out.
fn copy_pages(
    ram: &GuestRam,
    address: GuestAddress,
    file: &File,
    offset: u64,
    bytes: usize,
) -> io::Result<()> {
    let mut chunk = vec![0; COPY_CHUNK.min(bytes)];
    let mut done = 0;
    while done < bytes {
        let length = chunk.len().min(bytes - done);
        let chunk = &mut chunk[..length];
        file.read_exact_at(chunk, offset + done as u64)?;
        for page in chunk.chunks(to_usize(PAGE_BYTES)) {
            if page.iter().any(|byte| *byte != 0) {
                let at = GuestAddress(address.0 + done as u64);
                ram.write_slice(page, at).map_err(io::Error::other)?;
            }
            done += page.len();
        }
    }
    Ok(())
}

/// Converts a length that is bounded by a mapping of this process.
fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::arch::x86_64::layout::ram_ranges;

    #[test]
    fn largest_guest_costs_nothing_until_touched() {
        let ram = create_ram(&ram_ranges(u64::from(crate::spec::MAX_MEMORY_MIB) << 20)).unwrap();
        assert_eq!(ram.num_regions(), 2);
        let last = ram.last_addr();
        ram.write_obj(7u8, last).unwrap();
        assert_eq!(ram.read_obj::<u8>(last).unwrap(), 7);
    }

    #[test]
    fn mapped_file_is_copied_on_write() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 8192]).unwrap();
        let ram = create_ram(&ram_ranges(64 << 20)).unwrap();
        let at = GuestAddress(1 << 20);
        map_file(&ram, at, &file, 4096, 4096, FileSharing::Shared).unwrap();
        assert_eq!(ram.read_obj::<u8>(at).unwrap(), 1);
        ram.write_obj(2u8, at).unwrap();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 4096).unwrap();
        assert_eq!(byte, [1]);
    }

    #[test]
    fn private_memory_is_a_copy_of_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes = (COPY_CHUNK + 3 * 4096) as u64;
        let contents: Vec<u8> =
            (0..bytes).map(|at| if at < 8192 { 0 } else { at.to_le_bytes()[0] | 1 }).collect();
        file.write_all(&contents).unwrap();
        let ram = create_ram(&ram_ranges(64 << 20)).unwrap();
        let at = GuestAddress(1 << 20);
        map_file(&ram, at, &file, 4096, bytes - 4096, FileSharing::Private).unwrap();
        // A later change of the file, which a mapping would show, changes nothing.
        file.set_len(0).unwrap();
        let mut found = vec![0xee; contents.len() - 4096];
        ram.read_slice(&mut found, at).unwrap();
        assert!(found == contents[4096..]);
        assert!(map_file(&ram, at, &file, 0, 4096, FileSharing::Private).is_err());
    }

    #[test]
    fn mapping_out_of_range_or_unaligned_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let ram = create_ram(&ram_ranges(64 << 20)).unwrap();
        for (address, offset, bytes) in [
            (64 << 20, 0, 4096),
            ((64 << 20) - 4096, 0, 8192),
            (1, 0, 4096),
            (0, 1, 4096),
            (0, 0, 1),
            (0, 0, 0),
        ] {
            for sharing in [FileSharing::Shared, FileSharing::Private] {
                let result = map_file(&ram, GuestAddress(address), &file, offset, bytes, sharing);
                assert!(
                    matches!(result, Err(MemoryError::OutOfRange { .. })),
                    "{address:#x} {offset} {bytes}"
                );
            }
        }
    }
}
