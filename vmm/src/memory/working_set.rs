//! Which pages a restored guest uses first, found out once and prepared every time.
//!
//! A page fault in a guest costs an exit, a page fault of the host, and a copy. Most of the first milliseconds of a restored
//! guest are such faults, and they are nearly the same every time. So a guest is restored once to be watched, with every
//! page in a mapping of its own, because the host maps neighbours of a page that is read as well: what is mapped after that
//! is what was used, and what is no longer the file's was written. No privilege is needed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::memory_file::locate;
use super::{GuestRam, MemoryError, PAGE_BYTES, map_file};
use crate::state::StateError;
use crate::state::machine::{MAX_RUNS, PageRun, WorkingSet};

/// The most mappings of single pages. The kernel allows a process 65,530 mappings (`vm.max_map_count`); what is not split is
/// watched with its neighbours.
const MAX_SPLIT_PAGES: u32 = 60_000;

/// Pages of the next larger size: the processor can map them at once if the host has them in one piece.
const FRAME_PAGES: u32 = 512;

/// As many pages of a frame used make it worth having in one piece.
const FRAME_WORTH_PAGES: u32 = 16;

// Flags of an entry of /proc/self/pagemap (`Documentation/admin-guide/mm/pagemap.rst` of Linux).
const PRESENT: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;

/// Memory file and image, each opened once more.
pub struct Twins {
    memory: File,
    image: File,
}

impl Twins {
    /// Opens them once more.
    ///
    /// # Errors
    /// There is no `/proc`, or the files may not be opened.
    pub fn open(memory: &File, image: &File) -> Result<Self, StateError> {
        let reopen = |file: &File| File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let failed = |source| StateError::File { operation: "open once more, to record,", source };
        Ok(Self { memory: reopen(memory).map_err(failed)?, image: reopen(image).map_err(failed)? })
    }
}

/// Tells which pages of this process are mapped.
pub struct Recorder {
    pagemap: File,
    twins: Twins,
    split: u32,
}

impl Recorder {
    /// Opens what the kernel tells about this process's pages. To be called before the process is made undumpable, which
    /// takes that away.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn new(twins: Twins) -> Result<Self, StateError> {
        let pagemap = File::open("/proc/self/pagemap").map_err(|source| StateError::File {
            operation: "open /proc/self/pagemap to record",
            source,
        })?;
        Ok(Self { pagemap, twins, split: 0 })
    }

    /// Maps parts of the memory file, as [`memory_file::map`](super::memory_file::map) does, page by page.
    ///
    /// # Errors
    /// The host refuses a mapping.
    pub fn map(
        &mut self,
        ram: &GuestRam,
        file: &File,
        parts: &[PageRun],
    ) -> Result<(), MemoryError> {
        for region in ram.iter() {
            // SAFETY: the whole of a mapping that is ours; advice changes nothing that can be seen.
            unsafe {
                libc::madvise(region.as_ptr().cast(), size(region.len()), libc::MADV_NOHUGEPAGE)
            };
        }
        for part in parts {
            for page in part.first..part.first + part.count {
                let offset = u64::from(page) * PAGE_BYTES;
                let outside = MemoryError::OutOfRange { address: offset, bytes: PAGE_BYTES };
                let (address, _) = locate(ram, offset).ok_or(outside)?;
                // Neighbours of the same file would be joined into one mapping; those of two files are not, even if these
                // are the same file opened twice.
                let file = if page % 2 == 0 { file } else { &self.twins.memory };
                map_file(ram, address, file, offset, PAGE_BYTES)?;
            }
        }
        self.split += parts.iter().map(|part| part.count).sum::<u32>();
        Ok(())
    }

    /// Whether parts of this size may be mapped page by page.
    pub fn can_split(&self, parts: &[PageRun]) -> bool {
        self.split + parts.iter().map(|part| part.count).sum::<u32>() <= MAX_SPLIT_PAGES
    }

    /// Maps a read-only image again, in place, page by page.
    ///
    /// # Errors
    /// The host refuses a mapping.
    pub fn split_image(&mut self, image: &MmapRegion<()>) -> Result<(), MemoryError> {
        let Some(file) = image.file_offset().map(vm_memory::FileOffset::file) else {
            return Ok(());
        };
        let pages = u32::try_from(image.size() as u64 / PAGE_BYTES).unwrap_or(u32::MAX);
        if !self.can_split(&[PageRun { first: 0, count: pages }]) {
            return Ok(());
        }
        let failed = |bytes| MemoryError::MapFile {
            address: 0,
            bytes,
            source: std::io::Error::last_os_error(),
        };
        for page in 0..pages {
            let file = if page % 2 == 0 { file } else { &self.twins.image };
            let offset = u64::from(page) * PAGE_BYTES;
            let Ok(at) = libc::off_t::try_from(offset) else { return Ok(()) };
            // SAFETY: a page of a mapping that is ours is replaced by the same page of the same file.
            let mapped = unsafe {
                libc::mmap(
                    image.as_ptr().add(size(offset)).cast(),
                    size(PAGE_BYTES),
                    libc::PROT_READ,
                    libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    file.as_raw_fd(),
                    at,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(failed(PAGE_BYTES));
            }
        }
        self.split += pages;
        Ok(())
    }

    /// What has been used of memory and image since they were mapped.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn collect(
        &self,
        ram: &GuestRam,
        image: &MmapRegion<()>,
    ) -> Result<WorkingSet, StateError> {
        let mut set = WorkingSet::default();
        let mut offset = 0;
        for region in ram.iter() {
            self.each(region.as_ptr(), region.len(), |page, flags| {
                let runs = if flags & OF_FILE == 0 { &mut set.written } else { &mut set.read };
                add(runs, offset + page);
            })?;
            offset += u32::try_from(region.len() / PAGE_BYTES).unwrap_or(0);
        }
        self.each(image.as_ptr(), image.size() as u64, |page, _| add(&mut set.image, page))?;
        Ok(set)
    }

    /// Calls `f` with each page that is mapped.
    fn each(
        &self,
        start: *const u8,
        bytes: u64,
        mut f: impl FnMut(u32, u64),
    ) -> Result<(), StateError> {
        let mut entries = [0; 4096];
        let first = start.addr() as u64 / PAGE_BYTES;
        let pages = bytes / PAGE_BYTES;
        let mut at = 0;
        while at < pages {
            let count = (pages - at).min(entries.len() as u64 / 8);
            let entries = &mut entries[..size(count * 8)];
            self.pagemap
                .read_exact_at(entries, (first + at) * 8)
                .map_err(|source| StateError::File { operation: "record", source })?;
            for (page, entry) in (at..).zip(entries.chunks_exact(8)) {
                let flags = u64::from_le_bytes(std::array::from_fn(|byte| entry[byte]));
                if flags & PRESENT != 0
                    && let Ok(page) = u32::try_from(page)
                {
                    f(page, flags);
                }
            }
            at += count;
        }
        Ok(())
    }
}

