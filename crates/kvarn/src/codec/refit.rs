//! Refit: what the stored parameters can repair after rounding (ours).
//!
//! Rounding leaves each token's reconstruction with a random scale error, the one that arXiv 2606.03458 blames for the
//! accumulation of errors in decoding. Prescale keeps small tiles off the normalisation's lower clip, row refit fits scale
//! and zero point to the codes by least squares, and the token scale makes `⟨x̂, x⟩ = ⟨x, x⟩` for every token.

use super::lanes::{LANES, Lanes, repeat, strip_products, strip_sums};
use super::quantize::round_codes;
use crate::Aligned;

/// Rounds of least squares and new codes.
const ROUNDS: usize = 4;

/// The power of two by which a matrix, given in strips, is divided first: its std is then in [4, 8). 1 for a constant
/// matrix. `line` has as many elements as a strip has steps.
#[inline(always)]
pub(super) fn prescale(strips: &[f32], line: &[f32]) -> f32 {
    let count = strips.len() as f32;
    let mut mean = 0.0;
    for strip in strips.chunks_exact(LANES * line.len()) {
        mean += strip_sums(strip, line, |_, x, _| x).iter().sum::<f32>();
    }
    mean /= count;
    let mut squares = 0.0;
    for strip in strips.chunks_exact(LANES * line.len()) {
        squares += strip_sums(strip, line, |_, x, _| (x - mean) * (x - mean)).iter().sum::<f32>();
    }
    let std = (squares / (count - 1.0)).sqrt();
    if std > 0.0 && std.is_finite() { std.log2().floor().exp2() / 4.0 } else { 1.0 }
}

/// Divides by a power of two, which is exact, as is a product with its inverse, and that is quicker.
#[inline(always)]
pub(super) fn divide(values: &mut [f32], power: f32) {
    let inverse = 1.0 / power;
    if inverse.is_finite() {
        for value in values {
            *value *= inverse;
        }
    } else {
        // Below the normal numbers.
        for value in values {
            *value /= power;
        }
    }
}

/// Refits a strip of rows: least squares for scale and zero point given the codes, then codes again; `ROUNDS` times.
#[inline(always)]
pub(super) fn refit_rows(
    strip: &[f32],
    scale: &mut Lanes,
    zero: &mut Lanes,
    max_code: f32,
    codes: &mut [f32],
    repeated: &mut (Aligned<f32>, Aligned<f32>),
) {
    let count = (strip.len() / LANES) as f64;
    let sum_b = products(strip, strip, |_, b| b);
    let mut fits = [true; LANES];
    for _ in 0..ROUNDS {
        // Exact in float32: at most 256 squares of 255, below 2^24.
        let sum_q = strip_products(codes, codes, |_, _, q| q).map(f64::from);
        let sum_qq = strip_products(codes, codes, |_, p, q| p * q).map(f64::from);
        let sum_qb = products(codes, strip, |q, b| q * b);
        for lane in 0..LANES {
            let code_mean = sum_q[lane] / count;
            let variance = sum_qq[lane] / count - code_mean * code_mean;
            let slope = (sum_qb[lane] - code_mean * sum_b[lane]) / count / variance;
            // Written so that a NaN leaves the row as it is.
            fits[lane] &= variance > 1e-6 && slope > 0.0;
            if fits[lane] {
                scale[lane] = slope as f32;
                zero[lane] = (sum_b[lane] / count - slope * code_mean) as f32;
            }
        }
        // A row that was left as it is gets the codes it has.
        repeat(scale, &mut repeated.0);
        repeat(zero, &mut repeated.1);
        round_codes(strip, &repeated.0, &repeated.1, max_code, codes);
    }
}

/// For each lane the sum of `f(a, b)` along two strips, in float64: there products of codes and values are exact, so that
/// the fit needs no second pass for the deviations from the means, and its rounding is that of its results.
#[inline(always)]
fn products(a: &[f32], b: &[f32], f: impl Fn(f64, f64) -> f64) -> [f64; LANES] {
    let mut sums = [0.0; LANES];
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for lane in 0..LANES {
            sums[lane] += f(f64::from(a[lane]), f64::from(b[lane]));
        }
    }
    sums
}

/// Sums for the unbiased scale of one token: `m` the input, `r` its reconstruction.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TokenSums {
    pub mm: f32,
    pub rm: f32,
    pub rr: f32,
}

impl TokenSums {
    /// `⟨m, m⟩ / ⟨r, m⟩`, or `None` where the reconstruction points elsewhere: `⟨r, m⟩ ≤ |m| |r| / 4`.
    #[inline(always)]
    pub(super) fn scale(self) -> Option<f32> {
        let scale = self.mm / self.rm;
        (self.rm > 0.25 * self.mm.sqrt() * self.rr.sqrt() && scale.is_finite()).then_some(scale)
    }
}

/// [`TokenSums`] of 16 tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenLanes {
    mm: Lanes,
    rm: Lanes,
    rr: Lanes,
}

impl TokenLanes {
    /// The sums of a strip of tokens: the input divided by `p`, and what it decodes to.
    #[inline(always)]
    pub(super) fn of(strip: &[f32], p: f32, reconstructed: &[f32]) -> Self {
        Self {
            mm: strip_products(strip, strip, |_, a, b| (a * p) * (b * p)),
            rm: strip_products(reconstructed, strip, |_, r, m| r * (m * p)),
            rr: strip_products(reconstructed, reconstructed, |_, a, b| a * b),
        }
    }

    /// The sums of one token.
    #[inline(always)]
    pub(super) const fn lane(&self, lane: usize) -> TokenSums {
        TokenSums { mm: self.mm[lane], rm: self.rm[lane], rr: self.rr[lane] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn division_by_powers_of_two_is_exact() {
        for exponent in -149..=127 {
            let power = 2_f64.powi(exponent) as f32;
            for size in [1.0, 0.3, -7.0, 1e-20] {
                let value = power * size;
                let mut values = [value; 16];
                divide(&mut values, power);
                assert_eq!(values, [value / power; 16], "{value:e} by 2^{exponent}");
            }
        }
    }
}
