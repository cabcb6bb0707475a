//! Attention over records and slots, without expanding the cache.
//!
//! Work is cut into items: one KV head of one sequence, for a block of its queries. An item walks the sequence in leaves
//! of 512 tokens counted from position 0; partial results are merged in a binary tree over the leaves. Which thread does
//! what changes, the order of the merges never does: results do not depend on the number of threads or on the batch.

mod block;
mod integer;
mod leaf;
mod partial;
mod product;
mod softmax;

use std::ops::Range;

use kvarn::pool::{AttendSettings, Layer};
use kvarn::tables::{SequencePlan, Span, StepPlan};
use rayon::prelude::*;

use block::QueryBlock;
use leaf::{LEAF_TOKENS, attend_leaf};
use partial::Partial;

use crate::pool::Pool;
use crate::threads::install;
use crate::{TensorMut, TensorRef};

/// Query columns (query tokens × query heads per KV head) of an item: enough to make up for decoding a tile.
const BLOCK_COLUMNS: usize = 256;
/// Items walk so many leaves by themselves; longer ranges are halved and shared out.
const SEQUENTIAL_LEAVES: usize = 4;

/// What an item needs to know of its sequence.
struct Source<'a> {
    pool: &'a Pool,
    layer: &'a Layer,
    head: usize,
    /// Stored tokens, cut by tile, ascending.
    spans: &'a [Span],
}

/// Attends a step's queries; see [`crate::Step::attend`]. Everything has been checked.
#[allow(clippy::too_many_arguments)] // the parts of one call, used once
pub(crate) fn attend(
    pool: &Pool,
    layer: &Layer,
    plan: &StepPlan,
    appended: bool,
    q: &TensorRef<'_>,
    settings: &AttendSettings,
    sink_logits: Option<&[f32]>,
    out: &TensorMut<'_>,
    lse: Option<&mut [f32]>,
) {
    let (kv_heads, head_dim) = (layer.shape.kv_heads, layer.shape.head_dim);
    let (heads, group) = (q.shape()[1], settings.group);
    let block_tokens = (BLOCK_COLUMNS / group).max(1);

    let spans: Vec<Vec<Span>> =
        plan.sequences.iter().map(|s| view(s, appended).spans(&pool.layout().rule).collect()).collect();
    let mut items = Vec::new();
    for (index, sequence) in plan.sequences.iter().enumerate() {
        for first in (0..sequence.count).step_by(block_tokens) {
            let tokens = first..(first + block_tokens).min(sequence.count);
            items.extend((0..kv_heads).map(|head| (index, head, tokens.clone())));
        }
    }
    let lse = lse.map(|lse| LsePointer(lse.as_mut_ptr()));
    install(|| {
        items.into_par_iter().for_each(|(index, head, tokens)| {
            let sequence = &plan.sequences[index];
            let source = Source { pool, layer, head, spans: &spans[index] };
            let block = QueryBlock::load(&source, sequence, tokens, q, settings);
            let leaves = view(sequence, appended).length.div_ceil(LEAF_TOKENS);
            let partial = subtree(&source, &block, 0..leaves.next_power_of_two());
            let result = block.finish(partial, &source, settings, sink_logits);
            for (column, (row, q_head)) in block.targets().enumerate() {
                let values = &result.out[column * head_dim..][..head_dim];
                // SAFETY: each (row, head) belongs to one item, and `out` is the caller's alone.
                unsafe { out.store_row(row, q_head, values) };
                if let Some(lse) = &lse {
                    // SAFETY: as above; row · heads + q_head < lse.len(), checked above.
                    unsafe { lse.0.add(row * heads + q_head).write(result.lse[column]) };
                }
            }
        });
    });
}

fn view(sequence: &SequencePlan, appended: bool) -> &kvarn::tables::SequenceView {
    if appended { &sequence.after } else { &sequence.before }
}

/// The partial result of an aligned range of leaves whose length is a power of two; `None` if no query sees any of it.
fn subtree(source: &Source<'_>, block: &QueryBlock, leaves: Range<usize>) -> Option<Partial> {
    let seen = block.visible();
    if leaves.start * LEAF_TOKENS >= seen.end || leaves.end * LEAF_TOKENS <= seen.start {
        return None;
    }
    if leaves.len() == 1 {
        return Some(attend_leaf(source, block, leaves.start));
    }
    let middle = leaves.start + leaves.len() / 2;
    let (left, right) = (leaves.start..middle, middle..leaves.end);
    let (left, right) = if leaves.len() > SEQUENTIAL_LEAVES {
        rayon::join(|| subtree(source, block, left), || subtree(source, block, right))
    } else {
        (subtree(source, block, left), subtree(source, block, right))
    };
    match (left, right) {
        (Some(left), Some(right)) => Some(left.merge(&right)),
        (left, right) => left.or(right),
    }
}

struct LsePointer(*mut f32);
// SAFETY: threads write disjoint elements, see `attend`.
unsafe impl Send for LsePointer {}
// SAFETY: as above.
unsafe impl Sync for LsePointer {}
