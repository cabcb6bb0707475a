//! Products with records in integers: codes are multiplied as they are stored, without a decoded tile.
//!
//! `out[column, m] += column_scale[m] · (unit · Σ_k factor[column, k] · (code[k, m] - middle) + Σ_k x[column, k] · zero[k])`,
//! where a factor is `x · row_scale` in units that make the largest of a column a 16-bit integer, and `zero` what the middle
//! of the codes decodes to. Sums of integers are exact, so every instruction set gives the same; the rounding of a factor is
//! at most a 2^-16 of the largest.

mod ahead;
mod factors;
mod parameters;
mod unpack;

use kvarn::record::MatrixLayout;
use kvarn::{Bits, Side};

use ahead::Ahead;
use factors::{Factors, HIGH};
use parameters::Parameters;
use unpack::{FRAGMENT, unpack, words_at_once};

use super::product::{Matrix, MatrixMut};
use crate::features::Level;
use crate::lanes::{Floats, Lanes, Plain};

/// Error of a logit (base 2, standard deviation) above which the rounding of factors is made good by a second product: where
/// one channel is much larger than the others, or a token of the tile than those that are seen.
const LOGIT_ERROR: f32 = 3e-4;

/// Columns of a product that share a reading of codes: sums of twice as many, in four vectors each, fill the registers.
const TOGETHER: usize = 2;

/// Working memory.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    parameters: Parameters,
    factors: Vec<Factors>,
    codes: Vec<u8>,
    vectors: Vec<[u8; 64]>,
}

/// Whether a product with this matrix of a record is done here.
pub(super) fn serves(layout: &MatrixLayout) -> bool {
    layout.code_order.words().is_multiple_of(words_at_once(layout.code_order.bits().get()))
}

