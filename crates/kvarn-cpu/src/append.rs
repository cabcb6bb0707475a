//! Storing new keys and values of one KV head: rotate, write to slots, seal.

use std::cell::RefCell;
use std::ops::Range;

use kvarn::codec::{EncodeCounts, Rotation, SlotType, TileEncoder, finite, round_to_slot};
use kvarn::pool::Layer;
use kvarn::tables::{SealSource, SequencePlan, SlotCopy, SlotWrite};
use kvarn::{Config, Saturation};

use crate::TensorRef;
use crate::dtype::{load, slot_dtype, store};
use crate::features::dispatch;
use crate::lanes::BestTurn;
use crate::pool::Pool;
use crate::rows::{Run, load_rotated, serves, store_rotated};

dispatch! {
    /// What is done to a row before it is stored: non-finite elements become 0, then it is rotated and rounded to the slot
    /// type. Adds to `counts`.
    fn store_precision(row: &mut [f32], rotation: Option<&Rotation>, slot: SlotType, counts: &mut EncodeCounts)
        = store_precision_body
}

#[inline(always)]
fn store_precision_body<const FMA: bool>(
    row: &mut [f32],
    rotation: Option<&Rotation>,
    slot: SlotType,
    counts: &mut EncodeCounts,
) {
    let mut saturation = Saturation::default();
    *counts += finite(row);
    if let Some(rotation) = rotation {
        rotation.apply(row);
    }
    round_to_slot(row, slot, &mut saturation);
    counts.saturated += saturation.0;
}

/// Reads row `at` of new keys or values as they are stored. Adds to `counts`.
pub(crate) fn read_row(
    tensor: &TensorRef<'_>,
    at: (usize, usize),
    rotation: Option<&Rotation>,
    slot: SlotType,
    out: &mut [f32],
    counts: &mut EncodeCounts,
) {
    if rotation.is_some() && load_rotated(tensor.row(at.0, at.1), tensor.dtype(), out, slot) {
        return;
    }
    tensor.load_row(at.0, at.1, out);
    store_precision(out, rotation, slot, counts);
}

dispatch! {
    /// Encodes a tile, [`TileEncoder::encode`]. Adds to `counts`.
    fn encode_tile(encoder: &mut TileEncoder, k: &[f32], v: &[f32], record: &mut [u8], counts: &mut EncodeCounts)
        = encode_tile_body
}

// No `mul_add` in there: a record does not depend on the instruction set.
#[inline(always)]
fn encode_tile_body<const FMA: bool>(
    encoder: &mut TileEncoder,
    k: &[f32],
    v: &[f32],
    record: &mut [u8],
    counts: &mut EncodeCounts,
) {
    *counts += encoder.encode::<BestTurn>(k, v, record);
}

/// The new tokens of a step for one layer.
#[derive(Clone, Copy)]
pub(crate) struct NewTokens<'a> {
    pub pool: &'a Pool,
    pub layer: &'a Layer,
    /// `[tokens, kv_heads, head_dim]`.
    pub k: &'a TensorRef<'a>,
    pub v: &'a TensorRef<'a>,
    /// Whether they are in the rotated frame already.
    pub rotated: bool,
}

