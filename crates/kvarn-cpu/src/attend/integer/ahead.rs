//! Fetching what the next product will read while this one computes.

/// Bytes of a cache line.
const LINE: usize = 64;

/// Bytes to fetch into the cache, a share at each step.
pub(super) struct Ahead<'a> {
    rest: &'a [u8],
    share: usize,
}

impl<'a> Ahead<'a> {
    /// Fetches `bytes` in `steps` steps.
    pub(super) fn new(bytes: &'a [u8], steps: usize) -> Self {
        Self { rest: bytes, share: bytes.len().div_ceil(steps.max(1)).next_multiple_of(LINE) }
    }

    /// Asks for the next share.
    #[inline(always)]
    pub(super) fn step(&mut self) {
        let (share, rest) = self.rest.split_at(self.share.min(self.rest.len()));
        self.rest = rest;
        for line in share.chunks(LINE) {
            fetch(line.as_ptr());
        }
    }
}

#[inline(always)]
fn fetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: part of the baseline; a prefetch of any address is allowed.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
