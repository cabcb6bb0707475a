//! Scales and zero points of a record's matrix in float32.

use kvarn::record::MatrixLayout;

use crate::lanes::Floats;

/// Parameters of a matrix.
#[derive(Debug, Default)]
pub(super) struct Parameters {
    /// `[rows]`, in the order of factors.
    pub row_scale: Vec<f32>,
    /// `[rows]`, what the middle of the codes decodes to, in the order of factors.
    pub row_middle: Vec<f32>,
    /// `[columns]`.
    pub column_scale: Vec<f32>,
    /// The largest size of `column_scale`.
    pub largest_column_scale: f32,
}

impl Parameters {
    /// Those of `layout`'s matrix in a record; `middle`: code from which codes are counted.
    #[inline(always)]
    pub(super) fn read<F: Floats>(&mut self, layout: &MatrixLayout, record: &[u8], middle: f32) {
        self.row_scale.resize(layout.rows, 0.0);
        self.row_middle.resize(layout.rows, 0.0);
        self.column_scale.resize(layout.columns, 0.0);
        let (scale, zero) = (&record[layout.row_scale.clone()], &record[layout.row_zero.clone()]);
        let blocks = self.row_scale.chunks_exact_mut(16).zip(self.row_middle.chunks_exact_mut(16));
        for (block, (row_scale, row_middle)) in blocks.enumerate() {
            let scale = rows::<F>(scale, block, layout.rows / 16);
            let zero = rows::<F>(zero, block, layout.rows / 16);
            scale.store(row_scale.try_into().expect("16 elements"));
            scale.mul(F::splat(middle)).add(zero).store(row_middle.try_into().expect("16 elements"));
        }
        let column_scale = &record[layout.column_scale.clone()];
        let mut largest = F::splat(0.0);
        for (block, out) in self.column_scale.chunks_exact_mut(16).enumerate() {
            let scale = columns::<F>(column_scale, block, layout.columns / 16);
            largest = largest.larger_size(scale);
            scale.store(out.try_into().expect("16 elements"));
        }
        self.largest_column_scale = largest.largest();
    }
}

/// The sixteen of a block of rows, in the order of factors. Stored by c, then block, k half, e.
#[inline(always)]
fn rows<F: Floats>(stored: &[u8], block: usize, blocks: usize) -> F {
    let mut quarters = [0; 4];
    for (c, quarter) in quarters.iter_mut().enumerate() {
        let at = 8 * (c * blocks + block);
        *quarter = u64::from_le_bytes(stored[at..at + 8].try_into().expect("8 bytes"));
    }
    F::of_halves(quarters).swapped()
}

/// The sixteen of a block of columns. Stored by g, then block, half of the block.
#[inline(always)]
fn columns<F: Floats>(stored: &[u8], block: usize, blocks: usize) -> F {
    let mut quarters = [0; 4];
    for (pair, quarter) in quarters.iter_mut().enumerate() {
        for odd in 0..2 {
            let at = 4 * ((2 * pair + odd) * blocks + block);
            let two = u32::from_le_bytes(stored[at..at + 4].try_into().expect("4 bytes"));
            *quarter |= u64::from(two) << (32 * odd);
        }
    }
    F::of_halves(quarters).deinterleaved()
}
