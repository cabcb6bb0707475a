//! How full a pool is.

use super::PrefixCounts;

/// Use of one kind of physical id, pages or slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// All ids of the pool.
    pub total: usize,
    /// Ids that a sequence or an open step holds.
    pub used: usize,
    /// Ids that the next step may take, those that are cached included: `total - used`.
    pub free: usize,
    /// Ids of published tiles, in use or cached.
    pub published: usize,
    /// Ids of published tiles that no sequence and no open step holds: they stay until they are needed.
    pub cached: usize,
}

/// Use of a pool at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Pages, each the records of one sealed tile.
    pub pages: Usage,
    /// Slots, each one tile in 16 bit.
    pub slots: Usage,
    /// Sequences that exist.
    pub sequences: usize,
    /// Tokens stored in all sequences, held ones included, those of open steps not.
    pub tokens: usize,
    /// Steps planned and neither finished nor abandoned.
    pub open_steps: usize,
    /// What became of published tiles and of requests for them.
    pub prefixes: PrefixCounts,
}
