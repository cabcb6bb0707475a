//! Reading stored tokens: records and slots to float32, in the rotated frame.

use kvarn::codec::{DecodeScratch, Turn, decode_matrix};
use kvarn::pool::Layer;
use kvarn::tables::{Place, Span};
use kvarn::{Aligned, DType};

use crate::TensorMut;
use crate::dtype::{convert, sixteen, slot_dtype};
use crate::features::dispatch;
use crate::lanes::{BestTurn, Floats, with_floats};
use crate::pool::Pool;

/// One tile of one KV head in float32, the way matrix products want it.
#[derive(Debug, Default)]
pub(crate) struct TileBuffer {
    /// `[head_dim, group]` when it holds keys, `[group, head_dim]` when it holds values.
    pub values: Aligned<f32>,
    scratch: DecodeScratch,
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
    /// Reads the spans of one tile. Returns to where it is filled, a multiple of 16 tokens: positions before it that are
    /// outside the spans are 0.
    pub(crate) fn read(
        &mut self,
        pool: &Pool,
        layer: &Layer,
        head: usize,
        spans: &[Span],
        want: Want,
    ) -> usize {
        let (group, head_dim) = (pool.layout().config.group(), layer.shape.head_dim);
        let covered: usize = spans.iter().map(|span| span.count).sum();
        let end = spans.iter().map(|span| span.offset + span.count).max().unwrap_or(0).next_multiple_of(16);
        self.values.resize(group * head_dim);
        if covered < end {
            // What an earlier tile left here, perhaps of another head, must not be multiplied, not even by 0.
            match want {
                Want::Keys => {
                    for channel in self.values.chunks_exact_mut(group) {
                        channel[..end].fill(0.0);
                    }
                }
                Want::Values => self.values[..end * head_dim].fill(0.0),
            }
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
        end
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
        // SAFETY: offset + count ≤ group, so the rows lie within the slot's matrix; stored tokens are not written again while
        // the sequence is read.
        let rows = unsafe {
            let row_bytes = head_dim * dtype.bytes();
            std::slice::from_raw_parts(base.add(offset * row_bytes), count * row_bytes)
        };
        match want {
            Want::Values => convert(dtype, rows, &mut self.values[offset * head_dim..][..count * head_dim]),
            Want::Keys => transpose(dtype, rows, &mut self.values[offset..], head_dim, group),
        }
    }
}

/// Rows of `head_dim` elements to columns of `out`, whose rows lie `stride` apart.
fn transpose(dtype: DType, rows: &[u8], out: &mut [f32], head_dim: usize, stride: usize) {
    with_floats!(transpose_with(dtype: DType, rows: &[u8], out: &mut [f32], head_dim: usize, stride: usize) -> ());
}

#[inline(always)]
fn transpose_with<F: Floats>(dtype: DType, rows: &[u8], out: &mut [f32], head_dim: usize, stride: usize) {
    let (row_bytes, block_bytes) = (head_dim * dtype.bytes(), 16 * dtype.bytes());
    let (mut square, mut turned) = ([0.0; 256], [0.0; 256]);
    for (first, rows) in (0..).step_by(16).zip(rows.chunks(16 * row_bytes)) {
        for block in 0..head_dim / 16 {
            for (row, square) in rows.chunks_exact(row_bytes).zip(square.as_chunks_mut::<16>().0) {
                sixteen::<F>(dtype, &row[block * block_bytes..][..block_bytes]).store(square);
            }
            BestTurn::floats(&square, &mut turned);
            let tokens = rows.len() / row_bytes;
            for (channel, turned) in turned.as_chunks::<16>().0.iter().enumerate() {
                let out = &mut out[(16 * block + channel) * stride + first..][..tokens];
                match out.try_into() {
                    Ok(all) => F::load(turned).store(all),
                    Err(_) => out.copy_from_slice(&turned[..tokens]),
                }
            }
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
