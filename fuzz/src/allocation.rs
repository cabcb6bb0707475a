//! How much memory a call takes at most: the allocator of everything linked with this crate keeps books, by thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// Bytes allocated and not freed by this thread, and their most.
    static LIVE: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(bytes: isize) {
    // A thread that is ending has no books any more.
    let _ = LIVE.try_with(|live| {
        let (now, most) = live.get();
        live.set((now + bytes, most.max(now + bytes)));
    });
}

// SAFETY: the system's allocator does the work; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // While it moves, both are there.
        count(bytes as isize);
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

/// What `work` gives, and the most bytes that it had allocated on this thread at a time.
pub fn most_allocated<R>(work: impl FnOnce() -> R) -> (R, usize) {
    let (before, most) = LIVE.get();
    LIVE.set((before, before));
    let result = work();
    let (now, reached) = LIVE.get();
    LIVE.set((now, most.max(reached)));
    (result, (reached - before) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_at_a_time_is_counted() {
        let (kept, most) = most_allocated(|| {
            drop(vec![0u8; 5000]);
            vec![0u8; 3000]
        });
        assert_eq!((kept.len(), most), (3000, 5000));
    }
}
