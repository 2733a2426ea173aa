//! The memory file of a template: written once, when the template is made, then mapped by every
//! guest that is restored from it.
//!
//! Byte `n` of the file is byte `n` of RAM, counted without the hole for devices. Pages that are
//! zero are holes in the file. Only the parts with data are mapped, so that a guest that touches
//! other memory for the first time gets a zeroed page, and not a copy of one that had to be read
//! from the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{OFlags, fcntl_getfl};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::page_run::PageRun;
use super::{FileSharing, GuestRam, MemoryError, PAGE_BYTES, map_file, to_usize};

/// The most parts of the file that are mapped.
pub const MAX_PARTS: u16 = 64;

/// The unit of reading and writing.
const CHUNK_BYTES: usize = 256 * 1024;

/// The shortest run of zero pages that is left out: fewer are mapped with their neighbours. A
/// mapping costs 20 µs of every restore (the nested host's clock), a page that is zero in the file
/// 15 µs of the guest that uses it, and a guest uses few of them at first.
const GAP_PAGES: u32 = 2048;

/// The memory file of a template cannot be written or used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum MemoryFileError {
    /// Writing failed.
    #[error("write the memory file of the template")]
    Write(#[source] io::Error),
    /// The properties of the file cannot be read.
    #[error("examine the memory file of the template")]
    Examine(#[source] io::Error),
    /// The file is a device, a pipe or a socket.
    #[error("the memory file of the template is not a regular file: build it again")]
    NotRegular,
    /// The file could be changed through this descriptor.
    #[error("the memory file of the template is not open for reading only: build it again")]
    Writable,
    /// The file is too short.
    #[error(
        "the memory file of the template has {bytes} bytes, less than the {needed} bytes of the \
         guest's memory: build it again"
    )]
    TooShort { bytes: u64, needed: u64 },
}

/// Writes memory that nothing changes any more. Returns the parts of the file that have data, and
/// their number of bytes without zero pages.
///
/// # Errors
/// Writing fails.
pub fn write_memory(ram: &GuestRam, file: &File) -> Result<(Vec<PageRun>, u64), MemoryFileError> {
    let runs = write_data_pages(ram, file).map_err(MemoryFileError::Write)?;
    let bytes = runs.iter().map(|run| u64::from(run.count) * PAGE_BYTES).sum();
    Ok((merge_runs(&runs), bytes))
}

fn write_data_pages(ram: &GuestRam, file: &File) -> io::Result<Vec<PageRun>> {
    let total: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
    // Earlier contents go, also where nothing is written.
    file.set_len(0)?;
    file.set_len(total)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut runs = Vec::new();
    let mut region_offset = 0;
    for region in ram.iter() {
        let mut at = 0;
        while at < region.len() {
            let length = to_usize(region.len() - at).min(CHUNK_BYTES);
            let chunk = &mut chunk[..length];
            region.read_slice(chunk, MemoryRegionAddress(at)).map_err(io::Error::other)?;
            write_chunk(file, region_offset + at, chunk, &mut runs)?;
            at += length as u64;
        }
        region_offset += region.len();
    }
    Ok(runs)
}

/// Writes the pages of a chunk that are not zero, and appends them to the runs.
fn write_chunk(file: &File, offset: u64, chunk: &[u8], runs: &mut Vec<PageRun>) -> io::Result<()> {
    let page_bytes = to_usize(PAGE_BYTES);
    let first = u32::try_from(offset / PAGE_BYTES).map_err(io::Error::other)?;
    let mut data = 0..0;
    for (page, bytes) in (0u32..).zip(chunk.chunks(page_bytes)) {
        let at = page as usize * page_bytes;
        if bytes.iter().all(|byte| *byte == 0) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end() == first + page => run.count += 1,
            _ => runs.push(PageRun { first: first + page, count: 1 }),
        }
        if data.end != at {
            file.write_all_at(&chunk[data.clone()], offset + data.start as u64)?;
            data.start = at;
        }
        data.end = at + bytes.len();
    }
    file.write_all_at(&chunk[data.clone()], offset + data.start as u64)
}

/// Joins runs with ever larger gaps until there are at most [`MAX_PARTS`].
fn merge_runs(runs: &[PageRun]) -> Vec<PageRun> {
    let mut gap = GAP_PAGES;
    loop {
        let mut parts: Vec<PageRun> = Vec::new();
        for run in runs {
            match parts.last_mut() {
                Some(part) if run.first - part.end() < gap => part.count = run.end() - part.first,
                _ => parts.push(*run),
            }
        }
        if parts.len() <= usize::from(MAX_PARTS) {
            return parts;
        }
        gap *= 2;
    }
}

/// Checks that a file can be mapped as memory: it is long enough, and cannot be changed through
/// this descriptor. A file that shrinks later would end the monitor by a signal; its owner must
/// prevent that.
///
/// # Errors
/// The file has a property that it must not have.
pub fn check_memory_file(file: &File, bytes: u64) -> Result<(), MemoryFileError> {
    let metadata = file.metadata().map_err(MemoryFileError::Examine)?;
    if !metadata.is_file() {
        return Err(MemoryFileError::NotRegular);
    }
    let flags = fcntl_getfl(file).map_err(|errno| MemoryFileError::Examine(errno.into()))?;
    if flags & OFlags::ACCMODE != OFlags::RDONLY {
        return Err(MemoryFileError::Writable);
    }
    if metadata.size() < bytes {
        return Err(MemoryFileError::TooShort { bytes: metadata.size(), needed: bytes });
    }
    Ok(())
}

/// Maps the parts of a file that have data into otherwise empty memory, copy-on-write, or copies
/// them.
///
/// # Errors
/// The host refuses a mapping.
pub fn map_parts(
    ram: &GuestRam,
    file: &File,
    parts: &[PageRun],
    sharing: FileSharing,
) -> Result<(), MemoryError> {
    for part in parts {
        let mut offset = u64::from(part.first) * PAGE_BYTES;
        let end = u64::from(part.end()) * PAGE_BYTES;
        while offset < end {
            let outside = || MemoryError::OutOfRange { address: offset, bytes: end - offset };
            let (address, left) = locate_offset(ram, offset).ok_or_else(outside)?;
            let bytes = left.min(end - offset);
            map_file(ram, address, file, offset, bytes, sharing)?;
            offset += bytes;
        }
    }
    Ok(())
}

/// Returns the guest address of byte `offset` of the memory file, and the number of bytes from
/// there to the end of its range of RAM.
pub(super) fn locate_offset(ram: &GuestRam, mut offset: u64) -> Option<(GuestAddress, u64)> {
    for region in ram.iter() {
        if offset < region.len() {
            return Some((GuestAddress(region.start_addr().0 + offset), region.len() - offset));
        }
        offset -= region.len();
    }
    None
}

#[cfg(test)]
#[path = "memory_file_test.rs"]
mod tests;
