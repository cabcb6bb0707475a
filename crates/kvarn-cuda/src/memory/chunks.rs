//! Which chunks of an address space have memory.

use std::ops::Range;

/// One flag per chunk.
#[derive(Debug)]
pub(super) struct Chunks {
    bytes: usize,
    provided: Vec<bool>,
}

impl Chunks {
    /// An empty address space of `count` chunks of `bytes` bytes.
    pub(super) fn new(bytes: usize, count: usize) -> Self {
        Self { bytes, provided: vec![false; count] }
    }

    /// The chunks without memory under the bytes of `range`, as runs of bytes, ascending.
    pub(super) fn missing(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        if range.is_empty() {
            return Vec::new();
        }
        let mut runs: Vec<Range<usize>> = Vec::new();
        for chunk in range.start / self.bytes..range.end.div_ceil(self.bytes) {
            if self.provided[chunk] {
                continue;
            }
            let start = chunk * self.bytes;
            match runs.last_mut() {
                Some(run) if run.end == start => run.end += self.bytes,
                _ => runs.push(start..start + self.bytes),
            }
        }
        runs
    }

    /// Marks a run of whole chunks.
    pub(super) fn provide(&mut self, run: &Range<usize>) {
        self.provided[run.start / self.bytes..run.end / self.bytes].fill(true);
    }

    /// Bytes with memory.
    pub(super) fn provided(&self) -> usize {
        self.provided.iter().filter(|&&provided| provided).count() * self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // one run is meant
    fn missing_chunks_are_joined_and_known_ones_left_out() {
        let mut chunks = Chunks::new(10, 8);
        assert_eq!(chunks.missing(&(5..5)), []);
        assert_eq!(chunks.missing(&(5..31)), [0..40]);
        chunks.provide(&(10..30));
        assert_eq!(chunks.missing(&(0..80)), [0..10, 30..80]);
        assert_eq!(chunks.missing(&(10..30)), []);
        assert_eq!(chunks.missing(&(29..31)), [30..40]);
        assert_eq!(chunks.provided(), 20);
        chunks.provide(&(30..40));
        assert_eq!(chunks.missing(&(0..80)), [0..10, 40..80]);
    }
}
