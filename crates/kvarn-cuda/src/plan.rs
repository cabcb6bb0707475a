//! What a step's kernels are told, made on the host from the step's plan: pure, tested without a GPU.
//!
//! A sequence is cut into parts by its own length only, never by the batch or the device: results are the same alone and in
//! any batch.

use kvarn::tables::{SealRule, SealSource, SequencePlan, SequenceView, StepPlan};

use crate::params::{ITEM_TILES, ITEM_WORDS, SEAL_WORDS};

/// Arrays of an append, int32.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AppendPlan {
    /// `[tokens]`: slot · group + offset, or -1.
    pub slot_of_row: Vec<i32>,
    /// `[seals, SEAL_WORDS]`.
    pub seals: Vec<i32>,
}

impl AppendPlan {
    pub(crate) fn new(plan: &StepPlan, group: usize) -> Self {
        let mut made = Self { slot_of_row: vec![-1; plan.tokens], seals: Vec::new() };
        for sequence in &plan.sequences {
            for write in &sequence.writes {
                for index in 0..write.count {
                    made.slot_of_row[write.row + index] = (write.slot * group + write.offset + index) as i32;
                }
            }
            for seal in &sequence.seals {
                let (slot, from, row) = match seal.source {
                    SealSource::Rows(row) => (-1, 0, row),
                    SealSource::SharedSlot { slot, stored, row } => (slot as i32, stored, row),
                    SealSource::Slot(slot) => {
                        // What this step writes to the slot is taken from the rows: nothing waits for the write.
                        let write = sequence.writes.iter().find(|write| write.slot == slot);
                        let (from, row) = write.map_or((group, 0), |write| (write.offset, write.row));
                        // A copy is made before the launch.
                        (slot as i32, from, row)
                    }
                };
                made.seals.extend([seal.page as i32, slot, from as i32, row as i32]);
            }
        }
        made
    }

    /// Seals.
    pub(crate) const fn count(&self) -> usize {
        self.seals.len() / SEAL_WORDS
    }
}

/// What an attention plan depends on, besides the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttendKey {
    /// Whether the layer was appended to.
    pub appended: bool,
    /// KV heads.
    pub kv_heads: usize,
    /// Query heads per KV head.
    pub group: usize,
    /// Query tokens of one pass.
    pub query_tokens: usize,
    /// Sliding window.
    pub window: usize,
    /// Sequences with more new tokens are left out.
    pub most_tokens: usize,
    /// Partial results that a launch may leave, if it has more than one query block.
    pub most_parts: usize,
}

impl AttendKey {
    /// Of one query token that sees everything, with room for all partial results.
    pub(crate) const fn of_one_token(kv_heads: usize, group: usize) -> Self {
        Self {
            appended: true,
            kv_heads,
            group,
            query_tokens: 1,
            window: usize::MAX,
            most_tokens: usize::MAX,
            most_parts: usize::MAX,
        }
    }
}

/// Arrays of an attention, int32.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AttendPlan {
    /// `[items, ITEM_WORDS]`.
    pub items: Vec<i32>,
    /// The first item of each launch. Launches run one after the other, in the same room for partial results: long chunks would
    /// need much of it, and have work for the whole device in each launch.
    pub launches: Vec<usize>,
    /// Most partial results of a launch, over its query blocks.
    pub parts: usize,
    /// Most query columns of a block.
    pub columns: usize,
    /// Partial results of the last launch.
    last: usize,
}

/// A piece of a sequence: record tiles, or tokens of one slot.
struct Piece {
    first_tile: usize,
    tiles: usize,
    slot: i32,
    slot_tokens: usize,
}

impl AttendPlan {
    pub(crate) fn new(plan: &StepPlan, rule: &SealRule, key: AttendKey) -> Self {
        let mut made = Self::default();
        for sequence in plan.sequences.iter().filter(|sequence| sequence.count <= key.most_tokens) {
            let view = if key.appended { &sequence.after } else { &sequence.before };
            for first in (0..sequence.count).step_by(key.query_tokens) {
                let tokens = key.query_tokens.min(sequence.count - first);
                made.add_block(sequence, view, rule, key, first, tokens);
            }
        }
        made
    }

    /// Items.
    pub(crate) fn count(&self) -> usize {
        self.items.len() / ITEM_WORDS
    }

