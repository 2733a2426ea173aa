//! Memory for the program itself.
//!
//! A monitor allocates some hundred small things while it makes a microVM, and then little more. A general allocator puts
//! things of each size into pages of their own, and gets those from the kernel one by one: together a tenth of the time it
//! takes to restore a guest. So the first allocations are laid side by side in memory that the program has anyway, and are
//! never reused; what comes later, and what is large, goes to the C library.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Four times what making a microVM takes. Pages of it that are not used cost nothing.
const BYTES: usize = 128 * 1024;

/// Larger than what is laid side by side: a buffer that would fill a quarter of it.
const LARGE: usize = BYTES / 4;

/// The program's allocator.
pub struct Heap {
    space: UnsafeCell<[u8; BYTES]>,
    used: AtomicUsize,
}

// SAFETY: every byte of the space is given out at most once, by an atomic counter.
unsafe impl Sync for Heap {}

impl Heap {
    /// An empty heap.
    #[expect(clippy::new_without_default, reason = "it is made once, as a static")]
    pub const fn new() -> Self {
        Self { space: UnsafeCell::new([0; BYTES]), used: AtomicUsize::new(0) }
    }

    /// A piece that nobody has had: all zero.
    fn take(&self, layout: Layout) -> Option<*mut u8> {
        if layout.size() > LARGE {
            return None;
        }
        let space = self.space.get().cast::<u8>();
        let place = |used: usize| {
            let start = (space.addr() + used).next_multiple_of(layout.align()) - space.addr();
            start.checked_add(layout.size()).filter(|end| *end <= BYTES).map(|end| (start, end))
        };
        let next = |used| place(used).map(|(_, end)| end);
        let used = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()?;
        // SAFETY: within the space, as was just found.
        place(used).map(|(start, _)| unsafe { space.add(start) })
    }

    fn owns(&self, pointer: *mut u8) -> bool {
        pointer.addr().wrapping_sub(self.space.get().addr()) < BYTES
    }
}

// SAFETY: pieces of the space are disjoint, aligned, and live as long as the program; everything else is the system's.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the ones asked for.
        self.take(layout).unwrap_or_else(|| unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the ones asked for.
        self.take(layout).unwrap_or_else(|| unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if !self.owns(pointer) {
            // SAFETY: it came from there, with this layout.
            unsafe { System.dealloc(pointer, layout) };
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !self.owns(pointer) {
            // SAFETY: it came from there, with this layout.
            return unsafe { System.realloc(pointer, layout, size) };
        }
        let Ok(larger) = Layout::from_size_align(size, layout.align()) else {
            return std::ptr::null_mut();
        };
        // SAFETY: the new piece does not overlap the old one, and both have as many bytes as are copied.
        unsafe {
            let new = self.alloc(larger);
            if !new.is_null() {
                new.copy_from_nonoverlapping(pointer, layout.size().min(size));
            }
            new
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_apart_and_what_does_not_fit_comes_from_the_system() {
        let heap = Box::new(Heap::new());
        let mut pieces = Vec::new();
        let sizes = [1, 3, 64, 4096, LARGE, LARGE + 1, 100_000];
        for round in 0..200u8 {
            for (size, align) in sizes.iter().zip([1, 2, 64, 4096, 8, 16, 1]) {
                let layout = Layout::from_size_align(*size, align).unwrap();
                // SAFETY: none of the sizes is zero.
                let piece = unsafe { heap.alloc_zeroed(layout) };
                assert_eq!(piece.addr() % align, 0);
                assert!(!heap.owns(piece) || *size <= LARGE);
                // SAFETY: all of the piece is ours, and zero so far.
                unsafe {
                    assert_eq!((piece.read(), piece.add(size - 1).read()), (0, 0));
                    piece.write_bytes(round, *size);
                }
                pieces.push((piece, layout, round));
            }
        }
        assert!(heap.owns(pieces[0].0) && !heap.owns(pieces[200].0));
        for (piece, layout, value) in pieces {
            // SAFETY: its contents are what was written; it is given back once, with the layout it has after growing.
            unsafe {
                let last = layout.size() - 1;
                assert_eq!((piece.read(), piece.add(last).read()), (value, value));
                let grown = heap.realloc(piece, layout, layout.size() * 2);
                assert_eq!((grown.read(), grown.add(last).read()), (value, value));
                let layout = Layout::from_size_align(layout.size() * 2, layout.align()).unwrap();
                heap.dealloc(grown, layout);
            }
        }
    }
}
