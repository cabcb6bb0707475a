//! Releases of CUDA.

use std::fmt;

/// A release of CUDA, of a driver or of the compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// As 13 in 13.0.
    pub major: u32,
    /// As 0 in 13.0.
    pub minor: u32,
}

impl Version {
    /// A release.
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// Reads the number that `cuDriverGetVersion` gives: 13000 for 13.0.
    pub(crate) const fn of_driver(number: u32) -> Self {
        Self::new(number / 1000, number % 1000 / 10)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
