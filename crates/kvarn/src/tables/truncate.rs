//! Truncation: keeping the first tokens of a sequence, wherever the cut lies.

use std::sync::Arc;

use super::{SequenceId, SequenceView, TableError, Tables};

/// Part of a record that is to be decoded into a slot, in every layer: the tile of a cut, which was sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unseal {
    /// Tile of the sequence.
    pub tile: usize,
    /// Page of its records, which other sequences may share.
    pub page: usize,
    /// Slot that receives its K and V, in the rotated frame: a free one, which nothing reads.
    pub slot: usize,
    /// First tokens of the tile to decode: those that are kept, fewer than a tile.
    pub tokens: usize,
}

/// A truncation that is possible. No sequence has changed, and none does unless it is [committed](Self::commit).
#[derive(Debug)]
#[must_use = "nothing is truncated before commit"]
pub struct Truncation<'a> {
    tables: &'a mut Tables,
    id: SequenceId,
    after: SequenceView,
    unseal: Option<Unseal>,
}

impl Tables {
    /// Checks that a sequence can be cut to its first `keep` tokens, and says what has to be decoded for that.
    ///
    /// The kept tokens that were committed stay so: `committed = min(committed, keep)`. Pages and slots without a kept token
    /// lose a reference. A tile that is kept in part goes on in a slot, and the next step writes over what was dropped:
    /// - In its own, if it has one, exactly. That is a tile which is not sealed, and tile 0 where there are sinks: its slot
    ///   keeps all its tokens, those that were read from its page too.
    /// - Otherwise it is sealed: its record is decoded into a free slot, for which a published tile that nobody holds may be
    ///   given up at once. Other sequences keep the page.
    ///
    /// A cut between two tiles needs no slot. Tiles that stay sealed do so, even within the recent window. Refused beyond the
    /// length, in an open step, and where a slot is needed and none is free.
    pub fn plan_truncation(&mut self, id: SequenceId, keep: usize) -> Result<Truncation<'_>, TableError> {
        let view = self.idle(id)?.view.clone();
        if keep > view.length {
            return Err(TableError::TruncateBeyondLength { sequence: id, keep, length: view.length });
        }
        let (whole, tokens) = (keep / self.rule.group(), keep % self.rule.group());
        let mut after = view.clone();
        after.length = keep;
        after.committed = view.committed.min(keep);
        after.sealed = view.sealed.min(whole);
        if self.rule.pages(after.sealed) == 0 {
            after.sealed = 0;
        }
        let tiles = self.rule.tiles(keep);
        if tiles < view.block_table.len() {
            Arc::make_mut(&mut after.block_table).truncate(tiles);
            Arc::make_mut(&mut after.slot_table).truncate(tiles);
        }

        let mut unseal = None;
        if tokens > 0 && whole < view.sealed && self.rule.has_page(whole) {
            let page = std::mem::replace(&mut Arc::make_mut(&mut after.block_table)[whole], -1) as usize;
            if !self.rule.keeps_slot(whole) {
                if self.slots.available() == 0 {
                    let (slots, boundary) = (self.slots.total(), keep - tokens);
                    return Err(TableError::TruncateWithoutSlot {
                        sequence: id,
                        keep,
                        tile: whole,
                        slots,
                        boundary,
                    });
                }
                self.make_room(0, 1);
                let slot = self.slots.lowest_free();
                Arc::make_mut(&mut after.slot_table)[whole] = slot as i32;
                unseal = Some(Unseal { tile: whole, page, slot, tokens });
            }
        }
        Ok(Truncation { tables: self, id, after, unseal })
    }
}

impl Truncation<'_> {
    /// What is stored of the sequence now.
    pub fn before(&self) -> &SequenceView {
        &self.tables.sequences[&self.id.serial].view
    }

    /// The record to decode before [`commit`](Self::commit), if the cut lies in one.
    pub const fn unseal(&self) -> Option<Unseal> {
        self.unseal
    }

    /// Makes it so.
    pub fn commit(self) {
        let Self { tables, id, after, unseal } = self;
        if let Some(unseal) = unseal {
            let slot = tables.slots.allocate();
            debug_assert_eq!(slot, unseal.slot, "the tables are borrowed since the slot was chosen");
            tables.unsealed += 1;
        }
        tables.replace_view(id, after);
    }
}

#[cfg(test)]
mod tests;
