//! Mappings of guest memory and of files, and advice to the host about them.
//!
//! Every function checks that the pages lie in the mapping, which makes it safe: the pages are
//! accessed through the volatile slices of vm-memory, by the guest, or not at all.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use libc::c_int;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion, ReadVolatile, VolatileMemory};

/// `MADV_COLLAPSE` of Linux 6.1; the headers of the C library are older.
const MADV_COLLAPSE: c_int = 25;

/// The access that a mapping gives to the pages of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileAccess {
    /// Writable, and never written to the file.
    CopyOnWrite,
    /// Read-only, and shared with all other mappings of the file.
    ReadOnly,
}

/// Advice to the host about pages of a mapping. It changes nothing that a program can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advice {
    /// Leave the pages out of core dumps. `/proc/PID/smaps` shows this too, by which guest memory
    /// can be told from the monitor's.
    DontDump,
    /// Do not use transparent huge pages.
    NoHugePages,
    /// Join the pages of a file in memory into huge pages.
    Collapse,
    /// Make private copies of the pages before they are written to.
    PopulateWrite,
}

/// Maps anonymous memory that takes no host memory before it is touched.
pub(super) fn map_anonymous(bytes: usize, prot: c_int) -> Result<MmapRegion<()>, MmapRegionError> {
    MmapRegionBuilder::new(bytes)
        .with_mmap_prot(prot)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
}

/// Maps a whole file read-only and shared.
///
/// # Errors
/// The host refuses the mapping.
pub fn map_shared_file(file: &Arc<File>, bytes: usize) -> Result<MmapRegion<()>, MmapRegionError> {
    let region = MmapRegionBuilder::new(bytes)
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), 0))
        .build()?;
    // A host that cannot leave them out of dumps still makes no dump of the monitor.
    let _ = advise(&region, 0, bytes, Advice::DontDump);
    Ok(region)
}

/// Maps memory that holds a copy of a whole file, read-only.
///
/// # Errors
/// The host refuses the mapping, or the file is shorter.
pub fn map_file_copy(file: &File, bytes: usize) -> Result<MmapRegion<()>, MmapRegionError> {
    let region = map_anonymous(bytes, libc::PROT_READ | libc::PROT_WRITE)?;
    let _ = advise(&region, 0, bytes, Advice::DontDump);
    let copied = region.get_slice(0, bytes).map_err(io::Error::other).and_then(|mut memory| {
        let mut file = file;
        file.rewind()?;
        file.read_exact_volatile(&mut memory).map_err(io::Error::other)
    });
    copied.and_then(|()| protect_pages(&region)).map_err(MmapRegionError::Mmap)?;
    Ok(region)
}

/// Makes a mapping read-only.
fn protect_pages(region: &MmapRegion<()>) -> io::Result<()> {
    // SAFETY: the range is the mapping that `region` owns, and to which no reference exists.
    match unsafe { libc::mprotect(region.as_ptr().cast(), region.size(), libc::PROT_READ) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Replaces `bytes` of a mapping, from `start`, by the pages of a file from `offset`. All are
/// multiples of the page size.
///
/// # Errors
/// The pages are not all in the mapping, or the host refuses.
pub(super) fn replace_pages(
    region: &MmapRegion<()>,
    start: usize,
    bytes: usize,
    (file, offset): (&File, u64),
    access: FileAccess,
) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let (prot, sharing) = match access {
        FileAccess::CopyOnWrite => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE),
        FileAccess::ReadOnly => (libc::PROT_READ, libc::MAP_SHARED),
    };
    let flags = sharing | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let address = page_address(region, start, bytes)?;
    // SAFETY: the range lies in one mapping, which `region` owns, so that MAP_FIXED replaces
    // nothing else. There are no references into it: guest memory is only accessed through volatile
    // slices.
    let mapped =
        unsafe { libc::mmap(address.cast(), bytes, prot, flags, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let _ = advise(region, start, bytes, Advice::DontDump);
    Ok(())
}

/// Advises the host about `bytes` of a mapping, from `start`.
///
/// # Errors
/// The pages are not all in the mapping, or the host does not know the advice.
pub(super) fn advise(
    region: &MmapRegion<()>,
    start: usize,
    bytes: usize,
    advice: Advice,
) -> io::Result<()> {
    let advice = match advice {
        Advice::DontDump => libc::MADV_DONTDUMP,
        Advice::NoHugePages => libc::MADV_NOHUGEPAGE,
        Advice::Collapse => MADV_COLLAPSE,
        Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
    };
    let address = page_address(region, start, bytes)?;
    // SAFETY: the range lies in a mapping that `region` owns. None of these changes the contents of
    // a page, protections or the extent of the mapping.
    match unsafe { libc::madvise(address.cast(), bytes, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the address of a range, after a check that it lies in the mapping.
fn page_address(region: &MmapRegion<()>, start: usize, bytes: usize) -> io::Result<*mut u8> {
    match start.checked_add(bytes) {
        Some(end) if end <= region.size() => Ok(region.as_ptr().wrapping_add(start)),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_outside_the_mapping_are_refused() {
        let region = map_anonymous(8192, libc::PROT_READ | libc::PROT_WRITE).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        for (start, bytes) in [(0, 12288), (4096, 8192), (8192, 4096), (usize::MAX, 4096)] {
            let pages = (&file, 0);
            let replaced = replace_pages(&region, start, bytes, pages, FileAccess::CopyOnWrite);
            let advised = advise(&region, start, bytes, Advice::DontDump);
            for result in [replaced, advised] {
                assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
            }
        }
        replace_pages(&region, 4096, 4096, (&file, 4096), FileAccess::CopyOnWrite).unwrap();
    }
}
