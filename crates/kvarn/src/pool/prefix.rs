//! Prefix sharing of one pool: the caller's keys, told apart by what else the tiles depend on.

use super::{PoolCore, PoolError};
use crate::tables::{PrefixKey, SequenceId};

/// The caller's key of a tile: a digest of its tokens and of all before them.
pub type TileKey = [u8; 16];

impl PoolCore {
    /// Publishes the first tiles of a sequence; see [`Tables::publish`](crate::tables::Tables::publish).
    pub fn publish(&self, sequence: SequenceId, keys: &[TileKey]) -> Result<usize, PoolError> {
        Ok(self.tables().publish(sequence, &self.prefix_keys(keys))?)
    }

    /// Tiles that a sequence would start with; see [`Tables::match_prefix`](crate::tables::Tables::match_prefix).
    pub fn match_prefix(&self, keys: &[TileKey]) -> usize {
        self.tables().match_prefix(&self.prefix_keys(keys))
    }

    /// A sequence that starts with published tiles; see [`Tables::create_from`](crate::tables::Tables::create_from).
    pub fn create_from(&self, keys: &[TileKey]) -> SequenceId {
        self.tables().create_from(&self.prefix_keys(keys))
    }

    /// Publishes nothing any more.
    pub fn unpublish(&self) {
        self.tables().unpublish();
    }

    fn prefix_keys(&self, keys: &[TileKey]) -> Vec<PrefixKey> {
        keys.iter().map(|&key| PrefixKey::new(self.fingerprint(), key)).collect()
    }
}
