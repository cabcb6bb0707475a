//! What codes are multiplied by: 16-bit integers, as two signed bytes each, in the order of the codes.
//!
//! Codes of a matrix are summed over its quantised rows, 16 of which meet in a fragment (`kvarn::record::CodeOrder`). Factors
//! come block of 16 rows by block, and within it by c, then e, then k half, so row 8 · k half + 2 c + e is at
//! 4 c + 2 e + k half: the four rows whose codes share a 32-bit lane lie side by side, as codes do once they are unpacked.

use super::parameters::Parameters;
use crate::lanes::{Floats, Lanes};

/// A factor is `2^HIGH · high + low`, of signed bytes.
pub(super) const HIGH: i32 = 8;
/// The largest factor: with half a `2^HIGH` more the high part would be 128.
const LARGEST: f32 = 32_639.0;

/// The factors of one column of a product.
#[derive(Debug, Default)]
pub(super) struct Factors {
    /// What a unit of a factor stands for.
    pub unit: f32,
    /// Sum over rows of what is multiplied, times what the middle of the codes decodes to.
    pub zero: f32,
    /// Sum of the factors.
    pub sum: i32,
    /// `[rows / 16]`: high parts, then low parts.
    bytes: Vec<[[u8; 16]; 2]>,
    values: Vec<f32>,
}

impl Factors {
    /// Of `x` `[rows]`; false if they are not finite. Codes will count from the middle: sums of them then do not nearly
    /// cancel against the zero points, which would make more of the rounding of factors.
    #[inline(always)]
    pub(super) fn make<F: Floats>(&mut self, x: &[f32], parameters: &Parameters) -> bool {
        self.values.resize(x.len(), 0.0);
        let (mut zeros, mut largest) = (F::splat(0.0), F::splat(0.0));
        let rows = parameters.row_scale.chunks_exact(16).zip(parameters.row_middle.chunks_exact(16));
        let blocks = self.values.chunks_exact_mut(16).zip(x.chunks_exact(16));
        for ((values, x), (scale, middle)) in blocks.zip(rows) {
            let x = load::<F>(x).interleaved();
            let value = x.mul(load(scale));
            zeros = zeros.add(x.mul(load(middle)));
            largest = largest.larger_size(value);
            value.store(values.try_into().expect("16 elements"));
        }
        self.zero = zeros.sum();
        let largest = largest.largest();
        if !(self.zero.is_finite() && largest.is_finite()) {
            return false;
        }
        self.quantize::<F>(largest);
        true
    }

    /// Makes factors of what the rounding of these left: products with them are to be added.
    #[inline(always)]
    pub(super) fn refine<F: Floats>(&mut self) {
        let mut largest = F::splat(0.0);
        let (inverse, unit) = (F::splat(self.inverse()), F::splat(self.unit));
        for values in self.values.chunks_exact_mut(16) {
            let value = load::<F>(values);
            let left = value.sub(value.mul(inverse).nearest().floats().mul(unit));
            largest = largest.larger_size(left);
            left.store(values.try_into().expect("16 elements"));
        }
        self.zero = 0.0;
        self.quantize::<F>(largest.largest());
    }

    /// Of values none of which is larger than `largest`.
    #[inline(always)]
    fn quantize<F: Floats>(&mut self, largest: f32) {
        self.unit = largest / LARGEST;
        self.bytes.resize(self.values.len() / 16, [[0; 16]; 2]);
        let inverse = F::splat(self.inverse());
        let mut sum = F::Integers::splat(0);
        for (values, [high, low]) in self.values.chunks_exact(16).zip(&mut self.bytes) {
            let factor = load::<F>(values).mul(inverse).nearest();
            sum = sum.add(factor);
            *low = factor.bytes();
            // What is left of the low byte, as a signed one.
            *high = factor.add(F::Integers::splat(1 << (HIGH - 1))).shifted(-HIGH).bytes();
        }
        self.sum = sum.sum();
    }

    /// Units in 1. Where all values are zeros, or so small that it would be infinite, nothing is left of them.
    #[inline(always)]
    fn inverse(&self) -> f32 {
        let inverse = 1.0 / self.unit;
        if inverse.is_finite() { inverse } else { 0.0 }
    }

    /// Stores them as vectors that match those of codes: for each block high and low parts, every `stride` vectors.
    #[inline(always)]
    pub(super) fn spread<L: Lanes>(&self, vectors: &mut [[u8; 64]], stride: usize) {
        for ([high, low], vectors) in self.bytes.iter().zip(vectors.chunks_mut(stride)) {
            L::spread(high).store(&mut vectors[0]);
            L::spread(low).store(&mut vectors[1]);
        }
    }
}

#[inline(always)]
fn load<F: Floats>(values: &[f32]) -> F {
    F::load(values.try_into().expect("16 elements"))
}
