//! What a step does: planned once, carried out by a backend in every layer.

use std::sync::Arc;

use super::{SequenceId, SequenceView, StepId};

/// One forward pass of a batch.
///
/// In each layer a backend first carries out `copy`, then `writes`, then `seals`. Until then the layer is
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
    /// The slot that is to be copied before anything is written, if any.
    pub copy: Option<SlotCopy>,
    /// Rows to copy into slots, by ascending row.
    pub writes: Vec<SlotWrite>,
    /// Tiles to encode into pages, by ascending tile, after the writes.
    pub seals: Vec<Seal>,
}

/// The slot of a tile that is not full, which other sequences share: the step writes to a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotCopy {
    /// The slot that is shared, and stays as it is.
    pub from: usize,
    /// The slot of this sequence alone.
    pub to: usize,
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
    /// In a slot that other sequences share, and which this step does not write to: `stored` tokens; the others are in the
    /// step's rows, from `row` on.
    SharedSlot {
        /// The slot.
        slot: usize,
        /// Tokens of the tile that are in it.
        stored: usize,
        /// Row of the first token that is not.
        row: usize,
    },
}

impl SequencePlan {
    /// Tokens stored before the step: the position of the first token appended.
    pub fn start(&self) -> usize {
        self.before.length
    }
}
