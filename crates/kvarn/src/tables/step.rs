//! What a step does: planned once, carried out by a backend in every layer.

use std::sync::Arc;

use super::{SequenceId, SequenceView, StepId};

/// One forward pass of a batch.
///
/// In each layer a backend first copies `writes`, then encodes `seals`. Until then the layer is
/// read through [`SequencePlan::before`], from then on through [`SequencePlan::after`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepPlan {
    /// The step, for [`finish`](super::Tables::finish) and [`abandon`](super::Tables::abandon).
    pub id: StepId,
    /// Rows of the step: new tokens of all sequences, the first extent of its k, v and q.
    pub tokens: usize,
    /// Plans in batch order.
    pub sequences: Vec<SequencePlan>,
    /// First row of each sequence, then `tokens` (known as `cu_seqlens`): int32 `[sequences + 1]`.
    pub first_rows: Arc<Vec<i32>>,
}

/// What a step does with one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequencePlan {
    /// The sequence.
    pub id: SequenceId,
    /// Tokens appended.
    pub count: usize,
    /// Newest tokens, of those appended, that stay uncommitted.
    pub hold: usize,
    /// Row of k, v and q that holds the first token appended.
    pub first_row: usize,
    /// What is stored before a layer's append.
    pub before: SequenceView,
    /// What is stored after a layer's append, and from finish on.
    pub after: SequenceView,
    /// Rows to copy into slots, by ascending row.
    pub writes: Vec<SlotWrite>,
    /// Tiles to encode into pages, by ascending tile, after the writes.
    pub seals: Vec<Seal>,
}

/// Consecutive rows that go into one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotWrite {
    /// The slot.
    pub slot: usize,
    /// Position in the slot of the first row.
    pub offset: usize,
    /// First row of the step's k and v.
    pub row: usize,
    /// Rows.
    pub count: usize,
}

/// A tile to encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// Tile of the sequence.
    pub tile: usize,
    /// Page that receives the records.
    pub page: usize,
    /// Where the tile's K and V are.
    pub source: SealSource,
}

/// Where the K and V of a tile being sealed are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SealSource {
    /// In this slot, after the step's writes. It stays allocated until the step is finished.
    Slot(usize),
    /// In the step's rows, from this one on: the whole tile arrived in this step and has no slot.
    Rows(usize),
}

impl SequencePlan {
    /// Tokens stored before the step: the position of the first token appended.
    pub fn start(&self) -> usize {
        self.before.length
    }
}
