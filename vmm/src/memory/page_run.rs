//! Runs of pages, and the working set of a restored guest.

/// The most runs of pages in one list of a [`WorkingSet`]. Pages beyond are left out, and cost
/// their page faults.
pub const MAX_RUNS: u16 = 4096;

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The index of the first page, from the start of the memory (counted without its hole) or
    /// image.
    pub first: u32,
    /// The number of pages; never zero.
    pub count: u32,
}

impl PageRun {
    /// Returns the index of the page after the last.
    pub fn end(&self) -> u32 {
        self.first + self.count
    }

    /// Counts the pages of the run from `first` to `end`.
    pub(super) fn overlap(&self, first: u32, end: u32) -> u32 {
        self.end().min(end).saturating_sub(self.first.max(first))
    }
}

/// The pages that a guest uses between being restored and having done its work once. They are
/// prepared together, which costs a fraction of the page faults in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Pages of memory that the guest writes to.
    pub written: Vec<PageRun>,
    /// Pages of memory that it only reads.
    pub read: Vec<PageRun>,
    /// Pages of the root image.
    pub image: Vec<PageRun>,
}

/// Appends a page to the run that it continues, or as a new run unless there are [`MAX_RUNS`]
/// already. Pages are added in ascending order.
pub(super) fn push_page(runs: &mut Vec<PageRun>, page: u32) {
    let full = runs.len() >= usize::from(MAX_RUNS);
    match runs.last_mut() {
        Some(run) if run.end() == page => run.count += 1,
        _ if !full => runs.push(PageRun { first: page, count: 1 }),
        _ => {}
    }
}
