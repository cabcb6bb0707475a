//! One encoded matrix in plain arrays, and its way into and out of a record.

use half::f16;

use super::{MatrixLayout, ParameterOrder, pack_codes, unpack_codes};

/// Codes and parameters of one matrix `[rows, columns]`, in logical order.
///
/// Decoded value: `(code[r, c] · row_scale[r] + row_zero[r]) · column_scale[c]`.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedMatrix {
    /// `[rows, columns]`, one code per byte.
    pub codes: Vec<u8>,
    /// `[rows]`.
    pub row_scale: Vec<f16>,
    /// `[rows]`.
    pub row_zero: Vec<f16>,
    /// `[columns]`.
    pub column_scale: Vec<f16>,
}

impl EncodedMatrix {
    /// A matrix of zeros for `layout`.
    pub fn zeros(layout: &MatrixLayout) -> Self {
        Self {
            codes: vec![0; layout.rows * layout.columns],
            row_scale: vec![f16::ZERO; layout.rows],
            row_zero: vec![f16::ZERO; layout.rows],
            column_scale: vec![f16::ZERO; layout.columns],
        }
    }

    /// Writes the matrix to its place in `record`.
    ///
    /// # Panics
    /// If `record` is shorter than a record or the matrix has another shape than `layout`.
    #[inline(always)]
    pub fn write(&self, layout: &MatrixLayout, record: &mut [u8]) {
        pack_codes(layout.code_order, &self.codes, &mut record[layout.codes.clone()]);
        write_halves(&self.row_scale, layout.row_order(), &mut record[layout.row_scale.clone()]);
        write_halves(&self.row_zero, layout.row_order(), &mut record[layout.row_zero.clone()]);
        write_halves(&self.column_scale, layout.column_order(), &mut record[layout.column_scale.clone()]);
    }

    /// Reads the matrix from its place in `record`.
    ///
    /// # Panics
    /// As [`EncodedMatrix::write`].
    pub fn read(&mut self, layout: &MatrixLayout, record: &[u8]) {
        unpack_codes(layout.code_order, &record[layout.codes.clone()], &mut self.codes);
        read_halves(&record[layout.row_scale.clone()], layout.row_order(), &mut self.row_scale);
        read_halves(&record[layout.row_zero.clone()], layout.row_order(), &mut self.row_zero);
        read_halves(&record[layout.column_scale.clone()], layout.column_order(), &mut self.column_scale);
    }
}

#[inline(always)]
fn write_halves(values: &[f16], order: ParameterOrder, bytes: &mut [u8]) {
    for (index, value) in values.iter().enumerate() {
        let at = order.byte(index);
        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
}

fn read_halves(bytes: &[u8], order: ParameterOrder, values: &mut [f16]) {
    for (index, value) in values.iter_mut().enumerate() {
        let at = order.byte(index);
        *value = f16::from_le_bytes([bytes[at], bytes[at + 1]]);
    }
}
