//! Products with records in integers: codes are multiplied as they are stored, without a decoded tile.
//!
//! `out[column, m] += column_scale[m] · (unit · Σ_k factor[column, k] · (code[k, m] - middle) + Σ_k x[column, k] · zero[k])`,
//! where a factor is `x · row_scale` in units that make the largest of a column a 16-bit integer, and `zero` what the middle
//! of the codes decodes to. Sums of integers are exact, so every instruction set gives the same; the rounding of a factor is
//! at most a 2^-16 of the largest.

mod ahead;
mod codes;
mod factors;
mod parameters;
mod turned;

use kvarn::record::MatrixLayout;
use kvarn::{Aligned, Bits, Side};

use ahead::Ahead;
use codes::Codes;
use factors::{Factors, HIGH};
use parameters::Parameters;
use turned::turn;

use super::product::{Matrix, MatrixMut};
use crate::features::Level;
use crate::lanes::{Floats, Lanes, Plain};

/// Error of a logit (base 2, standard deviation) above which the rounding of factors is made good by a second product: where
/// one channel is much larger than the others, or a token of the tile than those that are seen.
const LOGIT_ERROR: f32 = 3e-4;

/// Columns of a product that share a reading of codes: as many as there are query heads for each KV head, most often.
const TOGETHER: usize = 4;

/// `$body` with `$columns`, but `TOGETHER` at most, as the constant `$name`.
macro_rules! with_columns {
    ($columns:expr, $name:ident => $body:expr) => {
        match $columns {
            1 => {
                const $name: usize = 1;
                $body
            }
            2 => {
                const $name: usize = 2;
                $body
            }
            3 => {
                const $name: usize = 3;
                $body
            }
            _ => {
                const $name: usize = TOGETHER;
                $body
            }
        }
    };
}

/// Working memory.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    parameters: Parameters,
    factors: Vec<Factors>,
    refined: Factors,
    codes: Aligned<u8>,
}

/// Whether a product with this matrix of a record is done here.
pub(super) fn serves(layout: &MatrixLayout) -> bool {
    turned::serves(layout.code_order.words())
}

/// `out = x · matrix` of keys, `out += x · matrix` of values, where `serves`; `x` `[columns, rows]`, `out` `[columns, matrix
/// columns]`. False, and nothing done, if something of `x` is not finite. The processor has `level`. `next`: what will be read next.
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
    let Scratch { parameters, factors, refined, codes } = scratch;
    let order = layout.code_order;
    let middle = 1 << (order.bits().get() - 1);
    parameters.read::<L::Floats>(layout, record, middle as f32);
    factors.resize_with(factors.len().max(columns.div_ceil(TOGETHER)), Factors::default);
    for (index, factors) in factors[..columns.div_ceil(TOGETHER)].iter_mut().enumerate() {
        let x = Matrix { values: &x.values[index * TOGETHER * x.stride..], stride: x.stride };
        if !with_columns!(columns - index * TOGETHER, C => factors.make::<L::Floats, C>(x, parameters)) {
            return false;
        }
    }
    codes.resize(layout.codes.len());
    turn::<L>(&record[layout.codes.clone()], codes);
    let (rows, of_columns) = (layout.rows / 16, layout.columns / 16);
    let product = Product {
        codes: match order.side() {
            Side::Key => Codes { turned: codes, step: 1, turn: rows },
            Side::Value => Codes { turned: codes, step: of_columns, turn: 1 },
        },
        middle,
        scale: &parameters.column_scale,
        // Factors are off by a 12th of their unit's square, codes from the middle by a 12th of their range's, in the mean.
        error_of_unit: parameters.largest_column_scale * middle as f32 / 6.0 * (layout.rows as f32).sqrt(),
    };
    let mut ahead = Ahead::new(next, columns.div_ceil(TOGETHER) * of_columns * rows);
    for (index, factors) in factors[..columns.div_ceil(TOGETHER)].iter().enumerate() {
        let (stride, columns) = (out.stride, columns - index * TOGETHER);
        let mut out = MatrixMut { values: &mut out.values[index * TOGETHER * stride..], stride };
        let out = &mut out;
        with_columns!(columns, C => match (order.bits(), order.side()) {
            (Bits::Two, Side::Key) => product.logits::<L, 2, true, C>(factors, refined, out, &mut ahead),
            (Bits::Two, Side::Value) => product.add::<L, 2, false, true, C>(factors, out, &mut ahead),
            (Bits::Three, Side::Key) => product.logits::<L, 3, true, C>(factors, refined, out, &mut ahead),
            (Bits::Three, Side::Value) => product.add::<L, 3, false, true, C>(factors, out, &mut ahead),
            (Bits::Four, Side::Key) => product.logits::<L, 4, true, C>(factors, refined, out, &mut ahead),
            (Bits::Four, Side::Value) => product.add::<L, 4, false, true, C>(factors, out, &mut ahead),
            (Bits::Eight, Side::Key) => product.logits::<L, 8, true, C>(factors, refined, out, &mut ahead),
            (Bits::Eight, Side::Value) => product.add::<L, 8, false, true, C>(factors, out, &mut ahead),
        });
    }
    true
}