/// `out += x · matrix`, where `serves`; `x` `[columns, rows]`, `out` `[columns, matrix columns]`. False, and nothing done, if
/// something of `x` is not finite. The processor has `level`. `next`: what will be read next.
#[allow(clippy::too_many_arguments)] // the parts of one call
pub(super) fn multiply(
    level: Level,
    layout: &MatrixLayout,
    record: &[u8],
    x: Matrix<'_>,
    out: &mut MatrixMut<'_>,
    columns: usize,
    next: &[u8],
    scratch: &mut Scratch,
) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use crate::lanes::{Avx2, Avx512};
        macro_rules! compiled {
            ($features:literal, $lanes:ty) => {{
                #[target_feature(enable = $features)]
                fn compiled(
                    layout: &MatrixLayout,
                    record: &[u8],
                    x: Matrix<'_>,
                    out: &mut MatrixMut<'_>,
                    columns: usize,
                    next: &[u8],
                    scratch: &mut Scratch,
                ) -> bool {
                    multiply_with::<$lanes>(layout, record, x, out, columns, next, scratch)
                }
                // SAFETY: the features were found on this processor.
                return unsafe { compiled(layout, record, x, out, columns, next, scratch) };
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
    multiply_with::<Plain>(layout, record, x, out, columns, next, scratch)
}

#[inline(always)]
fn multiply_with<L: Lanes>(
    layout: &MatrixLayout,
    record: &[u8],
    x: Matrix<'_>,
    out: &mut MatrixMut<'_>,
    columns: usize,
    next: &[u8],
    scratch: &mut Scratch,
) -> bool {
    let Scratch { parameters, factors, codes, vectors } = scratch;
    let middle = 1 << (layout.code_order.bits().get() - 1);
    parameters.read::<L::Floats>(layout, record, middle as f32);
    factors.resize_with(factors.len().max(columns), Factors::default);
    let factors = &mut factors[..columns];
    for (column, factors) in factors.iter_mut().enumerate() {
        if !factors.make::<L::Floats>(&x.values[column * x.stride..][..layout.rows], parameters) {
            return false;
        }
    }
    codes.resize(layout.rows * layout.columns, 0);
    unpack::<L>(layout, &record[layout.codes.clone()], codes);
    // Factors are off by a 12th of their unit's square, codes from the middle by a 12th of their range's, in the mean.
    let error_of_unit = parameters.largest_column_scale * middle as f32 / 6.0 * (layout.rows as f32).sqrt();
    let logits = layout.code_order.side() == Side::Key;
    let mut ahead = Ahead::new(next, columns.div_ceil(TOGETHER) * layout.columns / 16);
    let codes = Codes { bytes: codes, wide: layout.code_order.bits() == Bits::Eight, middle };
    let scale = &parameters.column_scale[..];
    for (index, factors) in factors.chunks_mut(TOGETHER).enumerate() {
        let stride = out.stride;
        let values = &mut out.values[index * TOGETHER * stride..];
        add_columns::<L>(codes, factors, vectors, scale, &mut MatrixMut { values, stride }, &mut ahead);
        for (column, factors) in factors.iter_mut().enumerate() {
            // Each column by itself: what it gets must not depend on the others.
            if logits && factors.unit * error_of_unit > LOGIT_ERROR {
                factors.refine::<L::Floats>();
                let mut out = MatrixMut { values: &mut values[column * stride..], stride };
                add_columns::<L>(codes, std::slice::from_ref(factors), vectors, scale, &mut out, &mut ahead);
            }
        }
    }
    true
}

/// Codes of a matrix, unpacked.
#[derive(Clone, Copy)]
struct Codes<'a> {
    bytes: &'a [u8],
    /// Whether they need all bits of a byte.
    wide: bool,
    /// From which codes are counted.
    middle: i32,
}

/// Adds to one or two columns of `out` what factors and codes give.
#[inline(always)]
fn add_columns<L: Lanes>(
    codes: Codes<'_>,
    factors: &[Factors],
    vectors: &mut Vec<[u8; 64]>,
    scale: &[f32],
    out: &mut MatrixMut<'_>,
    ahead: &mut Ahead<'_>,
) {
    match (factors, codes.wide) {
        ([a, b], true) => add::<L, true, 2>(codes, [a, b], vectors, scale, out, ahead),
        ([a, b], false) => add::<L, false, 2>(codes, [a, b], vectors, scale, out, ahead),
        ([a], true) => add::<L, true, 1>(codes, [a], vectors, scale, out, ahead),
        ([a], false) => add::<L, false, 1>(codes, [a], vectors, scale, out, ahead),
        _ => unreachable!("{TOGETHER} columns at most"),
    }
}

/// Adds to `C` columns of `out` what factors and codes give.
#[inline(always)]
fn add<L: Lanes, const WIDE: bool, const C: usize>(
    codes: Codes<'_>,
    factors: [&Factors; C],
    vectors: &mut Vec<[u8; 64]>,
    scale: &[f32],
    out: &mut MatrixMut<'_>,
    ahead: &mut Ahead<'_>,
) {
    let middle = codes.middle;
    let blocks = codes.bytes.len() / (16 * scale.len());
    vectors.resize(2 * C * blocks, [0; 64]);
    for (column, factors) in factors.iter().enumerate() {
        factors.spread::<L>(&mut vectors[2 * column..], 2 * C);
    }
    for (at, codes) in codes.bytes.chunks_exact(blocks * FRAGMENT).enumerate() {
        ahead.step();
        let mut high = [[L::splat(0); 4]; C];
        let mut low = [[L::splat(0); 4]; C];
        for (codes, factors) in codes.chunks_exact(FRAGMENT).zip(vectors.chunks_exact(2 * C)) {
            for four in 0..4 {
                let codes = L::load(codes[64 * four..][..64].try_into().expect("64 bytes"));
                for column in 0..C {
                    let (upper, lower) = (&factors[2 * column], &factors[2 * column + 1]);
                    high[column][four] = high[column][four].dot::<WIDE>(codes, L::load(upper));
                    low[column][four] = low[column][four].dot::<WIDE>(codes, L::load(lower));
                }
            }
        }
        let scale = L::Floats::load(scale[16 * at..][..16].try_into().expect("16 elements"));
        for column in 0..C {
            let mut sums = low[column];
            for four in 0..4 {
                sums[four] = sums[four].add(high[column][four].shifted(HIGH));
            }
            let from_middle = L::splat((-middle * factors[column].sum) as u32);
            let sums = L::quarter_sums(sums).add(from_middle).floats();
            let product = sums.mul(L::Floats::splat(factors[column].unit));
            let product = product.add(L::Floats::splat(factors[column].zero)).mul(scale);
            let out = &mut out.values[column * out.stride + 16 * at..][..16];
            let out: &mut [f32; 16] = out.try_into().expect("16 elements");
            product.add(L::Floats::load(out)).store(out);
        }
    }
}

#[cfg(test)]
mod tests;
