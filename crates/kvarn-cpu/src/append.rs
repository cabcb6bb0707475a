//! Storing new keys and values of one KV head: rotate, write to slots, seal.

use std::cell::RefCell;

use kvarn::codec::{EncodeCounts, Rotation, SlotType, TileEncoder, finite, round_to_slot};
use kvarn::pool::Layer;
use kvarn::tables::{SealSource, SequencePlan};
use kvarn::{Config, Saturation};

use crate::TensorRef;
use crate::dtype::{load, slot_dtype, store};
use crate::pool::Pool;

/// What is done to a row before it is stored: non-finite elements become 0, then it is rotated and rounded to the slot
/// type.
pub(crate) fn store_precision(row: &mut [f32], rotation: Option<&Rotation>, slot: SlotType) -> EncodeCounts {
    let mut counts = finite(row);
    if let Some(rotation) = rotation {
        rotation.apply(row);
    }
    let mut saturation = Saturation::default();
    round_to_slot(row, slot, &mut saturation);
    counts.saturated += saturation.0;
    counts
}

/// Carries out a sequence's plan for one KV head of one layer.
pub(crate) fn append_head(
    pool: &Pool,
    layer: &Layer,
    plan: &SequencePlan,
    head: usize,
    k: &TensorRef<'_>,
    v: &TensorRef<'_>,
    rotated: bool,
) -> EncodeCounts {
    let head_dim = layer.shape.head_dim;
    let mut counts = EncodeCounts::default();
    let mut tile = Tile::new(pool.layout().config.group(), head_dim);
    let rotation = (!rotated).then_some(&layer.rotation);
    let read = |tile: &mut Tile, offset: usize, row: usize, count: usize| {
        let mut counts = EncodeCounts::default();
        for (tensor, out) in [(k, &mut tile.k), (v, &mut tile.v)] {
            for index in 0..count {
                let out = &mut out[(offset + index) * head_dim..][..head_dim];
                tensor.load_row(row + index, head, out);
                counts += store_precision(out, rotation, pool.layout().slot_type);
            }
        }
        counts
    };
    for write in &plan.writes {
        counts += read(&mut tile, write.offset, write.row, write.count);
        tile.write_slot(pool, layer, head, (write.slot, write.offset, write.count));
    }
    for seal in &plan.seals {
        match seal.source {
            SealSource::Slot(slot) => tile.read_slot(pool, layer, head, slot),
            SealSource::Rows(row) => counts += read(&mut tile, 0, row, pool.layout().config.group()),
        }
        let bytes = layer.layout.record_bytes;
        // SAFETY: `record` points to that many bytes of the pool's mapping. The page was free before this step, and this
        // call is the only one of the step for this layer, sequence and head.
        let record = unsafe { std::slice::from_raw_parts_mut(pool.record(layer, seal.page, head), bytes) };
        counts += encode(&layer.config, &tile, record);
    }
    counts
}

/// K and V of one tile in float32, `[group, head_dim]`, of slot precision.
struct Tile {
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Tile {
    fn new(group: usize, head_dim: usize) -> Self {
        Self { k: vec![0.0; group * head_dim], v: vec![0.0; group * head_dim] }
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
            // SAFETY: the slot's matrix has as many elements as the tile; nobody writes it but this call.
            unsafe { load(slot_dtype(pool.layout().slot_type), pool.slot(layer, slot, head, side), values) };
        }
    }
}

/// Encodes with an encoder kept per thread.
fn encode(config: &Config, tile: &Tile, record: &mut [u8]) -> EncodeCounts {
    thread_local! {
        static ENCODER: RefCell<Option<(Config, TileEncoder)>> = const { RefCell::new(None) };
    }
    ENCODER.with_borrow_mut(|kept| {
        if kept.as_ref().is_none_or(|(of, _)| of != config) {
            *kept = Some((*config, TileEncoder::new(config)));
        }
        let (_, encoder) = kept.as_mut().expect("set above");
        encoder.encode(&tile.k, &tile.v, record)
    })
}
