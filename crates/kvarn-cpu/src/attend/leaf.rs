//! One leaf: 512 tokens of one KV head against a block of queries.

use std::cell::RefCell;
use std::ops::Range;

use kvarn::Aligned;
use kvarn::record::MatrixLayout;
use kvarn::tables::{Place, Span};

use super::block::QueryBlock;
use super::partial::Partial;
use super::product::{Matrix, MatrixMut, multiply_add};
use super::softmax::{softcap, softmax};
use super::{Source, integer};
use crate::features::level;
use crate::read::{TileBuffer, Want, record};

/// Tokens of a leaf: 4 tiles of 128, or 8 of 64.
pub(super) const LEAF_TOKENS: usize = 512;

#[derive(Default)]
struct Scratch {
    tile: TileBuffer,
    integer: integer::Scratch,
    /// Logits, then probabilities: `[columns, LEAF_TOKENS]`.
    weights: Aligned<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Attends the leaf with index `leaf`.
pub(super) fn attend_leaf(source: &Source<'_>, block: &QueryBlock, leaf: usize) -> Partial {
    SCRATCH.with_borrow_mut(|scratch| Leaf { source, block, first: leaf * LEAF_TOKENS }.attend(scratch))
}

struct Leaf<'a> {
    source: &'a Source<'a>,
    block: &'a QueryBlock,
    first: usize,
}

impl Leaf<'_> {
    fn attend(&self, scratch: &mut Scratch) -> Partial {
        let (group, head_dim) = (self.source.pool.layout().config.group(), self.source.layer.shape.head_dim);
        let columns = self.block.columns();
        let mut partial = Partial::empty(columns, head_dim);
        scratch.weights.resize(columns * LEAF_TOKENS);
        let tiles: Vec<(usize, &[Span])> = self.tiles().collect();
        let behind =
            |index: usize, want: Want| tiles.get(index + 1).map(|&(_, tile)| self.matrix(tile, want));
        for (index, &(at, tile)) in tiles.iter().enumerate() {
            let next = behind(index, Want::Keys).unwrap_or_else(|| self.matrix(tiles[0].1, Want::Values));
            let q = Matrix { values: &self.block.q, stride: head_dim };
            let mut logits = MatrixMut { values: &mut scratch.weights[at..], stride: LEAF_TOKENS };
            if self.multiply_record(tile, Want::Keys, q, &mut logits, next, &mut scratch.integer) {
                continue;
            }
            let Source { pool, layer, head, .. } = *self.source;
            let tokens = scratch.tile.read(pool, layer, head, tile, Want::Keys);
            for row in logits.values.chunks_mut(LEAF_TOKENS) {
                row[..tokens].fill(0.0);
            }
            let keys = Matrix { values: &scratch.tile.values, stride: group };
            multiply_add(q, keys, &mut logits, [columns, tokens, head_dim]);
        }
        for (column, weights) in scratch.weights.chunks_exact_mut(LEAF_TOKENS).enumerate() {
            let seen = self.seen(column);
            if let Some(cap) = self.block.softcap {
                softcap(&mut weights[seen.clone()], cap);
            }
            (partial.max[column], partial.sum[column]) = softmax(weights, seen);
        }
        for (index, &(at, tile)) in tiles.iter().enumerate() {
            let next =
                behind(index, Want::Values).unwrap_or_else(|| self.matrix(self.next_leaf(), Want::Keys));
            let weights = Matrix { values: &scratch.weights[at..], stride: LEAF_TOKENS };
            let mut out = MatrixMut { values: &mut partial.out, stride: head_dim };
            if self.multiply_record(tile, Want::Values, weights, &mut out, next, &mut scratch.integer) {
                continue;
            }
            let Source { pool, layer, head, .. } = *self.source;
            let tokens = scratch.tile.read(pool, layer, head, tile, Want::Values);
            let values = Matrix { values: &scratch.tile.values, stride: head_dim };
            multiply_add(weights, values, &mut out, [columns, head_dim, tokens]);
        }
        partial
    }

    /// `x · matrix` with a matrix of a tile that is a record and nothing else, in integers: keys set `out`, values are added
    /// to it; false if that is not possible, and nothing is done. `next`: what will be read next.
    fn multiply_record(
        &self,
        tile: &[Span],
        want: Want,
        x: Matrix<'_>,
        out: &mut MatrixMut<'_>,
        next: &[u8],
        scratch: &mut integer::Scratch,
    ) -> bool {
        let layout = self.layout(want);
        match self.record(tile) {
            Some(record) if integer::serves(layout) => {
                integer::multiply(level(), layout, record, x, out, self.block.columns(), next, scratch)
            }
            _ => false,
        }
    }

    fn layout(&self, want: Want) -> &MatrixLayout {
        match want {
            Want::Keys => &self.source.layer.layout.key,
            Want::Values => &self.source.layer.layout.value,
        }
    }

    /// The record of a tile that is a record and nothing else.
    fn record(&self, tile: &[Span]) -> Option<&[u8]> {
        let [Span { place: Place::Page(page), .. }] = *tile else { return None };
        // SAFETY: this sequence, which is being read, holds the page.
        Some(unsafe { record(self.source.pool, self.source.layer, page, self.source.head) })
    }

    /// The bytes of a matrix of a tile's record; nothing if it has none.
    fn matrix(&self, tile: &[Span], want: Want) -> &[u8] {
        let layout = self.layout(want);
        let end = layout.row_zero.end.max(layout.column_scale.end);
        self.record(tile).map_or(&[], |record| &record[layout.codes.start..end])
    }

    /// The first span behind this leaf.
    fn next_leaf(&self) -> &[Span] {
        let spans = self.source.spans;
        let end = spans.partition_point(|span| span.position < self.first + LEAF_TOKENS);
        &spans[end..spans.len().min(end + 1)]
    }

    /// The leaf's tiles that some query sees: offset of the first token in the leaf, and spans.
    fn tiles(&self) -> impl Iterator<Item = (usize, &[Span])> {
        let group = self.source.pool.layout().config.group();
        let (first, last) = (self.first, self.first + LEAF_TOKENS);
        let seen = self.block.visible();
        let spans = self.source.spans;
        let start = spans.partition_point(|span| span.position < first);
        let end = spans.partition_point(|span| span.position < last);
        spans[start..end]
            .chunk_by(move |a, b| a.position / group == b.position / group)
            .filter(move |tile| {
                let tile = tile[0].position / group * group;
                tile < seen.end && tile + group > seen.start
            })
            .map(move |tile| (tile[0].position / group * group - first, tile))
    }

    /// The tokens of the leaf that a query sees. All of them are stored: what is stored ends with the newest query, or,
    /// before the append, with the oldest.
    fn seen(&self, column: usize) -> Range<usize> {
        let seen = self.block.visible_to(column);
        let stored = self.source.spans.last().map_or(0, |span| span.position + span.count);
        let within =
            |position: usize| position.min(stored).clamp(self.first, self.first + LEAF_TOKENS) - self.first;
        within(seen.start)..within(seen.end)
    }
}