    fn add_block(
        &mut self,
        sequence: &SequencePlan,
        view: &SequenceView,
        rule: &SealRule,
        key: AttendKey,
        first: usize,
        tokens: usize,
    ) {
        let position = sequence.start() + first;
        let low = (position + 1).saturating_sub(key.window);
        let high = (position + tokens).min(view.length);
        let mut pieces = pieces(view, rule, key, low, high);
        if pieces.is_empty() {
            // Nothing to see: an item still writes the zeros.
            pieces.push(Piece { first_tile: 0, tiles: 0, slot: 0, slot_tokens: 0 });
        }
        if self.launches.is_empty() || self.last + pieces.len() > key.most_parts.max(pieces.len()) {
            self.launches.push(self.count());
            self.last = 0;
        }
        for (part, piece) in pieces.iter().enumerate() {
            self.items.extend(
                [
                    piece.first_tile,
                    piece.tiles,
                    piece.slot as usize,
                    piece.slot_tokens,
                    part,
                    pieces.len(),
                    sequence.first_row + first,
                    tokens,
                    position,
                    view.length,
                    self.last,
                    0,
                ]
                .map(|word| word as i32),
            );
            let tiles = piece.first_tile..piece.first_tile + piece.tiles;
            self.items.extend_from_slice(&view.block_table[tiles]);
            self.items.resize(self.items.len().next_multiple_of(ITEM_WORDS), 0);
        }
        self.last += pieces.len();
        self.parts = self.parts.max(self.last);
        self.columns = self.columns.max(tokens * key.group);
    }
}

/// Tiles of an item, for a sequence of `tokens` tokens in tiles of `tile`: few for short sequences, so that they fill the device,
/// more for long ones, so that fewer partial results are written. With few KV heads, each of which is a thread block's own
/// work, fewer: a device may hold a part of a model's heads. With more than eight query heads each, more: their partial
/// results are large.
///
/// What measured best for one sequence, where that cost batches little.
pub(crate) fn item_tiles(tokens: usize, tile: usize, key: AttendKey) -> usize {
    let tokens_per_item = match (tokens, key.kv_heads, key.group > 8) {
        (..=4_096, _, false) => 512,
        (..=16_384, _, _) | (..=98_304, ..=4, _) | (_, 1, false) => 1_024,
        (..=49_152, _, _) | (98_305.., ..=4, _) => 2_048,
        (..=98_304, _, _) => 1_536,
        _ => 2_688,
    };
    (tokens_per_item / tile).min(ITEM_TILES)
}

/// Lengths behind which items have another size.
const STEPS: [usize; 4] = [4_096, 16_384, 49_152, 98_304];

/// Most record items of a sequence of up to `tiles` tiles.
pub(crate) fn most_record_items(tiles: usize, tile: usize, key: AttendKey) -> usize {
    let longest = STEPS.into_iter().map(|tokens| tokens / tile).filter(|&step| step < tiles).chain([tiles]);
    longest.map(|tiles| tiles.div_ceil(item_tiles(tiles * tile, tile, key))).max().unwrap_or(0)
}

/// What of `view` queries that see positions `low..high` read.
fn pieces(view: &SequenceView, rule: &SealRule, key: AttendKey, low: usize, high: usize) -> Vec<Piece> {
    let group = rule.group();
    let tiles = high.div_ceil(group);
    let first = low / group;
    let mut pieces = Vec::new();
    let slot = |tile: usize, tokens: usize| Piece {
        first_tile: tile,
        tiles: 0,
        slot: view.slot_table[tile],
        slot_tokens: tokens,
    };
    // The sink slot: all of tile 0 while it has no page, its first sinks from then on.
    if tiles > 0 && view.slot_table[0] >= 0 {
        let tokens = if view.block_table[0] >= 0 { rule.sink_tokens() } else { group.min(view.length) };
        if low < tokens {
            pieces.push(slot(0, tokens));
        }
    }
    let sealed = view.sealed.min(tiles);
    let mut tile = first.max(usize::from(!rule.has_page(0)));
    let each = item_tiles(view.length, group, key);
    while tile < sealed {
        let tiles = each.min(sealed - tile);
        pieces.push(Piece { first_tile: tile, tiles, slot: 0, slot_tokens: 0 });
        tile += tiles;
    }
    for tile in first.max(view.sealed).max(1)..tiles {
        pieces.push(slot(tile, group.min(view.length - tile * group)));
    }
    pieces
}

#[cfg(test)]
mod tests;
