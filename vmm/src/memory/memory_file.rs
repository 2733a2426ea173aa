//! Guest memory as a file: written once when a template is made, then mapped by every guest that is restored from it.
//!
//! Byte `n` of the file is byte `n` of RAM, counted without the hole for devices. Pages that are zero are holes in the
//! file. Only the parts that hold something are mapped, so that a guest that touches memory for the first time gets a
//! zeroed page, and not a copy of one that had to be read from the file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::{GuestRam, MemoryError, PAGE_BYTES, map_file};
use crate::state::StateError;
use crate::state::machine::{MAX_PARTS, PageRun};

/// How much is looked at, and written, at a time.
const CHUNK_BYTES: usize = 256 * 1024;

/// Zero pages in a row that are left out: fewer are mapped with their neighbours. A mapping costs 20 µs of every restore (the
/// nested host's clock), a page that is zero in the file 15 µs of the guest that uses it, and a guest uses few of them at first.
const GAP_PAGES: u32 = 2048;

/// Writes memory that nobody changes any more. Returns which parts of the file hold something, and how many bytes.
///
/// # Errors
/// Writing fails.
pub fn write(ram: &GuestRam, file: &File) -> io::Result<(Vec<PageRun>, u64)> {
    let total: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
    // Whatever was there before is gone, also where nothing is written.
    file.set_len(0)?;
    file.set_len(total)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut runs = Vec::new();
    let mut region_offset = 0;
    for region in ram.iter() {
        let mut at = 0;
        while at < region.len() {
            let length = usize::try_from(region.len() - at).unwrap_or(usize::MAX).min(CHUNK_BYTES);
            let chunk = &mut chunk[..length];
            region.read_slice(chunk, MemoryRegionAddress(at)).map_err(io::Error::other)?;
            write_chunk(file, region_offset + at, chunk, &mut runs)?;
            at += length as u64;
        }
        region_offset += region.len();
    }
    let bytes = runs.iter().map(|run| u64::from(run.count) * PAGE_BYTES).sum();
    Ok((merge(runs), bytes))
}

