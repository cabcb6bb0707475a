//! How often the pages and slots of a pool are held.

use super::PoolCore;
use crate::tables::References;

impl PoolCore {
    /// References to every page and slot; see [`Tables::references`](crate::tables::Tables::references).
    pub fn references(&self) -> References {
        self.tables().references()
    }
}
