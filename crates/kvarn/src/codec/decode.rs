//! Decoding of one matrix of a record to float32.

use half::f16;

use crate::Side;
use crate::record::{RecordLayout, Strides, unpack_codes};

/// Working memory of [`decode_matrix`].
#[derive(Clone, Debug, Default)]
pub struct DecodeScratch {
    codes: Vec<u8>,
    token: Vec<f32>,
    token_zero: Vec<f32>,
    channel: Vec<f32>,
    channel_zero: Vec<f32>,
}

/// Decodes one side of `record` to `out`, `[group, head_dim]`, in the rotated frame.
///
/// K: `(q · s_chan + z_chan) · s_tok`; V: `(q · s_tok + z_tok) · s_chan`; float32.
///
/// # Panics
/// If a slice has another length than the layout says.
pub fn decode_matrix(
    layout: &RecordLayout,
    side: Side,
    record: &[u8],
    scratch: &mut DecodeScratch,
    out: &mut [f32],
) {
    let (group, head_dim) = (layout.group(), layout.head_dim());
    assert_eq!((record.len(), out.len()), (layout.record_bytes, group * head_dim));
    let matrix = layout.matrix(side);
    scratch.codes.resize(group * head_dim, 0);
    let strides = match side {
        Side::Key => Strides { row: 1, column: head_dim },
        Side::Value => Strides { row: head_dim, column: 1 },
    };
    unpack_codes(matrix.code_order, &record[matrix.codes.clone()], strides, &mut scratch.codes);
    let read = |range: &std::ops::Range<usize>,
                order: crate::record::ParameterOrder,
                count: usize,
                values: &mut Vec<f32>| {
        let bytes = &record[range.clone()];
        values.clear();
        values.extend((0..count).map(|index| {
            f16::from_le_bytes([bytes[order.byte(index)], bytes[order.byte(index) + 1]]).to_f32()
        }));
    };
    let rows = scratch.codes.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim));
    match side {
        Side::Key => {
            read(&matrix.row_scale, matrix.row_order(), head_dim, &mut scratch.channel);
            read(&matrix.row_zero, matrix.row_order(), head_dim, &mut scratch.channel_zero);
            read(&matrix.column_scale, matrix.column_order(), group, &mut scratch.token);
            for ((codes, out), token) in rows.zip(&scratch.token) {
                for (((value, &code), scale), zero) in
                    out.iter_mut().zip(codes).zip(&scratch.channel).zip(&scratch.channel_zero)
                {
                    *value = (f32::from(code) * scale + zero) * token;
                }
            }
        }
        Side::Value => {
            read(&matrix.column_scale, matrix.column_order(), head_dim, &mut scratch.channel);
            read(&matrix.row_scale, matrix.row_order(), group, &mut scratch.token);
            read(&matrix.row_zero, matrix.row_order(), group, &mut scratch.token_zero);
            for ((codes, out), (token, zero)) in rows.zip(scratch.token.iter().zip(&scratch.token_zero)) {
                for ((value, &code), scale) in out.iter_mut().zip(codes).zip(&scratch.channel) {
                    *value = (f32::from(code) * token + zero) * scale;
                }
            }
        }
    }
}
