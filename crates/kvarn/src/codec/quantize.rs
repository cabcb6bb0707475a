//! Round to nearest, per row.

/// Adding and subtracting 1.5·2²³ rounds a float32 of magnitude below 2²² to an integer, half to even, with two additions
/// on every processor; `round_ties_even` is a library call where SSE4.1 is not assumed.
const ROUND: f32 = 12_582_912.0;

/// Scale and zero point that map a row's range to the codes.
#[inline(always)]
pub(super) fn range_parameters(low: f32, high: f32, max_code: f32) -> (f32, f32) {
    (((high - low) / max_code).max(1e-10), low)
}

/// Codes as float32 integers: `clamp(round_half_even((b - zero) / scale), 0, max_code)`, with scale and zero point of each
/// element.
#[inline(always)]
pub(super) fn round_codes(b: &[f32], scale: &[f32], zero: &[f32], max_code: f32, codes: &mut [f32]) {
    for (((code, value), scale), zero) in codes.iter_mut().zip(b).zip(scale).zip(zero) {
        let x = (value - zero) / scale;
        // NaN, possible only when a hostile row overflows, compares false and becomes 0.
        let x = if x > 0.0 { x } else { 0.0 };
        let x = if x < max_code { x } else { max_code };
        *code = (x + ROUND) - ROUND;
    }
}

/// Writes codes that are float32 integers to bytes.
#[inline(always)]
pub(super) fn code_bytes(codes: &[f32], bytes: &mut [u8]) {
    for (byte, code) in bytes.iter_mut().zip(codes) {
        // The integer stands in the lowest bits of the mantissa; a saturating cast would cost several instructions.
        *byte = (code + ROUND).to_bits() as u8;
    }
}
