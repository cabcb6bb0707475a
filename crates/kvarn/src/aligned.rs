//! Working memory in whole cache lines.

use std::ops::{Deref, DerefMut};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Values that begin at a multiple of a cache line: a register of that size is then loaded from one line, not two.
#[derive(Debug)]
pub struct Aligned<T> {
    room: Vec<T>,
    first: usize,
    length: usize,
}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self { room: Vec::new(), first: 0, length: 0 }
    }
}

impl<T: Copy + Default> Aligned<T> {
    /// `length` zeros, or what else is the type's default.
    pub fn zeros(length: usize) -> Self {
        let room = vec![T::default(); length + LINE / size_of::<T>()];
        let first = room.as_ptr().align_offset(LINE).min(room.len() - length);
        Self { room, first, length }
    }

    /// Makes it `length` values, which may be any that were there before.
    #[inline(always)]
    pub fn resize(&mut self, length: usize) {
        if self.first + length > self.room.len() {
            *self = Self::zeros(length);
        }
        self.length = length;
    }
}

impl<T: Copy + Default> Clone for Aligned<T> {
    fn clone(&self) -> Self {
        let mut cloned = Self::zeros(self.length);
        cloned.copy_from_slice(self);
        cloned
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.room[self.first..][..self.length]
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
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

    #[test]
    fn other_lengths_lie_at_cache_lines_too() {
        let mut values = Aligned::<u8>::default();
        assert!(values.is_empty());
        for length in [1, 100, 30, 5_000, 64, 5_001] {
            values.resize(length);
            assert_eq!(values.len(), length);
            assert!(values.as_ptr().addr().is_multiple_of(64));
        }
    }
}
