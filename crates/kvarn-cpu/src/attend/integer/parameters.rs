//! Scales and zero points of a record's matrix in float32.

use kvarn::Aligned;
use kvarn::record::MatrixLayout;

use crate::lanes::Floats;

/// Parameters of a matrix.
#[derive(Debug, Default)]
pub(super) struct Parameters {
    /// `[rows]`, in the order of factors.
    pub row_scale: Aligned<f32>,
    /// `[rows]`, what the middle of the codes decodes to, in the order of factors.
    pub row_middle: Aligned<f32>,
    /// `[columns]`.
    pub column_scale: Aligned<f32>,
    /// The largest size of `column_scale`.
    pub largest_column_scale: f32,
}

impl Parameters {
    /// Those of `layout`'s matrix in a record; `middle`: code from which codes are counted.
    #[inline(always)]
    pub(super) fn read<F: Floats>(&mut self, layout: &MatrixLayout, record: &[u8], middle: f32) {
        self.row_scale.resize(layout.rows);
        self.row_middle.resize(layout.rows);
        self.column_scale.resize(layout.columns);
        let scale = parts::<4, 8>(&record[layout.row_scale.clone()]);
        let zero = parts::<4, 8>(&record[layout.row_zero.clone()]);
        let row_scale = self.row_scale.as_chunks_mut::<16>().0;
        let row_middle = &mut self.row_middle.as_chunks_mut::<16>().0[..row_scale.len()];
        for block in 0..row_scale.len() {
            let (scale, zero) = (rows::<F>(&scale, block), rows::<F>(&zero, block));
            scale.store(&mut row_scale[block]);
            scale.mul_add(F::splat(middle), zero).store(&mut row_middle[block]);
        }
        let scale = parts::<8, 4>(&record[layout.column_scale.clone()]);
        let mut largest = F::splat(0.0);
        for (block, out) in self.column_scale.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let scale = columns::<F>(&scale, block);
            largest = largest.larger_size(scale);
            scale.store(out);
        }
        self.largest_column_scale = largest.largest();
    }
}

/// What is stored for each of `PARTS` lanes of a fragment: `BYTES` for each block of 16.
#[inline(always)]
fn parts<const PARTS: usize, const BYTES: usize>(stored: &[u8]) -> [&[[u8; BYTES]]; PARTS] {
    let blocks = stored.as_chunks::<BYTES>().0;
    let length = blocks.len() / PARTS;
    std::array::from_fn(|part| &blocks[part * length..][..length])
}

/// The sixteen of a block of rows, in the order of factors. Stored by c, then block, k half, e.
#[inline(always)]
fn rows<F: Floats>(stored: &[&[[u8; 8]]; 4], block: usize) -> F {
    let mut quarters = [0; 4];
    for c in 0..4 {
        quarters[c] = u64::from_le_bytes(stored[c][block]);
    }
    F::of_halves(quarters).swapped()
}

/// The sixteen of a block of columns. Stored by g, then block, half of the block.
#[inline(always)]
fn columns<F: Floats>(stored: &[&[[u8; 4]]; 8], block: usize) -> F {
    let mut quarters = [0; 4];
    for pair in 0..4 {
        let [low, high] = [stored[2 * pair][block], stored[2 * pair + 1][block]].map(u32::from_le_bytes);
        quarters[pair] = u64::from(low) | u64::from(high) << 32;
    }
    F::of_halves(quarters).deinterleaved()
}