impl NewTokens<'_> {
    /// Whether rows can be stored straight.
    fn straight(&self) -> bool {
        !self.rotated && serves(self.layer.shape.head_dim)
    }

    /// Adds the rows of a write, K and V of some heads: of each token in a run, or of each head, whichever is longer.
    fn runs<'a>(&'a self, heads: &Range<usize>, write: &SlotWrite, runs: &mut Vec<Run<'a>>) {
        let (layer, layout) = (self.layer, self.pool.layout());
        let SlotWrite { slot, offset, row, count } = *write;
        let [rows, kv_heads, head_dim] = self.k.shape();
        assert!(heads.end <= kv_heads && row + count <= rows && offset + count <= layout.config.group());
        let bytes = (head_dim * self.k.dtype().bytes(), head_dim * layout.slot_type.bytes());
        // As rows of a slot lie.
        let (token_bytes, head_bytes) = (bytes.1 as isize, (layer.slot_bytes / kv_heads) as isize);
        for (side, tensor) in [self.k, self.v].into_iter().enumerate() {
            let [token_step, head_step] = tensor.steps();
            let mut run = |(token, head): (usize, usize), from_step, to_step, count| {
                let from = tensor.row(row + token, head).as_ptr();
                let to = self.pool.slot(layer, slot, head, side).wrapping_add((offset + token) * bytes.1);
                // SAFETY: tokens and heads of a run lie within the tensors, which are of one shape and type, and within the slot, as
                // asserted. The rows of a step are disjoint, and this call is the only one of the step that writes them.
                runs.push(unsafe { Run::new((from, from_step), (to, to_step), bytes, count) });
            };
            if count < heads.len() {
                (0..count).for_each(|token| run((token, heads.start), head_step, head_bytes, heads.len()));
            } else {
                heads.clone().for_each(|head| run((0, head), token_step, token_bytes, count));
            }
        }
    }

    fn store(&self, runs: &mut [Run<'_>]) {
        store_rotated(runs, self.layer.shape.head_dim, self.k.dtype(), self.pool.layout().slot_type);
    }

    /// Carries out the plans of sequences none of which has anything to seal.
    pub(crate) fn append_sequences(&self, plans: &[SequencePlan]) -> EncodeCounts {
        let heads = 0..self.layer.shape.kv_heads;
        // What is copied to a slot comes before what is written to it.
        let straight = |plan: &SequencePlan| self.straight() && plan.copy.is_none();
        let mut runs = Vec::with_capacity(2 * plans.len());
        let mut ends = Vec::with_capacity(plans.len());
        for plan in plans {
            if straight(plan) {
                plan.writes.iter().for_each(|write| self.runs(&heads, write, &mut runs));
            }
            ends.push(runs.len());
        }
        self.store(&mut runs);
        let (mut again, mut first) = (vec![], 0);
        for (plan, end) in plans.iter().zip(ends) {
            if !straight(plan) || !runs[first..end].iter().all(|run| run.stored) {
                again.push(plan);
            }
            first = end;
        }
        // What they refer to is written once more.
        drop(runs);
        let mut counts = EncodeCounts::default();
        for plan in again {
            // From the start: what must be counted is found there.
            heads.clone().for_each(|head| counts += self.append_head(plan, head));
        }
        counts
    }

    /// Carries out a sequence's plan for one KV head.
    pub(crate) fn append_head(&self, plan: &SequencePlan, head: usize) -> EncodeCounts {
        let Self { pool, layer, k, v, rotated } = *self;
        let head_dim = layer.shape.head_dim;
        let mut counts = EncodeCounts::default();
        WORKSPACE.with_borrow_mut(|workspace| {
            let Workspace { tile, encoder } = workspace;
            tile.resize(pool.layout().config.group(), head_dim);
            let rotation = (!rotated).then_some(&layer.rotation);
            let read = |tile: &mut Tile, offset: usize, row: usize, count: usize| {
                let mut counts = EncodeCounts::default();
                for (tensor, out) in [(k, &mut tile.k), (v, &mut tile.v)] {
                    let out = &mut out[offset * head_dim..][..count * head_dim];
                    for (index, out) in out.chunks_exact_mut(head_dim).enumerate() {
                        read_row(
                            tensor,
                            (row + index, head),
                            rotation,
                            pool.layout().slot_type,
                            out,
                            &mut counts,
                        );
                    }
                }
                counts
            };
            if let Some(SlotCopy { from, to }) = plan.copy {
                tile.read_slot(pool, layer, head, from);
                tile.write_slot(pool, layer, head, (to, 0, pool.layout().config.group()));
            }
            for write in &plan.writes {
                let mut runs = vec![];
                if self.straight() {
                    self.runs(&(head..head + 1), write, &mut runs);
                    self.store(&mut runs);
                }
                if !self.straight() || !runs.iter().all(|run| run.stored) {
                    counts += read(tile, write.offset, write.row, write.count);
                    tile.write_slot(pool, layer, head, (write.slot, write.offset, write.count));
                }
            }
            for seal in &plan.seals {
                match seal.source {
                    SealSource::Slot(slot) => tile.read_slot(pool, layer, head, slot),
                    SealSource::Rows(row) => counts += read(tile, 0, row, pool.layout().config.group()),
                    SealSource::SharedSlot { slot, stored, row } => {
                        tile.read_slot(pool, layer, head, slot);
                        counts += read(tile, stored, row, pool.layout().config.group() - stored);
                    }
                }
                let bytes = layer.layout.record_bytes;
                // SAFETY: `record` points to that many bytes of the pool's mapping. The page was free before this step, and this
                // call is the only one of the step for this layer, sequence and head.
                let record =
                    unsafe { std::slice::from_raw_parts_mut(pool.record(layer, seal.page, head), bytes) };
                encode_tile(encoder_for(encoder, &layer.config), &tile.k, &tile.v, record, &mut counts);
            }
        });
        counts
    }
}

/// What an append works with, kept per thread: most appends store one token, and must not pay for whole tiles.
#[derive(Default)]
struct Workspace {
    tile: Tile,
    encoder: Option<(Config, TileEncoder)>,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// The kept encoder, made anew if it is for another configuration.
fn encoder_for<'a>(kept: &'a mut Option<(Config, TileEncoder)>, config: &Config) -> &'a mut TileEncoder {
    if kept.as_ref().is_none_or(|(of, _)| of != config) {
        *kept = None;
    }
    &mut kept.get_or_insert_with(|| (*config, TileEncoder::new(config))).1
}

/// K and V of one tile in float32, `[group, head_dim]`, of slot precision. What was not written holds old values.
#[derive(Default)]
struct Tile {
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Tile {
    fn resize(&mut self, group: usize, head_dim: usize) {
        self.k.resize(group * head_dim, 0.0);
        self.v.resize(group * head_dim, 0.0);
    }

    fn write_slot(
        &self,
        pool: &Pool,
        layer: &Layer,
        head: usize,
        (slot, offset, count): (usize, usize, usize),
    ) {
        let (head_dim, dtype) = (layer.shape.head_dim, slot_dtype(pool.layout().slot_type));
        let range = offset * head_dim..(offset + count) * head_dim;
        for (side, values) in [&self.k, &self.v].into_iter().enumerate() {
            let base = pool.slot(layer, slot, head, side);
            // SAFETY: the range lies within the slot's matrix (the slice above has its shape). These positions hold no
            // stored token, and this call is the only one of the step that writes them.
            unsafe { store(dtype, &values[range.clone()], base.add(range.start * dtype.bytes())) };
        }
    }

    fn read_slot(&mut self, pool: &Pool, layer: &Layer, head: usize, slot: usize) {
        for (side, values) in [&mut self.k, &mut self.v].into_iter().enumerate() {
            // SAFETY: the slot's matrix has as many elements as the tile; nobody writes it but this call, and a slot that is
            // shared nobody at all.
            unsafe { load(slot_dtype(pool.layout().slot_type), pool.slot(layer, slot, head, side), values) };
        }
    }
}
