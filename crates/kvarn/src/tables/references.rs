//! How often each page and slot is held: for tests, and for those who look for a leak.

use super::Tables;

/// References to every page and slot of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct References {
    /// `[pages]`.
    pub pages: Vec<u32>,
    /// `[slots]`.
    pub slots: Vec<u32>,
}

impl Tables {
    /// Each entry of a sequence's tables counts once; what an open step adds counts once too.
    pub fn references(&self) -> References {
        References {
            pages: (0..self.pages.total()).map(|id| self.pages.references(id)).collect(),
            slots: (0..self.slots.total()).map(|id| self.slots.references(id)).collect(),
        }
    }
}
