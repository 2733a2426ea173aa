//! Records the pages that a restored guest uses.
//!
//! The guest is restored once to be watched, with every page in a separate mapping, because the
//! host maps the neighbours of a page that is read as well. The pages that are mapped after that
//! were used, and those that no longer belong to the file were written. No privilege is needed.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::mapping::{Advice, FileAccess, advise, replace_pages};
use super::memory_file::locate_offset;
use super::page_run::{PageRun, WorkingSet, push_page};
use super::{FileSharing, GuestRam, MemoryError, PAGE_BYTES, map_file, to_usize};

/// The most mappings of single pages. The kernel allows a process 65,530 mappings
/// (`vm.max_map_count`); pages beyond are watched with their neighbours.
const MAX_SPLIT_PAGES: u32 = 60_000;

// Flags of an entry of /proc/self/pagemap (`Documentation/admin-guide/mm/pagemap.rst` of Linux).
const PAGE_PRESENT: u64 = 1 << 63;
const PAGE_OF_FILE: u64 = 1 << 61;

/// The pages that a guest uses cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A file cannot be opened a second time.
    #[error("open the files of the template again, to record the pages in use")]
    Reopen(#[source] io::Error),
    /// The page map cannot be opened.
    #[error("open /proc/self/pagemap, to record the pages in use")]
    OpenPagemap(#[source] io::Error),
    /// The page map cannot be read.
    #[error("read /proc/self/pagemap, to record the pages in use")]
    ReadPagemap(#[source] io::Error),
}

/// Memory file and root image, each opened a second time: adjacent pages of the same open file
/// would be joined into one mapping.
pub struct ReopenedFiles {
    memory: File,
    image: File,
}

impl ReopenedFiles {
    /// Opens the files again.
    ///
    /// # Errors
    /// There is no `/proc`, or the files may not be opened.
    pub fn open(memory: &File, image: &File) -> Result<Self, RecordError> {
        let reopen = |file: &File| {
            File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(RecordError::Reopen)
        };
        Ok(Self { memory: reopen(memory)?, image: reopen(image)? })
    }
}

/// Records the pages of this process that are in use.
pub struct Recorder {
    pagemap: File,
    reopened: ReopenedFiles,
    /// The number of pages that have a mapping of their own.
    split_pages: u32,
}

impl Recorder {
    /// Opens the page map of this process. Call it before the process is made undumpable, which
    /// takes the page map away.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn new(reopened: ReopenedFiles) -> Result<Self, RecordError> {
        let pagemap = File::open("/proc/self/pagemap").map_err(RecordError::OpenPagemap)?;
        Ok(Self { pagemap, reopened, split_pages: 0 })
    }

    /// Returns true if parts of this size may be mapped page by page.
    pub fn can_split(&self, parts: &[PageRun]) -> bool {
        self.split_pages + count_pages(parts) <= MAX_SPLIT_PAGES
    }

    /// Maps parts of the memory file page by page.
    ///
    /// # Errors
    /// The host refuses a mapping.
    pub fn map_split_parts(
        &mut self,
        ram: &GuestRam,
        file: &File,
        parts: &[PageRun],
    ) -> Result<(), MemoryError> {
        for region in ram.iter() {
            let _ = advise(region, 0, to_usize(region.len()), Advice::NoHugePages);
        }
        for part in parts {
            for page in part.first..part.end() {
                let offset = u64::from(page) * PAGE_BYTES;
                let outside = MemoryError::OutOfRange { address: offset, bytes: PAGE_BYTES };
                let (address, _) = locate_offset(ram, offset).ok_or(outside)?;
                let file = if page % 2 == 0 { file } else { &self.reopened.memory };
                map_file(ram, address, file, offset, PAGE_BYTES, FileSharing::Shared)?;
            }
        }
        self.split_pages += count_pages(parts);
        Ok(())
    }

    /// Maps a read-only image again, in place, page by page.
    ///
    /// # Errors
    /// The host refuses a mapping.
    pub fn split_image(&mut self, image: &MmapRegion<()>) -> Result<(), MemoryError> {
        let Some(file) = image.file_offset().map(FileOffset::file) else {
            return Ok(());
        };
        let count = u32::try_from(image.size() as u64 / PAGE_BYTES).unwrap_or(u32::MAX);
        if !self.can_split(&[PageRun { first: 0, count }]) {
            return Ok(());
        }
        for page in 0..count {
            let file = if page % 2 == 0 { file } else { &self.reopened.image };
            let offset = u64::from(page) * PAGE_BYTES;
            let (start, bytes) = (to_usize(offset), to_usize(PAGE_BYTES));
            replace_pages(image, start, bytes, (file, offset), FileAccess::ReadOnly).map_err(
                |source| MemoryError::MapFile { address: offset, bytes: PAGE_BYTES, source },
            )?;
        }
        self.split_pages += count;
        Ok(())
    }

    /// Returns the pages of memory and image that were used since they were mapped.
    ///
    /// # Errors
    /// The page map cannot be read.
    pub fn collect_pages(
        &self,
        ram: &GuestRam,
        image: &MmapRegion<()>,
    ) -> Result<WorkingSet, RecordError> {
        let mut set = WorkingSet::default();
        let mut offset = 0;
        for region in ram.iter() {
            self.for_each_present(region.as_ptr(), region.len(), |page, flags| {
                let runs = if flags & PAGE_OF_FILE == 0 { &mut set.written } else { &mut set.read };
                push_page(runs, offset + page);
            })?;
            offset += u32::try_from(region.len() / PAGE_BYTES).unwrap_or(0);
        }
        self.for_each_present(image.as_ptr(), image.size() as u64, |page, _| {
            push_page(&mut set.image, page);
        })?;
        Ok(set)
    }

    /// Calls `f` with the index and the flags of each page that is mapped.
    fn for_each_present(
        &self,
        start: *const u8,
        bytes: u64,
        mut f: impl FnMut(u32, u64),
    ) -> Result<(), RecordError> {
        let mut entries = [0; 4096];
        let first = start.addr() as u64 / PAGE_BYTES;
        let pages = bytes / PAGE_BYTES;
        let mut at = 0;
        while at < pages {
            let count = (pages - at).min(entries.len() as u64 / 8);
            let entries = &mut entries[..to_usize(count * 8)];
            self.pagemap
                .read_exact_at(entries, (first + at) * 8)
                .map_err(RecordError::ReadPagemap)?;
            for (page, entry) in (at..).zip(entries.chunks_exact(8)) {
                let flags = u64::from_le_bytes(std::array::from_fn(|byte| entry[byte]));
                if flags & PAGE_PRESENT != 0
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

fn count_pages(parts: &[PageRun]) -> u32 {
    parts.iter().map(|part| part.count).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::arch::x86_64::layout::ram_ranges;
    use crate::memory::FileSharing;
    use crate::memory::memory_file::map_parts;
    use crate::memory::working_set::populate_written;
    use crate::memory::{create_ram, map_shared_file};

    const RAM_BYTES: u64 = 64 << 20;

    fn run(first: u32, count: u32) -> PageRun {
        PageRun { first, count }
    }

    fn address(page: u64) -> GuestAddress {
        GuestAddress(page * PAGE_BYTES)
    }

    /// A memory file and an image, open for reading.
    fn files() -> (File, File) {
        let memory = tempfile::NamedTempFile::new().unwrap();
        memory.as_file().set_len(RAM_BYTES).unwrap();
        memory.as_file().write_all_at(&vec![1; 4 << 20], 0).unwrap();
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(2 << 20).unwrap();
        (File::open(memory.path()).unwrap(), File::open(image.path()).unwrap())
    }

    #[test]
    fn used_pages_are_recorded_and_populated() {
        let (memory, image) = files();
        let parts = [run(0, 1024)];
        let ram = create_ram(&ram_ranges(RAM_BYTES)).unwrap();
        let mut recorder = Recorder::new(ReopenedFiles::open(&memory, &image).unwrap()).unwrap();
        assert!(recorder.can_split(&parts));
        recorder.map_split_parts(&ram, &memory, &parts).unwrap();
        let image = map_shared_file(&Arc::new(image), 2 << 20).unwrap();
        recorder.split_image(&image).unwrap();
        assert_eq!(recorder.collect_pages(&ram, &image).unwrap(), WorkingSet::default());

        for page in [3, 4, 100] {
            ram.write_obj(2u8, address(page)).unwrap();
        }
        for page in [3, 5, 7, 8] {
            ram.read_obj::<u8>(address(page)).unwrap();
        }
        ram.write_obj(2u8, address(5000)).unwrap();
        let image_ram = vm_memory::GuestRegionMmap::new(image, GuestAddress(0)).unwrap();
        image_ram.read_obj::<u8>(vm_memory::MemoryRegionAddress(3 * PAGE_BYTES)).unwrap();
        let set = recorder.collect_pages(&ram, &image_ram).unwrap();
        assert_eq!(set.written, [run(3, 2), run(100, 1), run(5000, 1)]);
        assert_eq!(set.read, [run(5, 1), run(7, 2)]);
        assert_eq!(set.image, [run(3, 1)]);

        // Another guest gets private copies of the same pages.
        let ram = create_ram(&ram_ranges(RAM_BYTES)).unwrap();
        map_parts(&ram, &memory, &parts, FileSharing::Shared).unwrap();
        populate_written(&ram, &set.written);
        assert_eq!(recorder.collect_pages(&ram, &image_ram).unwrap().written, set.written);
        assert_eq!(ram.read_obj::<u8>(address(4)).unwrap(), 1);
    }
}