fn add(runs: &mut Vec<PageRun>, page: u32) {
    let full = runs.len() >= usize::from(MAX_RUNS);
    match runs.last_mut() {
        Some(run) if run.first + run.count == page => run.count += 1,
        _ if !full => runs.push(PageRun { first: page, count: 1 }),
        _ => {}
    }
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Has the host keep frames of the memory file in one piece, where the guest reads much of them and writes nothing: guest and
/// host then need one page fault for all of it. Only a file in memory (tmpfs) can be made so; what is made so is mapped by
/// one of its pages, and the others are left out of the set.
pub fn gather(file: &File, set: &mut WorkingSet, memory_bytes: u64) {
    let frames = u32::try_from(memory_bytes / PAGE_BYTES).unwrap_or(0) / FRAME_PAGES;
    for frame in 0..frames {
        let (first, end) = (frame * FRAME_PAGES, (frame + 1) * FRAME_PAGES);
        let used = |runs: &[PageRun]| runs.iter().map(|run| overlap(run, first, end)).sum::<u32>();
        if used(&set.written) == 0 && used(&set.read) >= FRAME_WORTH_PAGES && collapse(file, first)
        {
            let outside = |run: &PageRun| {
                let before = PageRun {
                    first: run.first,
                    count: first.saturating_sub(run.first).min(run.count),
                };
                let from = run.first.max(end);
                let after =
                    PageRun { first: from, count: (run.first + run.count).saturating_sub(from) };
                [before, after]
            };
            let mut read: Vec<_> =
                set.read.iter().flat_map(outside).filter(|run| run.count > 0).collect();
            read.push(PageRun { first, count: 1 });
            read.sort_by_key(|run| run.first);
            set.read = read;
        }
    }
}

fn overlap(run: &PageRun, first: u32, end: u32) -> u32 {
    (run.first + run.count).min(end).saturating_sub(run.first.max(first))
}

/// `MADV_COLLAPSE` of Linux 6.1; the C library's headers are older.
const MADV_COLLAPSE: libc::c_int = 25;

fn collapse(file: &File, first: u32) -> bool {
    let bytes = size(u64::from(FRAME_PAGES) * PAGE_BYTES);
    let Ok(offset) = libc::off_t::try_from(u64::from(first) * PAGE_BYTES) else { return false };
    // SAFETY: a new mapping, twice as large as needed, so that an aligned half is in it; a part of it is replaced by a
    // mapping of the file, and all of it is gone at the end. Nothing in it is accessed.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let space = libc::mmap(ptr::null_mut(), 2 * bytes, libc::PROT_NONE, flags, -1, 0);
        if space == libc::MAP_FAILED {
            return false;
        }
        let aligned = space.map_addr(|address| address.next_multiple_of(bytes));
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let mapped = libc::mmap(aligned, bytes, libc::PROT_READ, flags, file.as_raw_fd(), offset);
        let done = mapped != libc::MAP_FAILED && libc::madvise(mapped, bytes, MADV_COLLAPSE) == 0;
        libc::munmap(space, 2 * bytes);
        done
    }
}

