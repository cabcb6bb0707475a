//! What codes are multiplied by: 16-bit integers, as two signed bytes each, in the order of the codes.
//!
//! Codes of a matrix are summed over its quantised rows, 16 of which meet in a fragment (`kvarn::record::CodeOrder`). Factors
//! come block of 16 rows by block, and within it by c, then e, then k half, so row 8 · k half + 2 c + e is at
//! 4 c + 2 e + k half: the four rows whose codes share a 32-bit lane lie side by side, as codes do in `codes`.

use kvarn::Aligned;

use super::parameters::Parameters;
use super::{Matrix, TOGETHER};
use crate::lanes::{Floats, Lanes};

/// A factor is `2^HIGH · high + low`, of signed bytes.
pub(super) const HIGH: i32 = 8;
/// The largest factor: with half a `2^HIGH` more the high part would be 128.
const LARGEST: f32 = 32_639.0;

/// The factors of a few columns of a product.
#[derive(Debug, Default)]
pub(super) struct Factors {
    /// What a unit of a factor stands for.
    pub unit: [f32; TOGETHER],
    /// Sum over rows of what is multiplied, times what the middle of the codes decodes to.
    pub zero: [f32; TOGETHER],
    /// Sum of the factors.
    pub sum: [i32; TOGETHER],
    /// `[rows / 16, columns]`: for each c four low parts, then four high ones.
    pub bytes: Aligned<[u8; 32]>,
    /// `[rows / 16, columns]`.
    values: Aligned<[f32; 16]>,
}

impl Factors {
    /// Of `C` columns of `x` `[columns, rows]`; false if they are not finite. Codes will count from the middle: sums of them
    /// then do not nearly cancel against the zero points, which would make more of the rounding of factors.
    #[inline(always)]
    pub(super) fn make<F: Floats, const C: usize>(&mut self, x: Matrix<'_>, parameters: &Parameters) -> bool {
        let (scale, middle) = (&parameters.row_scale, &parameters.row_middle);
        self.values.resize(scale.len() / 16 * C);
        let (mut zeros, mut largest) = ([F::splat(0.0); C], [F::splat(0.0); C]);
        let rows = scale.as_chunks::<16>().0.iter().zip(middle.as_chunks::<16>().0);
        for (block, (values, (scale, middle))) in self.values.chunks_exact_mut(C).zip(rows).enumerate() {
            let (scale, middle) = (F::load(scale), F::load(middle));
            for column in 0..C {
                let x = &x.values[column * x.stride + 16 * block..][..16];
                let x = F::load(x.try_into().expect("16 elements")).interleaved();
                let value = x.mul(scale);
                zeros[column] = zeros[column].add(x.mul(middle));
                largest[column] = largest[column].larger_size(value);
                value.store(&mut values[column]);
            }
        }
        let mut finite = true;
        for column in 0..C {
            self.zero[column] = zeros[column].sum();
            self.unit[column] = largest[column].largest() / LARGEST;
            finite &= self.zero[column].is_finite() && self.unit[column].is_finite();
        }
        if finite {
            self.quantize::<F, C>();
        }
        finite
    }

    /// Makes of `C` columns factors of what their rounding left: products with them are to be added. Nothing is left of
    /// columns that `wanted` does not name.
    #[inline(always)]
    pub(super) fn refine<F: Floats, const C: usize>(&self, wanted: [bool; C], refined: &mut Self) {
        refined.values.resize(self.values.len());
        let (mut inverses, mut units, mut largest) =
            ([F::splat(0.0); C], [F::splat(0.0); C], [F::splat(0.0); C]);
        for column in 0..C {
            inverses[column] = F::splat(inverse(self.unit[column]));
            units[column] = F::splat(self.unit[column]);
        }
        for (values, refined) in self.values.chunks_exact(C).zip(refined.values.chunks_exact_mut(C)) {
            for column in 0..C {
                let value = F::load(&values[column]);
                let left = value.sub(value.mul(inverses[column]).nearest().floats().mul(units[column]));
                largest[column] = largest[column].larger_size(left);
                left.store(&mut refined[column]);
            }
        }
        for column in 0..C {
            refined.zero[column] = 0.0;
            refined.unit[column] = if wanted[column] { largest[column].largest() / LARGEST } else { 0.0 };
        }
        refined.quantize::<F, C>();
    }

    /// Of values and units.
    #[inline(always)]
    fn quantize<F: Floats, const C: usize>(&mut self) {
        self.bytes.resize(self.values.len());
        let mut inverses = [F::splat(0.0); C];
        for column in 0..C {
            inverses[column] = F::splat(inverse(self.unit[column]));
        }
        let mut sums = [F::Integers::splat(0); C];
        for (values, bytes) in self.values.chunks_exact(C).zip(self.bytes.chunks_exact_mut(C)) {
            for column in 0..C {
                let factor = F::load(&values[column]).mul(inverses[column]).nearest();
                sums[column] = sums[column].add(factor);
                // The low byte as a signed one: what it then lacks goes to the high part.
                let half = F::Integers::splat(1 << (HIGH - 1));
                bytes[column] = factor.add(half).xor(half).byte_pairs();
            }
        }
        for column in 0..C {
            self.sum[column] = sums[column].sum();
        }
    }
}

/// Units in 1. Where all values are zeros, or so small that it would be infinite, nothing is left of them.
#[inline(always)]
fn inverse(unit: f32) -> f32 {
    let inverse = 1.0 / unit;
    if inverse.is_finite() { inverse } else { 0.0 }
}
