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
#[inline]
pub fn round_to_half(value: f32, saturation: &mut Saturation) -> f16 {
    if value.abs() > MAX {
        saturation.0 += 1;
        return f16::from_f32(MAX.copysign(value));
    }
    f16::from_f32(value)
}

#[cfg(test)]
mod tests {
    use super::*;

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
