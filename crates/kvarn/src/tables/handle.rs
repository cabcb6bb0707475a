//! Handles of sequences and steps: an old or foreign handle is recognised, never mistaken for a
//! newer one.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names pools apart, so that the handle of one pool is refused by another. It says nothing about
/// any pool.
static NEXT_POOL: AtomicU64 = AtomicU64::new(0);

pub(super) fn next_pool() -> u64 {
    NEXT_POOL.fetch_add(1, Ordering::Relaxed)
}

/// A sequence of one pool.
///
/// The serial number is never used again in its pool: the handle of a freed sequence stays
/// recognisable as freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId {
    pub(super) pool: u64,
    pub(super) serial: u64,
}

/// A step of one pool; like [`SequenceId`], its serial number is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepId {
    pub(super) pool: u64,
    pub(super) serial: u64,
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sequence {}", self.serial)
    }
}

impl fmt::Display for StepId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}", self.serial)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_named_apart() {
        assert_ne!(next_pool(), next_pool());
    }

    #[test]
    fn handles_print_their_serial_number() {
        assert_eq!(SequenceId { pool: 9, serial: 3 }.to_string(), "sequence 3");
        assert_eq!(StepId { pool: 9, serial: 4 }.to_string(), "step 4");
    }
}
