//! Prepares the pages that a restored guest uses first.
//!
//! A page fault in a guest costs an exit, a page fault of the host, and a copy. Most of the first
//! milliseconds of a restored guest are such faults, and they are nearly the same every time: they
//! are [recorded](super::recorder) once and prepared at each restore.

use std::fs::File;

use vm_memory::{GuestMemoryBackend, GuestRegionMmap, MemoryRegionAddress};

use super::mapping::{Advice, FileAccess, advise, map_anonymous, replace_pages};
use super::memory_file::locate_offset;
use super::page_run::{PageRun, WorkingSet};
use super::{GuestRam, PAGE_BYTES, to_usize};

/// The pages of a huge page, which the processor can map at once if the host has them in one piece.
const HUGE_PAGE_PAGES: u32 = 512;

/// The pages in use from which a huge page is worth having.
const MIN_READ_PAGES: u32 = 16;

/// Joins pages of the memory file into huge pages where the guest reads many of them and writes
/// none: guest and host then need one page fault for all. Only a file in memory (tmpfs) allows it.
/// In the set, a huge page is represented by its first page.
pub fn collapse_read_pages(file: &File, set: &mut WorkingSet, memory_bytes: u64) {
    let pages = u32::try_from(memory_bytes / PAGE_BYTES).unwrap_or(0);
    for huge_page in 0..pages / HUGE_PAGE_PAGES {
        let (first, end) = (huge_page * HUGE_PAGE_PAGES, (huge_page + 1) * HUGE_PAGE_PAGES);
        let used = |runs: &[PageRun]| runs.iter().map(|run| run.overlap(first, end)).sum::<u32>();
        if used(&set.written) == 0
            && used(&set.read) >= MIN_READ_PAGES
            && collapse_huge_page(file, first)
        {
            replace_by_first_page(&mut set.read, first, end);
        }
    }
}

/// Replaces the pages from `first` to `end` by the first.
fn replace_by_first_page(runs: &mut Vec<PageRun>, first: u32, end: u32) {
    let outside = |run: &PageRun| {
        let before =
            PageRun { first: run.first, count: first.saturating_sub(run.first).min(run.count) };
        let from = run.first.max(end);
        [before, PageRun { first: from, count: run.end().saturating_sub(from) }]
    };
    let mut kept: Vec<_> = runs.iter().flat_map(outside).filter(|run| run.count > 0).collect();
    kept.push(PageRun { first, count: 1 });
    kept.sort_by_key(|run| run.first);
    *runs = kept;
}

/// Joins the pages of a file from `first` into a huge page. Returns false if the host does not.
fn collapse_huge_page(file: &File, first: u32) -> bool {
    let bytes = to_usize(u64::from(HUGE_PAGE_PAGES) * PAGE_BYTES);
    // Twice as large as needed, so that an aligned part lies in it.
    let Ok(space) = map_anonymous(2 * bytes, libc::PROT_NONE) else { return false };
    let start = space.as_ptr().addr().next_multiple_of(bytes) - space.as_ptr().addr();
    let pages = (file, u64::from(first) * PAGE_BYTES);
    replace_pages(&space, start, bytes, pages, FileAccess::ReadOnly).is_ok()
        && advise(&space, start, bytes, Advice::Collapse).is_ok()
}

/// Gives the guest private copies of the pages that it is going to write to. A page that the host
/// does not copy costs a page fault, and nothing else.
pub fn populate_written(ram: &GuestRam, runs: &[PageRun]) {
    for_each_run(ram, runs, |region, start, bytes| {
        let _ = advise(region, to_usize(start.0), to_usize(bytes), Advice::PopulateWrite);
    });
}

/// Calls `f` with the region, the address in it and the length of each run, which is split at the
/// end of a region.
pub fn for_each_run<'a>(
    ram: &'a GuestRam,
    runs: &[PageRun],
    mut f: impl FnMut(&'a GuestRegionMmap<()>, MemoryRegionAddress, u64),
) {
    for run in runs {
        let mut offset = u64::from(run.first) * PAGE_BYTES;
        let end = u64::from(run.end()) * PAGE_BYTES;
        while offset < end {
            let Some((address, left)) = locate_offset(ram, offset) else { return };
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
    use std::os::unix::fs::FileExt;

    use super::*;

    fn run(first: u32, count: u32) -> PageRun {
        PageRun { first, count }
    }

    #[test]
    fn pages_only_read_become_huge_pages_if_possible() {
        // A file in memory, as that of a template may be.
        let Ok(file) = tempfile::NamedTempFile::new_in("/dev/shm") else { return };
        file.as_file().write_all_at(&vec![1; 8 << 20], 0).unwrap();
        let read = vec![run(100, 20), run(500, 600), run(1600, 3)];
        let mut set =
            WorkingSet { written: vec![run(1030, 1)], read: read.clone(), image: Vec::new() };
        collapse_read_pages(file.as_file(), &mut set, 8 << 20);
        // The first and the second huge page, but not the third, which is written to, nor the
        // fourth, of which little is read.
        let collapsed = vec![run(0, 1), run(512, 1), run(1024, 76), run(1600, 3)];
        assert!(set.read == collapsed || set.read == read, "{:?}", set.read);
    }

    #[test]
    fn pages_of_a_huge_page_are_replaced_by_its_first() {
        let mut runs = vec![run(100, 20), run(500, 600), run(1600, 3)];
        replace_by_first_page(&mut runs, 512, 1024);
        assert_eq!(runs, [run(100, 20), run(500, 12), run(512, 1), run(1024, 76), run(1600, 3)]);
    }
}
