//! Range guards: a power of two moved from the rows' parameters to the columns' scale, so that a decode kernel's
//! pre-scaled queries and probabilities stay within half range. Costs nothing at decode.

use half::f16;

use crate::record::EncodedMatrix;
use crate::{Saturation, round_to_half};

/// The exponent `k`: row parameters are multiplied by `2^-k`, column scales by `2^k`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeGuard {
    exponent: i32,
}

impl RangeGuard {
    /// The guard of unrounded parameters: `M = max(max row_scale, max |row_zero| / 1024)`, rounded to 11 significant
    /// bits, becomes a number in [1/2, 1); less where a column scale would exceed the largest half.
    pub fn new(row_scale: &[f32], row_zero: &[f32], column_scale: &[f32]) -> Self {
        let scale = row_scale.iter().copied().fold(0.0, f32::max);
        let zero = row_zero.iter().map(|zero| zero.abs()).fold(0.0, f32::max);
        let largest = f64::from(scale).max(f64::from(zero) / 1024.0);
        if largest == 0.0 || !largest.is_finite() {
            return Self { exponent: 0 };
        }
        let mut exponent = exponent(round_to_11_bits(largest)) + 1;
        let column = round_to_11_bits(f64::from(column_scale.iter().copied().fold(0.0, f32::max)));
        while column.is_finite() && column * power(exponent) > 65504.0 {
            exponent -= 1;
        }
        Self { exponent }
    }

    /// Multiplies unrounded parameters.
    pub fn apply(self, row_scale: &mut [f32], row_zero: &mut [f32], column_scale: &mut [f32]) {
        let (down, up) = (power(-self.exponent), power(self.exponent));
        let multiply = |values: &mut [f32], factor: f64| {
            for value in values {
                *value = (f64::from(*value) * factor) as f32;
            }
        };
        multiply(row_scale, down);
        multiply(row_zero, down);
        multiply(column_scale, up);
    }

    /// Folds the guard into parameters that are halves already, as published records hold them.
    pub fn fold_halves(matrix: &mut EncodedMatrix, saturation: &mut Saturation) {
        let floats = |values: &[f16]| values.iter().map(|value| value.to_f32()).collect::<Vec<_>>();
        let mut row_scale = floats(&matrix.row_scale);
        let mut row_zero = floats(&matrix.row_zero);
        let mut column_scale = floats(&matrix.column_scale);
        Self::new(&row_scale, &row_zero, &column_scale).apply(
            &mut row_scale,
            &mut row_zero,
            &mut column_scale,
        );
        let mut halves = |values: &[f32], out: &mut [f16]| {
            for (half, value) in out.iter_mut().zip(values) {
                *half = if value.is_nan() { f16::NAN } else { round_to_half(*value, saturation) };
            }
        };
        halves(&row_scale, &mut matrix.row_scale);
        halves(&row_zero, &mut matrix.row_zero);
        halves(&column_scale, &mut matrix.column_scale);
    }
}

fn power(exponent: i32) -> f64 {
    f64::from(exponent).exp2()
}

/// `value`, positive and normal, rounded to nearest even with 11 significant bits.
fn round_to_11_bits(value: f64) -> f64 {
    const DROPPED: u32 = 52 - 10;
    let bits = value.to_bits();
    let half = (1 << (DROPPED - 1)) - 1 + (bits >> DROPPED & 1);
    f64::from_bits((bits + half) >> DROPPED << DROPPED)
}

/// `floor(log2 value)` of a positive normal number.
fn exponent(value: f64) -> i32 {
    (value.to_bits() >> 52 & 0x7FF) as i32 - 1023
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_row_parameter_lands_in_half_to_one() {
        for (scale, zero, column, k) in [
            (0.75, 0.0, 1.0, 0),
            (1.0, 0.0, 1.0, 1),
            (0.99999, 0.0, 1.0, 1), // rounds to 1 as half
            (300.0, -0.1, 2.0, 9),
            (1e-6, 0.0, 1.0, -19),
            (1e-9, 2048.0, 1.0, 2),
            (0.0, 0.0, 1.0, 0),
            (1024.0, 0.0, 1e3, 6), // 2^11 would push the column scale beyond 65504
            (1024.0, 0.0, 1e5, -1),
        ] {
            assert_eq!(RangeGuard::new(&[scale], &[zero], &[column]).exponent, k, "{scale} {zero} {column}");
        }
    }
}
