//! Working memory in whole cache lines.

use std::ops::{Deref, DerefMut};

/// Values that begin at a multiple of a cache line: a register of that size is then loaded from one line, not two.
#[derive(Debug)]
pub(super) struct Aligned {
    room: Vec<f32>,
    first: usize,
    length: usize,
}

impl Aligned {
    pub(super) fn zeros(length: usize) -> Self {
        const LINE: usize = 64;
        let room = vec![0.0; length + LINE / size_of::<f32>()];
        let first = room.as_ptr().align_offset(LINE).min(room.len() - length);
        Self { room, first, length }
    }
}

impl Clone for Aligned {
    fn clone(&self) -> Self {
        let mut cloned = Self::zeros(self.length);
        cloned.copy_from_slice(self);
        cloned
    }
}

impl Deref for Aligned {
    type Target = [f32];

    #[inline(always)]
    fn deref(&self) -> &[f32] {
        &self.room[self.first..][..self.length]
    }
}

impl DerefMut for Aligned {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.room[self.first..][..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_lie_at_cache_lines_too() {
        for length in [16, 1_000, 16_384] {
            let mut values = Aligned::zeros(length);
            assert_eq!(values.len(), length);
            values[length - 1] = 3.0;
            for copy in [values.clone(), values.clone()] {
                assert_eq!(copy[..], values[..]);
                assert!(copy.as_ptr().addr().is_multiple_of(64));
            }
        }
    }
}