fn write_chunk(file: &File, offset: u64, chunk: &[u8], runs: &mut Vec<PageRun>) -> io::Result<()> {
    #[expect(clippy::cast_possible_truncation, reason = "4096")]
    let page_bytes = PAGE_BYTES as usize;
    let first = u32::try_from(offset / PAGE_BYTES).map_err(io::Error::other)?;
    let mut data = 0..0;
    for (page, bytes) in (0u32..).zip(chunk.chunks(page_bytes)) {
        let at = page as usize * page_bytes;
        if bytes.iter().all(|byte| *byte == 0) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.first + run.count == first + page => run.count += 1,
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

/// Joins runs until there are few enough of them.
fn merge(runs: Vec<PageRun>) -> Vec<PageRun> {
    let mut gap = GAP_PAGES;
    loop {
        let mut parts: Vec<PageRun> = Vec::new();
        for run in &runs {
            match parts.last_mut() {
                Some(part) if run.first - (part.first + part.count) < gap => {
                    part.count = run.first + run.count - part.first;
                }
                _ => parts.push(*run),
            }
        }
        if parts.len() <= usize::from(MAX_PARTS) {
            return parts;
        }
        gap *= 2;
    }
}

/// Makes sure that a file can be mapped as memory: it holds all of it, and nobody can change it through this descriptor.
/// A file that shrinks later would end the guest by a signal; whoever owns it must not let that happen.
///
/// # Errors
/// What is wrong with it.
pub fn check(file: &File, bytes: u64) -> Result<(), StateError> {
    let metadata = file
        .metadata()
        .map_err(|source| StateError::File { operation: "examine the memory of", source })?;
    if !metadata.is_file() {
        return Err(StateError::Memory("is no regular file"));
    }
    // SAFETY: asks for a number.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 || flags & libc::O_ACCMODE != libc::O_RDONLY {
        return Err(StateError::Memory("is not open for reading only"));
    }
    if metadata.size() < bytes {
        return Err(StateError::Memory("is shorter than the guest's memory"));
    }
    Ok(())
}

/// Maps the parts of a file that hold something into otherwise empty memory, copy-on-write.
///
/// # Errors
/// The host refuses a mapping.
pub fn map(ram: &GuestRam, file: &File, parts: &[PageRun]) -> Result<(), MemoryError> {
    for part in parts {
        let mut offset = u64::from(part.first) * PAGE_BYTES;
        let end = offset + u64::from(part.count) * PAGE_BYTES;
        while offset < end {
            let outside = || MemoryError::OutOfRange { address: offset, bytes: end - offset };
            let (address, left) = locate(ram, offset).ok_or_else(outside)?;
            let bytes = left.min(end - offset);
            map_file(ram, address, file, offset, bytes)?;
            offset += bytes;
        }
    }
    Ok(())
}

/// Where byte `offset` of all memory is, and how many bytes follow it there.
pub fn locate(ram: &GuestRam, mut offset: u64) -> Option<(GuestAddress, u64)> {
    for region in ram.iter() {
        if offset < region.len() {
            return Some((GuestAddress(region.start_addr().0 + offset), region.len() - offset));
        }
        offset -= region.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::memory;

    fn reopened(file: &tempfile::NamedTempFile) -> File {
        File::open(file.path()).unwrap()
    }

    #[test]
    fn what_was_written_is_mapped_back_and_not_changed() {
        let bytes = 64 << 20;
        let ram = memory::create(bytes).unwrap();
        let values =
            [(0u64, 1u8), (4095, 2), (40 << 20, 3), ((40 << 20) + 8192, 4), (bytes - 1, 5)];
        for (at, value) in values {
            ram.write_obj(value, GuestAddress(at)).unwrap();
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![9; 8192]).unwrap();
        let (parts, data) = write(&ram, file.as_file()).unwrap();
        let run = |first, count| PageRun { first, count };
        assert_eq!(parts, [run(0, 1), run(10240, 3), run(16383, 1)]);
        assert_eq!(data, 4 * PAGE_BYTES);
        assert_eq!(file.as_file().metadata().unwrap().len(), bytes);

        for _ in 0..2 {
            let file = reopened(&file);
            check(&file, bytes).unwrap();
            let ram = memory::create(bytes).unwrap();
            map(&ram, &file, &parts).unwrap();
            for (at, value) in values {
                assert_eq!(ram.read_obj::<u8>(GuestAddress(at)).unwrap(), value);
                ram.write_obj(99u8, GuestAddress(at)).unwrap();
            }
            assert_eq!(ram.read_obj::<u8>(GuestAddress(4096)).unwrap(), 0);
        }
    }

    #[test]
    fn parts_are_bounded() {
        let runs = (0..10_000).map(|number| PageRun { first: number * 100, count: 1 }).collect();
        let parts = merge(runs);
        assert!(parts.len() <= usize::from(MAX_PARTS));
        assert_eq!(parts[0].first, 0);
        assert_eq!(parts.last().unwrap().first + parts.last().unwrap().count, 999_901);
    }

    #[test]
    fn a_file_that_could_end_or_change_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let complaint = |file: &File, bytes| check(file, bytes).unwrap_err().to_string();
        assert!(complaint(&reopened(&file), 4097).contains("shorter"));
        assert!(complaint(file.as_file(), 4096).contains("reading only"));
        let (pipe, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(complaint(&File::from(OwnedFd::from(pipe)), 1).contains("no regular file"));
        check(&reopened(&file), 4096).unwrap();
    }

    #[test]
    fn memory_above_the_device_hole_follows_in_the_file() {
        let ram = memory::create(4 << 30).unwrap();
        assert_eq!(locate(&ram, (3 << 30) - 1), Some((GuestAddress((3 << 30) - 1), 1)));
        assert_eq!(locate(&ram, 3 << 30), Some((GuestAddress(4 << 30), 1 << 30)));
        assert_eq!(locate(&ram, 4 << 30), None);
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4 << 30).unwrap();
        file.as_file().write_all_at(&[7], 3 << 30).unwrap();
        map(&ram, &reopened(&file), &[PageRun { first: (3 << 18) - 1, count: 2 }]).unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(4 << 30)).unwrap(), 7);
    }
}