/// Gives the guest its own copies of pages that it is going to write to. What the host refuses costs page faults, and
/// nothing else.
pub fn populate(ram: &GuestRam, runs: &[PageRun]) {
    for_each(ram, runs, |region, start, bytes| {
        if let Ok(host) = region.get_host_address(start) {
            // SAFETY: within one mapping of ours; what is in the pages does not change.
            unsafe { libc::madvise(host.cast(), size(bytes), libc::MADV_POPULATE_WRITE) };
        }
    });
}

/// Calls `f` with the region and the place in it of each run.
pub fn for_each<'a>(
    ram: &'a GuestRam,
    runs: &[PageRun],
    mut f: impl FnMut(&'a vm_memory::GuestRegionMmap<()>, vm_memory::MemoryRegionAddress, u64),
) {
    for run in runs {
        let mut offset = u64::from(run.first) * PAGE_BYTES;
        let end = offset + u64::from(run.count) * PAGE_BYTES;
        while offset < end {
            let Some((address, left)) = locate(ram, offset) else { return };
            let bytes = left.min(end - offset);
            if let Some((region, start)) = ram.to_region_addr(address) {
                f(region, start, bytes);
            }
            offset += bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{self, memory_file};

    fn run(first: u32, count: u32) -> PageRun {
        PageRun { first, count }
    }

    #[test]
    fn what_is_used_is_found_to_the_page() {
        let bytes = 64 << 20;
        let contents = tempfile::NamedTempFile::new().unwrap();
        contents.as_file().set_len(bytes).unwrap();
        contents.as_file().write_all_at(&vec![1; 4 << 20], 0).unwrap();
        let contents = File::open(contents.path()).unwrap();
        let parts = [run(0, 1024)];
        let ram = memory::create(bytes).unwrap();
        let image_file = tempfile::NamedTempFile::new().unwrap();
        image_file.as_file().set_len(2 << 20).unwrap();
        let image = std::sync::Arc::new(File::open(image_file.path()).unwrap());
        let mut recorder = Recorder::new(Twins::open(&contents, &image).unwrap()).unwrap();
        assert!(recorder.can_split(&parts));
        recorder.map(&ram, &contents, &parts).unwrap();

        let image = memory::map_shared(&image, 2 << 20).unwrap();
        recorder.split_image(&image).unwrap();
        assert_eq!(recorder.collect(&ram, &image).unwrap(), WorkingSet::default());

        let at = |page: u64| GuestAddress(page * PAGE_BYTES);
        for page in [3, 4, 100] {
            ram.write_obj(2u8, at(page)).unwrap();
        }
        for page in [3, 5, 7, 8] {
            ram.read_obj::<u8>(at(page)).unwrap();
        }
        ram.write_obj(2u8, at(5000)).unwrap();
        // SAFETY: in the mapping.
        unsafe { image.as_ptr().add(3 * 4096).read_volatile() };
        let set = recorder.collect(&ram, &image).unwrap();
        assert_eq!(set.written, [run(3, 2), run(100, 1), run(5000, 1)]);
        assert_eq!(set.read, [run(5, 1), run(7, 2)]);
        assert_eq!(set.image, [run(3, 1)]);

        // Another guest, to which the same pages are given.
        let ram = memory::create(bytes).unwrap();
        memory_file::map(&ram, &contents, &parts).unwrap();
        populate(&ram, &set.written);
        assert_eq!(recorder.collect(&ram, &image).unwrap().written, set.written);
        assert_eq!(ram.read_obj::<u8>(at(4)).unwrap(), 1);
    }

    #[test]
    fn frames_that_are_only_read_are_gathered_where_that_can_be() {
        // A file in memory, as a template's may be.
        let Ok(file) = tempfile::NamedTempFile::new_in("/dev/shm") else { return };
        file.as_file().write_all_at(&vec![1; 8 << 20], 0).unwrap();
        let read = vec![run(100, 20), run(500, 600), run(1600, 3)];
        let mut set =
            WorkingSet { written: vec![run(1030, 1)], read: read.clone(), image: Vec::new() };
        gather(file.as_file(), &mut set, 8 << 20);
        // The first frame and the second, but not the third, which is written to, or the fourth, of which little is read.
        let gathered = vec![run(0, 1), run(512, 1), run(1024, 76), run(1600, 3)];
        assert!(set.read == gathered || set.read == read, "{:?}", set.read);
    }
}
