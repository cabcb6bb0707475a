//! Decoding of one matrix of a record to float32.

use half::f16;

use crate::record::{MatrixLayout, ParameterOrder, unpack_codes};

/// Working memory of [`decode_matrix`].
#[derive(Clone, Debug, Default)]
pub struct DecodeScratch {
    codes: Vec<u8>,
    row_scale: Vec<f32>,
    row_zero: Vec<f32>,
    column_scale: Vec<f32>,
}

/// Decodes one matrix of `record` to `out`, `[rows, columns]`, in the rotated frame: K as `[head_dim, group]`, V as
/// `[group, head_dim]`.
///
/// `(code · row_scale + row_zero) · column_scale`, float32.
///
/// # Panics
/// If a slice is shorter than the layout says.
#[inline(always)]
pub fn decode_matrix(layout: &MatrixLayout, record: &[u8], scratch: &mut DecodeScratch, out: &mut [f32]) {
    let (rows, columns) = (layout.rows, layout.columns);
    scratch.codes.resize(rows * columns, 0);
    unpack_codes(layout.code_order, &record[layout.codes.clone()], &mut scratch.codes);
    read(&record[layout.row_scale.clone()], layout.row_order(), rows, &mut scratch.row_scale);
    read(&record[layout.row_zero.clone()], layout.row_order(), rows, &mut scratch.row_zero);
    read(&record[layout.column_scale.clone()], layout.column_order(), columns, &mut scratch.column_scale);
    let parameters = scratch.row_scale.iter().zip(&scratch.row_zero);
    let matrix = out[..rows * columns].chunks_exact_mut(columns).zip(scratch.codes.chunks_exact(columns));
    for ((out, codes), (scale, zero)) in matrix.zip(parameters) {
        for ((value, &code), column_scale) in out.iter_mut().zip(codes).zip(&scratch.column_scale) {
            *value = (f32::from(code) * scale + zero) * column_scale;
        }
    }
}

#[inline(always)]
fn read(bytes: &[u8], order: ParameterOrder, count: usize, values: &mut Vec<f32>) {
    values.clear();
    values.extend((0..count).map(|index| {
        let at = order.byte(index);
        f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
    }));
}
