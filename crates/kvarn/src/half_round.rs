//! Rounding to IEEE half with saturation.

use half::f16;

/// Counts values beyond the largest half, which are stored as ±65504.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saturation(
    /// Values that were saturated.
    pub u64,
);

const MAX: f32 = 65504.0;

/// `value` as half, round to nearest even, saturating at ±65504 (counted). `value` must not be NaN.
#[inline(always)]
pub fn round_to_half(value: f32, saturation: &mut Saturation) -> f16 {
    if saturates(value) {
        saturation.0 += 1;
        return f16::from_f32(MAX.copysign(value));
    }
    f16::from_f32(value)
}

/// Whether [`round_to_half`] counts `value`.
#[inline(always)]
pub(crate) fn saturates(value: f32) -> bool {
    value.abs() > MAX
}

/// What [`round_to_half`] stores, as float32: without table or branch, so that loops over it vectorise on every processor.
#[inline(always)]
pub(crate) fn through_half(value: f32) -> f32 {
    /// Smallest normal half.
    const NORMAL: f32 = 1.0 / 16384.0;
    /// Bits of a float32's mantissa that a half lacks.
    const DROPPED: u32 = 13;
    let size = value.abs();
    let size = if size > MAX { MAX } else { size };
    let bits = size.to_bits();
    // Half to even: a tie moves up only to an even mantissa.
    let normal =
        f32::from_bits((bits + (1 << (DROPPED - 1)) - 1 + (bits >> DROPPED & 1)) >> DROPPED << DROPPED);
    // Below, halves are the multiples of 2^-24, which is what float32 resolves at 1/2.
    let subnormal = (size + 0.5) - 0.5;
    (if size < NORMAL { subnormal } else { normal }).copysign(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn through_half_is_the_half_around_every_tie() {
        // Every exponent and sign, with mantissas around each of the ties.
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0xF000, 0xFFFF]
            {
                let value = f32::from_bits(u32::from(high) << 16 | low);
                if value.is_nan() {
                    continue;
                }
                let expected = round_to_half(value, &mut Saturation::default()).to_f32();
                assert_eq!(through_half(value).to_bits(), expected.to_bits(), "{value:e}");
            }
        }
    }

    #[test]
    fn saturates_and_counts() {
        let mut saturation = Saturation::default();
        for (value, expected, count) in
            [(65504.0, 65504.0, 0), (65505.0, 65504.0, 1), (-1e30, -65504.0, 2), (1.0, 1.0, 2)]
        {
            assert_eq!(round_to_half(value, &mut saturation).to_f32(), expected);
            assert_eq!(saturation.0, count);
        }
        assert_eq!(round_to_half(f32::NEG_INFINITY, &mut saturation).to_f32(), -65504.0);
    }
}
