//! Products with records in integers: codes are multiplied as they are stored, without a decoded tile.
//!
//! `out[column, m] += column_scale[m] · (unit · Σ_k factor[column, k] · (code[k, m] - middle) + Σ_k x[column, k] · zero[k])`,
//! where a factor is `x · row_scale` in units that make the largest of a column a 16-bit integer, and `zero` what the middle
//! of the codes decodes to. Sums of integers are exact, so every instruction set gives the same; the rounding of a factor is
//! at most a 2^-16 of the largest.

mod factors;
mod keys;
mod lanes;
mod values;
#[cfg(target_arch = "x86_64")]
mod x86;

use kvarn::record::MatrixLayout;
use kvarn::{Bits, Side};

use factors::{Factors, Parameters};
use keys::sum_keys;
use lanes::{Lanes, Plain};
use values::sum_values;

use super::product::{Matrix, MatrixMut};
use crate::features::Level;

/// From so many query columns on it is cheaper to decode a tile once.
const MOST_COLUMNS: usize = 32;

/// Error of a logit (base 2, standard deviation) above which the rounding of factors is made good by a second product: where
/// one channel is much larger than the others, or a token of the tile than those that are seen.
const LOGIT_ERROR: f32 = 3e-4;

/// Working memory.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    parameters: Parameters,
    factors: Vec<Factors>,
    sums: Vec<Vec<i32>>,
}

/// Whether a product with this matrix of a record, for so many columns, is done here.
pub(super) fn serves(layout: &MatrixLayout, columns: usize) -> bool {
    let order = layout.code_order;
    let head_dim = if order.side() == Side::Key { layout.rows } else { layout.columns };
    // Words of a lane in a slice of 16 tokens, which lie four by four.
    let words = head_dim / 16 * order.bits().get() / 4;
    let whole = match order.side() {
        Side::Key => words.is_multiple_of(4) && head_dim.is_power_of_two(),
        Side::Value => words.is_multiple_of(4) || words == 2,
    };
    columns <= MOST_COLUMNS
        && order.bits() != Bits::Three
        && whole
        && (head_dim / 16 * order.bits().get()).is_multiple_of(4)
}

/// `out += x · matrix`, where `serves`; `x` `[columns, rows]`, `out` `[columns, matrix columns]`. False, and nothing done, if
/// something of `x` is not finite. The processor has `level`.
pub(super) fn multiply(
    level: Level,
    layout: &MatrixLayout,
    record: &[u8],
    x: Matrix<'_>,
    out: &mut MatrixMut<'_>,
    columns: usize,
    scratch: &mut Scratch,
) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use x86::{Avx2, Avx512};
        macro_rules! compiled {
            ($features:literal, $lanes:ty) => {{
                #[target_feature(enable = $features)]
                fn compiled(
                    layout: &MatrixLayout,
                    record: &[u8],
                    x: Matrix<'_>,
                    out: &mut MatrixMut<'_>,
                    columns: usize,
                    scratch: &mut Scratch,
                ) -> bool {
                    multiply_with::<$lanes>(layout, record, x, out, columns, scratch)
                }
                // SAFETY: the features were found on this processor.
                return unsafe { compiled(layout, record, x, out, columns, scratch) };
            }};
        }
        match level {
            Level::Avx512Vnni => {
                compiled!("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma,f16c", Avx512<true>)
            }
            Level::Avx512 => compiled!("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c", Avx512<false>),
            Level::Avx2 => compiled!("avx2,fma,f16c", Avx2),
            Level::Portable => {}
        }
    }
    multiply_with::<Plain>(layout, record, x, out, columns, scratch)
}

#[inline(always)]
fn multiply_with<L: Lanes>(
    layout: &MatrixLayout,
    record: &[u8],
    x: Matrix<'_>,
    out: &mut MatrixMut<'_>,
    columns: usize,
    scratch: &mut Scratch,
) -> bool {
    let Scratch { parameters, factors, sums } = scratch;
    let middle = 1 << (layout.code_order.bits().get() - 1);
    parameters.read(layout, record);
    factors.resize_with(factors.len().max(columns), Factors::default);
    sums.resize_with(sums.len().max(columns), Vec::new);
    let (factors, sums) = (&mut factors[..columns], &mut sums[..columns]);
    for (column, factors) in factors.iter_mut().enumerate() {
        if !factors.make(&x.values[column * x.stride..][..layout.rows], parameters, middle as f32) {
            return false;
        }
    }
    for sums in &mut *sums {
        sums.resize(layout.columns, 0);
    }
    let largest = factors.iter().map(|factors| factors.unit).fold(0.0, f32::max);
    let largest_scale = parameters.column_scale.iter().fold(0.0, |most: f32, scale| most.max(scale.abs()));
    // Factors are off by a 12th of their unit's square, codes from the middle by a 12th of their range's, in the mean.
    let error = largest * largest_scale * middle as f32 / 6.0 * (layout.rows as f32).sqrt();
    let rough = layout.code_order.side() == Side::Key && error > LOGIT_ERROR;
    for pass in 0..=usize::from(rough) {
        if pass > 0 {
            for factors in &mut *factors {
                factors.refine();
            }
        }
        sum_products::<L>(layout, &record[layout.codes.clone()], factors, sums);
        for (column, (factors, sums)) in factors.iter().zip(&*sums).enumerate() {
            let out = &mut out.values[column * out.stride..][..layout.columns];
            let middle = middle * factors.sum;
            for ((out, &sum), scale) in out.iter_mut().zip(sums).zip(&parameters.column_scale) {
                *out += scale * ((sum - middle) as f32 * factors.unit + factors.zero);
            }
        }
    }
    true
}

/// `sums[column][m] = Σ_k factor[column, k] · code[k, m]`.
#[inline(always)]
fn sum_products<L: Lanes>(layout: &MatrixLayout, codes: &[u8], factors: &[Factors], sums: &mut [Vec<i32>]) {
    // Vectors of codes of one token.
    let vectors = layout.rows / 64;
    match (layout.code_order.side(), layout.code_order.bits().get()) {
        (Side::Key, 4) if vectors == 1 => sum_keys::<L, 4, false, 1>(layout, codes, factors, sums),
        (Side::Key, 4) if vectors == 2 => sum_keys::<L, 4, false, 2>(layout, codes, factors, sums),
        (Side::Key, 4) => sum_keys::<L, 4, false, 4>(layout, codes, factors, sums),
        (Side::Key, 2) if vectors == 2 => sum_keys::<L, 2, false, 2>(layout, codes, factors, sums),
        (Side::Key, 2) => sum_keys::<L, 2, false, 4>(layout, codes, factors, sums),
        (Side::Key, _) if layout.rows == 32 => sum_keys::<L, 8, true, 1>(layout, codes, factors, sums),
        (Side::Key, _) if vectors == 1 => sum_keys::<L, 8, true, 2>(layout, codes, factors, sums),
        (Side::Key, _) if vectors == 2 => sum_keys::<L, 8, true, 4>(layout, codes, factors, sums),
        (Side::Key, _) => sum_keys::<L, 8, true, 8>(layout, codes, factors, sums),
        (Side::Value, 4) => sum_values::<L, 4, false, 2>(layout, codes, factors, sums),
        (Side::Value, 2) => sum_values::<L, 2, false, 4>(layout, codes, factors, sums),
        (Side::Value, _) => sum_values::<L, 8, true, 1>(layout, codes, factors, sums),
    }
}

#[cfg(test)]
mod tests;
