//! The views of a whole batch as flat arrays, for device backends and zero-copy export.

use std::sync::Arc;

use super::{SequencePlan, SequenceView, StepPlan};

/// The views of all sequences of a step, at one side of its append, as int32 arrays in batch order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchView {
    /// Extent of a table row: the tiles of the longest sequence.
    pub tiles: usize,
    /// Page of each tile, -1 where there is none: `[sequences, tiles]`.
    pub block_table: Arc<Vec<i32>>,
    /// Slot of each tile, -1 where there is none: `[sequences, tiles]`.
    pub slot_table: Arc<Vec<i32>>,
    /// Tokens stored: `[sequences]`.
    pub lengths: Arc<Vec<i32>>,
    /// One past the last tile that has a page: `[sequences]`.
    pub sealed: Arc<Vec<i32>>,
}

impl StepPlan {
    /// The batch as it is before a layer's append. Built anew on each call.
    pub fn batch_before(&self) -> BatchView {
        self.batch(|plan| &plan.before)
    }

    /// The batch as it is after a layer's append. Built anew on each call.
    pub fn batch_after(&self) -> BatchView {
        self.batch(|plan| &plan.after)
    }

    fn batch(&self, side: impl Fn(&SequencePlan) -> &SequenceView) -> BatchView {
        let views = || self.sequences.iter().map(&side);
        let tiles = views().map(|view| view.block_table.len()).max().unwrap_or(0);
        let padded = |table: fn(&SequenceView) -> &[i32]| {
            let mut flat = Vec::with_capacity(self.sequences.len() * tiles);
            for (index, view) in views().enumerate() {
                flat.extend_from_slice(table(view));
                flat.resize((index + 1) * tiles, -1);
            }
            Arc::new(flat)
        };
        BatchView {
            tiles,
            block_table: padded(|view| &view.block_table),
            slot_table: padded(|view| &view.slot_table),
            lengths: Arc::new(views().map(|view| view.length as i32).collect()),
            sealed: Arc::new(views().map(|view| view.sealed as i32).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::tables::{SealRule, Tables};

    #[test]
    fn rows_are_padded_with_minus_one_to_the_longest_sequence() {
        let mut tables = Tables::new(SealRule::new(4, 4, 0).unwrap(), 8, 8).unwrap();
        let (long, short) = (tables.create(), tables.create());
        let plan = tables.plan_step(&[short, long], &[3, 13], &[0, 0]).unwrap();

        let before = plan.batch_before();
        assert_eq!((before.tiles, before.block_table.len(), before.slot_table.len()), (0, 0, 0));
        assert_eq!((before.lengths.as_slice(), before.sealed.as_slice()), (&[0, 0][..], &[0, 0][..]));

        let after = plan.batch_after();
        assert_eq!(after.tiles, 4);
        assert_eq!(*after.block_table, [-1, -1, -1, -1, -1, 0, 1, -1]);
        assert_eq!(*after.slot_table, [0, -1, -1, -1, 1, -1, -1, 2]);
        assert_eq!((after.lengths.as_slice(), after.sealed.as_slice()), (&[3, 13][..], &[0, 3][..]));
        assert_eq!(*plan.first_rows, [0, 3, 16]);
    }
}
