//! Guest memory.
//!
//! RAM is anonymous, private, and reserved without being committed (`MAP_NORESERVE`): a guest of 16 GiB costs what it
//! touches. Small guests are kept out of transparent huge pages, see [`HUGE_PAGES_FROM`].

pub mod memory_file;
pub mod working_set;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::arch::x86_64::layout::ram_ranges;

/// A guest's RAM.
pub type GuestRam = GuestMemoryMmap<()>;

/// The host's page size; on x86-64 there is no other.
pub const PAGE_BYTES: u64 = 4096;

/// Guests of at least this many bytes are left to the host's policy on huge pages. A smaller one touches some 15 MiB
/// scattered over its memory until it runs, and a huge page zeroes 2 MiB for the first byte: kept out of huge pages a guest
/// of 128 MiB reaches init in 247 instead of 269 ms of the nested host's clock, with 15.6 instead of 24.0 MiB of private
/// memory. A larger one fills a 64th of its memory with page descriptors, densely, and has a use for huge pages.
pub const HUGE_PAGES_FROM: u64 = 512 << 20;

/// Guest memory could not be made or filled.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused to map RAM.
    #[error(
        "map {bytes} bytes of guest memory: lower `memory_mib`, or raise the host's address-space limits"
    )]
    Map {
        /// The size of the range.
        bytes: u64,
        /// Why not.
        source: MmapRegionError,
    },
    /// Ranges of RAM overlap; a fault of ours.
    #[error("arrange guest memory")]
    Arrange(#[source] vm_memory::GuestRegionCollectionError),
    /// A file was to be mapped where the guest has no RAM.
    #[error("no guest memory at {address:#x} for {bytes} bytes of a file")]
    OutOfRange {
        /// Guest physical.
        address: u64,
        /// What was to be mapped there.
        bytes: u64,
    },
    /// The host refused to map a file.
    #[error("map {bytes} bytes of a file at guest address {address:#x}")]
    MapFile {
        /// Guest physical.
        address: u64,
        /// How much.
        bytes: u64,
        /// Why not.
        source: std::io::Error,
    },
}

/// Reserves RAM of this size, all zero, in the ranges of [`layout`](crate::arch::x86_64::layout).
///
/// # Errors
/// [`MemoryError::Map`] where the host does not give the address space.
pub fn create(total: u64) -> Result<GuestRam, MemoryError> {
    let regions = ram_ranges(total)
        .into_iter()
        .map(|(start, bytes)| {
            let region = usize::try_from(bytes)
                .map_err(|_| MmapRegionError::InvalidPointer)
                .and_then(|bytes| {
                    MmapRegionBuilder::new(bytes)
                        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                        .with_mmap_flags(
                            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                        )
                        .build()
                })
                .map_err(|source| MemoryError::Map { bytes, source })?;
            if total < HUGE_PAGES_FROM {
                // SAFETY: the whole of a mapping that was just made; advice changes nothing that can be seen. A host
                // without huge pages refuses it, and does not need it.
                unsafe {
                    libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_NOHUGEPAGE)
                };
            }
            leave_out_of_dumps(region.as_ptr(), region.size());
            // Only a range past the end of the address space is refused.
            GuestRegionMmap::new(region, start)
                .ok_or(MemoryError::OutOfRange { address: start.0, bytes })
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestRam::from_regions(regions).map_err(MemoryError::Arrange)
}

/// Puts pages of a file into guest memory, copy-on-write, without reading them: they stay the host's page cache until the
/// guest writes to them.
///
/// `address`, `offset` and `bytes` are multiples of [`PAGE_BYTES`]. The file must not shrink while the guest lives.
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
) -> Result<(), MemoryError> {
    let out_of_range = || MemoryError::OutOfRange { address: address.0, bytes };
    if !(address.0 | offset | bytes).is_multiple_of(PAGE_BYTES) || bytes == 0 {
        return Err(out_of_range());
    }
    let (region, start) = ram.to_region_addr(address).ok_or_else(out_of_range)?;
    if start.0.checked_add(bytes).is_none_or(|end| end > region.len()) {
        return Err(out_of_range());
    }
    let host = region.get_host_address(start).map_err(|_| out_of_range())?;
    let (Ok(length), Ok(offset)) = (usize::try_from(bytes), libc::off_t::try_from(offset)) else {
        return Err(out_of_range());
    };
    // SAFETY: the range lies in one mapping that `ram` owns, both ends checked above, so MAP_FIXED replaces nothing else.
    // Nobody holds a reference into guest memory: it is only accessed through volatile slices.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        let source = std::io::Error::last_os_error();
        return Err(MemoryError::MapFile { address: address.0, bytes, source });
    }
    leave_out_of_dumps(host, length);
    Ok(())
}

/// Maps a whole file read-only and shared, to be shown to a guest beside its RAM.
///
/// # Errors
/// The host refuses the mapping.
pub fn map_shared(file: &Arc<File>, bytes: usize) -> Result<MmapRegion<()>, MmapRegionError> {
    let region = MmapRegionBuilder::new(bytes)
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(vm_memory::FileOffset::from_arc(Arc::clone(file), 0))
        .build()?;
    leave_out_of_dumps(region.as_ptr(), region.size());
    Ok(region)
}

/// Keeps what is a guest's out of core dumps of the monitor. It also tells the two apart in `/proc/PID/smaps`.
fn leave_out_of_dumps(start: *mut u8, bytes: usize) {
    // SAFETY: a mapping of ours; advice changes nothing that can be seen.
    unsafe { libc::madvise(start.cast(), bytes, libc::MADV_DONTDUMP) };
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn the_largest_guest_costs_nothing_until_touched() {
        let ram = create(u64::from(crate::spec::MAX_MEMORY_MIB) << 20).unwrap();
        assert_eq!(ram.num_regions(), 2);
        let last = ram.last_addr();
        ram.write_obj(7u8, last).unwrap();
        assert_eq!(ram.read_obj::<u8>(last).unwrap(), 7);
    }

    #[test]
    fn a_mapped_file_is_copied_on_write() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 8192]).unwrap();
        let ram = create(64 << 20).unwrap();
        let at = GuestAddress(1 << 20);
        map_file(&ram, at, &file, 4096, 4096).unwrap();
        assert_eq!(ram.read_obj::<u8>(at).unwrap(), 1);
        ram.write_obj(2u8, at).unwrap();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 4096).unwrap();
        assert_eq!(byte, [1]);
    }

    #[test]
    fn mappings_out_of_range_or_unaligned_are_refused() {
        let file = tempfile::tempfile().unwrap();
        let ram = create(64 << 20).unwrap();
        for (address, offset, bytes) in [
            (64 << 20, 0, 4096),
            ((64 << 20) - 4096, 0, 8192),
            (1, 0, 4096),
            (0, 1, 4096),
            (0, 0, 1),
            (0, 0, 0),
        ] {
            let result = map_file(&ram, GuestAddress(address), &file, offset, bytes);
            assert!(
                matches!(result, Err(MemoryError::OutOfRange { .. })),
                "{address:#x} {offset} {bytes}"
            );
        }
    }
}
