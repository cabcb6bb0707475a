//! Fetching what the next product will read while this one computes.

use crate::prefetch::{LINE, fetch};

/// Bytes to fetch, a share at each step: a line or two, as more at once would be waited for.
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
