//! Reading stored tokens: records and slots to float32, in the rotated frame.

use kvarn::codec::{DecodeScratch, decode_matrix};
use kvarn::pool::Layer;
use kvarn::tables::{Place, Span};

use crate::TensorMut;
use crate::dtype::{load, slot_dtype};
use crate::features::dispatch;
use crate::pool::Pool;

/// Tokens of a slot that are read at once.
const TOGETHER: usize = 16;

/// One tile of one KV head in float32, the way matrix products want it.
#[derive(Debug, Default)]
pub(crate) struct TileBuffer {
    /// `[head_dim, group]` when it holds keys, `[group, head_dim]` when it holds values.
    pub values: Vec<f32>,
    scratch: DecodeScratch,
    rows: Vec<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// Keys, channel by channel.
    Keys,
    /// Values, token by token.
    Values,
}

/// The bytes of a record.
///
/// # Safety
/// A sequence that is being read holds the page: then nobody writes it meanwhile, as only the step that took it from the free
/// ones does.
pub(crate) unsafe fn record<'a>(pool: &'a Pool, layer: &Layer, page: usize, head: usize) -> &'a [u8] {
    // SAFETY: `Pool::record` points to that many bytes of the pool's mapping; the rest is the caller's promise.
    unsafe { std::slice::from_raw_parts(pool.record(layer, page, head), layer.layout.record_bytes) }
}

impl TileBuffer {
    /// Reads the spans of one tile. Positions outside the spans are 0.
    pub(crate) fn read(&mut self, pool: &Pool, layer: &Layer, head: usize, spans: &[Span], want: Want) {
        let (group, head_dim) = (pool.layout().config.group(), layer.shape.head_dim);
        let covered: usize = spans.iter().map(|span| span.count).sum();
        self.values.resize(group * head_dim, 0.0);
        if covered < group {
            // What an earlier tile left here, perhaps of another head, must not be multiplied, not even by 0.
            self.values.fill(0.0);
        }
        // A partly sealed sink tile has two spans: the page gives the whole tile, the slot then replaces its sinks.
        for span in spans {
            if let Place::Page(page) = span.place {
                // SAFETY: the sequence, which is being read, holds the page.
                let record = unsafe { record(pool, layer, page, head) };
                let layout = match want {
                    Want::Keys => &layer.layout.key,
                    Want::Values => &layer.layout.value,
                };
                decode(layout, record, &mut self.scratch, &mut self.values);
            }
        }
        for span in spans {
            if let Place::Slot(slot) = span.place {
                self.read_slot(pool, layer, head, (slot, span.offset, span.count), want);
            }
        }
    }

    /// Copies one token, of the tile that was read, to `row` `[head_dim]`.
    pub(crate) fn row(&self, want: Want, token: usize, row: &mut [f32]) {
        match want {
            Want::Values => row.copy_from_slice(&self.values[token * row.len()..][..row.len()]),
            Want::Keys => {
                let group = self.values.len() / row.len();
                for (channel, value) in row.iter_mut().enumerate() {
                    *value = self.values[channel * group + token];
                }
            }
        }
    }

    fn read_slot(
        &mut self,
        pool: &Pool,
        layer: &Layer,
        head: usize,
        (slot, offset, count): (usize, usize, usize),
        want: Want,
    ) {
        let (group, head_dim) = (pool.layout().config.group(), layer.shape.head_dim);
        let dtype = slot_dtype(pool.layout().slot_type);
        let base = pool.slot(layer, slot, head, usize::from(want == Want::Values));
        self.rows.resize(TOGETHER * head_dim, 0.0);
        for first in (offset..offset + count).step_by(TOGETHER) {
            let tokens = TOGETHER.min(offset + count - first);
            let rows = match want {
                Want::Values => &mut self.values[first * head_dim..][..tokens * head_dim],
                Want::Keys => &mut self.rows[..tokens * head_dim],
            };
            // SAFETY: first + tokens ≤ group, so the rows lie within the slot's matrix; stored tokens are not written again
            // while the sequence is read.
            unsafe { load(dtype, base.add(first * head_dim * dtype.bytes()), rows) };
            if want == Want::Keys {
                transpose(&self.rows, &mut self.values[first..], [tokens, head_dim, group]);
            }
        }
    }
}

dispatch! {
    /// Rows `[tokens, head_dim]` to columns of `out`, whose rows lie `stride` apart: `[tokens, head_dim, stride]`.
    fn transpose(rows: &[f32], out: &mut [f32], shape: [usize; 3]) = transpose_body
}

#[inline(always)]
fn transpose_body<const FMA: bool>(rows: &[f32], out: &mut [f32], [tokens, head_dim, stride]: [usize; 3]) {
    for (channel, out) in out.chunks_mut(stride).enumerate().take(head_dim) {
        for (token, value) in out[..tokens].iter_mut().enumerate() {
            *value = rows[token * head_dim + channel];
        }
    }
}

dispatch! {
    /// [`decode_matrix`] with the best instructions.
    fn decode(
        layout: &kvarn::record::MatrixLayout,
        record: &[u8],
        scratch: &mut DecodeScratch,
        out: &mut [f32],
    ) = decode_body
}

#[inline(always)]
fn decode_body<const FMA: bool>(
    layout: &kvarn::record::MatrixLayout,
    record: &[u8],
    scratch: &mut DecodeScratch,
    out: &mut [f32],
) {
    decode_matrix(layout, record, scratch, out);
}

/// Writes the tokens of `spans` of one KV head to `k` and `v`, whose row 0 is position `first`.
#[allow(clippy::too_many_arguments)] // one head of one expansion
pub(crate) fn expand_head(
    pool: &Pool,
    layer: &Layer,
    spans: &[Span],
    head: usize,
    first: usize,
    rotated: bool,
    k: &TensorMut<'_>,
    v: &TensorMut<'_>,
) {
    let (group, head_dim) = (pool.layout().config.group(), layer.shape.head_dim);
    let mut buffer = TileBuffer::default();
    let mut row = vec![0.0; head_dim];
    for tile in spans.chunk_by(|a, b| a.position / group == b.position / group) {
        for (want, out) in [(Want::Keys, k), (Want::Values, v)] {
            buffer.read(pool, layer, head, tile, want);
            for span in tile {
                for index in 0..span.count {
                    buffer.row(want, span.offset + index, &mut row);
                    if !rotated {
                        layer.rotation.apply(&mut row);
                    }
                    // SAFETY: this head's rows are written by this call only.
                    unsafe { out.store_row(span.position + index - first, head, &row) };
                }
            }
        }
    }
}
