//! The width of a code.

use crate::Error;

/// Bits of one code. K and V choose independently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bits {
    /// 2 bits, 4 levels.
    Two = 2,
    /// 3 bits, 8 levels.
    Three = 3,
    /// 4 bits, 16 levels.
    Four = 4,
    /// 8 bits, 256 levels.
    Eight = 8,
}

impl Bits {
    /// Every width, ascending.
    pub const ALL: [Self; 4] = [Self::Two, Self::Three, Self::Four, Self::Eight];

    /// The width `value`, or [`Error::Bits`] that names `what`.
    pub fn new(value: usize, what: &'static str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|bits| bits.get() == value).ok_or(Error::Bits { what, value })
    }

    /// The width as a number.
    pub const fn get(self) -> usize {
        self as usize
    }

    /// The largest code, `2^bits - 1`.
    pub const fn max_code(self) -> u8 {
        ((1u32 << self.get()) - 1) as u8
    }
}
