//! Softmax in base 2, not yet divided.

use std::ops::Range;

use crate::features::{dispatch, fma};

pub(super) const LOG2_E: f32 = std::f32::consts::LOG2_E;

const LANES: usize = 16;

/// Replaces the logits in `seen` by `2^(logit - max)` and all others by 0; returns the largest logit and the sum.
pub(super) fn softmax(weights: &mut [f32], seen: Range<usize>) -> (f32, f32) {
    let mut result = (f32::NEG_INFINITY, 0.0);
    let (before, after) = (seen.start, seen.end);
    weights[..before].fill(0.0);
    weights[after..].fill(0.0);
    if !seen.is_empty() {
        exponentiate(&mut weights[seen], &mut result);
    }
    result
}

dispatch! {
    /// Softmax numerators of at least one logit.
    fn exponentiate(logits: &mut [f32], result: &mut (f32, f32)) = exponentiate_body
}

#[inline(always)]
fn exponentiate_body<const FMA: bool>(logits: &mut [f32], result: &mut (f32, f32)) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = logits.chunks_exact(LANES);
    for chunk in &mut chunks {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    for (lane, &value) in chunks.remainder().iter().enumerate() {
        lanes[lane] = if value > lanes[lane] { value } else { lanes[lane] };
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = if lanes[lane + width] > lanes[lane] { lanes[lane + width] } else { lanes[lane] };
        }
        width /= 2;
    }
    let max = lanes[0];
    // Only a logit of -inf (a query of the caller's) can make the largest -inf: every weight is then NaN or 0.
    let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let mut sums = [0.0; LANES];
    let mut chunks = logits.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for lane in 0..LANES {
            chunk[lane] = exp2_lane::<FMA>(chunk[lane] - base);
            sums[lane] += chunk[lane];
        }
    }
    for (lane, value) in chunks.into_remainder().iter_mut().enumerate() {
        *value = exp2_lane::<FMA>(*value - base);
        sums[lane] += *value;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    *result = (max, sums[0]);
}

/// Natural logits to capped logits in base 2.
pub(super) fn softcap(logits: &mut [f32], cap: f32) {
    for logit in logits {
        *logit = cap * (*logit / cap).tanh() * LOG2_E;
    }
}

/// `2^x` for `x ≤ 0`, to 2 ulp; 0 below the normal range; NaN for NaN.
#[inline]
pub(super) fn exp2(x: f32) -> f32 {
    exp2_lane::<false>(x)
}

/// Splits off the nearest integer and evaluates a polynomial on [-1/2, 1/2]: of those of degree 5 that are 1 at 0, the one
/// whose largest relative error there is the smallest, 1e-7.
#[inline(always)]
fn exp2_lane<const FMA: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    #[allow(clippy::approx_constant)] // near ln 2, and not it
    const C: [f32; 6] = [1.0, 0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];
    // Whose power is 0; written so that NaN passes.
    let clamped = if x < -126.0 { -127.0 } else { x };
    let rounded = clamped + ROUND;
    let rest = clamped - (rounded - ROUND);
    let mut value = C[5];
    for c in C[..5].iter().rev() {
        value = fma::<FMA>(value, rest, *c);
    }
    // The integer lies in the lowest bits; a conversion, which saturates, would be done lane by lane.
    let power = f32::from_bits((rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23);
    value * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp2_is_accurate() {
        for step in 0..=1_260_000 {
            let x = -(step as f32) / 10_000.0;
            let exact = f64::from(x).exp2();
            for value in [exp2_lane::<true>(x), exp2_lane::<false>(x)] {
                assert!((f64::from(value) - exact).abs() <= 2.5e-7 * exact, "{x}");
            }
        }
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(-127.0), 0.0);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn nothing_outside_the_range_counts() {
        for length in 0..40 {
            let mut weights = vec![1e30; 64];
            weights[5..5 + length].fill(3.0);
            let (max, sum) = softmax(&mut weights, 5..5 + length);
            assert_eq!(sum, length as f32);
            assert_eq!(max, if length == 0 { f32::NEG_INFINITY } else { 3.0 });
            assert_eq!(weights.iter().sum::<f32>(), length as f32);
        }
    }
}
