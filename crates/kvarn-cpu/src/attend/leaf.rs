//! One leaf: 512 tokens of one KV head against a block of queries.

use std::cell::RefCell;
use std::ops::Range;

use kvarn::tables::Span;

use super::Source;
use super::block::QueryBlock;
use super::partial::Partial;
use super::product::{Matrix, MatrixMut, multiply_add};
use super::softmax::{softcap, softmax};
use crate::read::{TileBuffer, Want};

/// Tokens of a leaf: 4 tiles of 128, or 8 of 64.
pub(super) const LEAF_TOKENS: usize = 512;

#[derive(Default)]
struct Scratch {
    tile: TileBuffer,
    /// Logits, then probabilities: `[columns, LEAF_TOKENS]`.
    weights: Vec<f32>,
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
        scratch.weights.clear();
        scratch.weights.resize(columns * LEAF_TOKENS, 0.0);
        for (at, tile) in self.tiles() {
            scratch.tile.read(self.source.pool, self.source.layer, self.source.head, tile, Want::Keys);
            multiply_add(
                Matrix { values: &self.block.q, stride: head_dim },
                Matrix { values: &scratch.tile.values, stride: group },
                &mut MatrixMut { values: &mut scratch.weights[at..], stride: LEAF_TOKENS },
                [columns, group, head_dim],
            );
        }
        for (column, weights) in scratch.weights.chunks_exact_mut(LEAF_TOKENS).enumerate() {
            let seen = self.seen(column);
            if let Some(cap) = self.block.softcap {
                softcap(&mut weights[seen.clone()], cap);
            }
            (partial.max[column], partial.sum[column]) = softmax(weights, seen);
        }
        for (at, tile) in self.tiles() {
            scratch.tile.read(self.source.pool, self.source.layer, self.source.head, tile, Want::Values);
            multiply_add(
                Matrix { values: &scratch.weights[at..], stride: LEAF_TOKENS },
                Matrix { values: &scratch.tile.values, stride: head_dim },
                &mut MatrixMut { values: &mut partial.out, stride: head_dim },
                [columns, head_dim, group],
            );
        }
        partial
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