/// One side of a product.
struct Product<'a> {
    codes: Codes<'a>,
    /// From which codes are counted.
    middle: i32,
    /// `[matrix columns]`.
    scale: &'a [f32],
    /// The error of a logit for each unit of factors.
    error_of_unit: f32,
}

impl Product<'_> {
    /// Sets logits of `C` columns, with a second product where one needs it.
    #[inline(always)]
    fn logits<L: Lanes, const BITS: usize, const KEY: bool, const C: usize>(
        &self,
        factors: &Factors,
        refined: &mut Factors,
        out: &mut MatrixMut<'_>,
        ahead: &mut Ahead<'_>,
    ) {
        self.add::<L, BITS, KEY, false, C>(factors, out, ahead);
        // For each column by itself: what it gets must not depend on the others. Beside one that gets it, zeros are added.
        let (mut wanted, mut any) = ([false; C], false);
        for column in 0..C {
            wanted[column] = factors.unit[column] * self.error_of_unit > LOGIT_ERROR;
            any |= wanted[column];
        }
        if any {
            factors.refine::<L::Floats, C>(wanted, refined);
            self.add::<L, BITS, KEY, true, C>(refined, out, ahead);
        }
    }

    /// Sets `C` columns of `out` to what factors and codes give, or, where `ADD`, adds it.
    #[inline(always)]
    fn add<L: Lanes, const BITS: usize, const KEY: bool, const ADD: bool, const C: usize>(
        &self,
        factors: &Factors,
        out: &mut MatrixMut<'_>,
        ahead: &mut Ahead<'_>,
    ) {
        let (mut unit, mut zero, mut from_middle) =
            ([L::Floats::splat(0.0); C], [L::Floats::splat(0.0); C], [L::splat(0); C]);
        for column in 0..C {
            unit[column] = L::Floats::splat(factors.unit[column]);
            zero[column] = L::Floats::splat(factors.zero[column]);
            from_middle[column] = L::splat((-self.middle * factors.sum[column]) as u32);
        }
        let scale = self.scale.as_chunks::<16>().0;
        let mut rows: [&mut [[f32; 16]]; C] = std::array::from_fn(|_| <&mut [[f32; 16]]>::default());
        for (out, row) in out.values.chunks_mut(out.stride).zip(&mut rows) {
            *row = &mut out.as_chunks_mut::<16>().0[..scale.len()];
        }
        for at in 0..scale.len() {
            let (mut high, mut low) = ([L::splat(0); C], from_middle);
            for (block, bytes) in factors.bytes.as_chunks::<C>().0.iter().enumerate() {
                ahead.step();
                let fragment = at * self.codes.turn + block * self.codes.step;
                if Codes::shares::<BITS>(fragment) {
                    self.dots::<L, BITS, KEY, true, C>(fragment, bytes, &mut low, &mut high);
                } else {
                    self.dots::<L, BITS, KEY, false, C>(fragment, bytes, &mut low, &mut high);
                }
            }
            let scale = L::Floats::load(&scale[at]);
            for column in 0..C {
                let sums = low[column].add(high[column].shifted(HIGH)).floats();
                let out = &mut rows[column][at];
                let before = if ADD { L::Floats::load(out) } else { L::Floats::splat(0.0) };
                sums.mul_add(unit[column], zero[column]).mul_add(scale, before).store(out);
            }
        }
    }

    /// Adds what factors and codes of one fragment give.
    #[inline(always)]
    fn dots<L: Lanes, const BITS: usize, const KEY: bool, const SHARES: bool, const C: usize>(
        &self,
        fragment: usize,
        bytes: &[[u8; 32]; C],
        low: &mut [L; C],
        high: &mut [L; C],
    ) {
        for c in 0..4 {
            let codes = self.codes.vector::<L, BITS, KEY, SHARES>(fragment, c);
            for column in 0..C {
                low[column] = low[column].dot::<BITS>(codes, four(&bytes[column], 2 * c));
                high[column] = high[column].dot::<BITS>(codes, four(&bytes[column], 2 * c + 1));
            }
        }
    }
}

/// Four of the bytes in all lanes.
#[inline(always)]
fn four<L: Lanes>(bytes: &[u8; 32], index: usize) -> L {
    L::splat(u32::from_le_bytes(bytes[4 * index..][..4].try_into().expect("4 bytes")))
}

#[cfg(test)]
mod tests;
