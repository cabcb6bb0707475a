//! `exp` and `ln` in plain arithmetic, so that loops over them vectorise: float64 inside, hence rounded to float32 once but
//! for about one argument in 10⁵.

/// Adding 1.5·2⁵² to a float64 of magnitude below 2⁵¹ leaves its nearest integer in the lowest bits of the sum.
const ROUND: f64 = 6_755_399_441_055_744.0;

/// Bits of a float64 before the exponent.
const MANTISSA: u32 = 52;

/// `e^x` for |x| ≤ 80.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// `1/i!` for i = 10 … 0: the first term left out is below 3e-13.
    const TERMS: [f64; 11] = [
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    let x = f64::from(x);
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let rest = x - (shifted - ROUND) * std::f64::consts::LN_2;
    let mut sum = 0.0;
    for term in TERMS {
        sum = sum * rest + term;
    }
    // The integer's low bits, moved to where an exponent stands.
    let power = f64::from_bits((shifted.to_bits().wrapping_add(1023)) << MANTISSA);
    (sum * power) as f32
}

/// `ln x` for x in [2⁻⁶⁰, 2⁶⁰].
#[inline(always)]
pub(super) fn ln(x: f32) -> f32 {
    /// `2/i` for i = 13, 11 … 1: the first term left out is below 5e-13.
    const TERMS: [f64; 7] = [2.0 / 13.0, 2.0 / 11.0, 2.0 / 9.0, 2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0, 2.0];
    /// Keeps exponents positive.
    const BIAS: u64 = 64;
    const SQRT_HALF: u64 = std::f64::consts::FRAC_1_SQRT_2.to_bits();
    // x = m · 2^exponent with m in [√½, √2).
    let bits = f64::from(x).to_bits();
    let biased = bits.wrapping_sub(SQRT_HALF).wrapping_add(BIAS << MANTISSA) >> MANTISSA;
    let m = f64::from_bits(bits.wrapping_add(BIAS << MANTISSA).wrapping_sub(biased << MANTISSA));
    let exponent = f64::from_bits(ROUND.to_bits() + biased) - (ROUND + BIAS as f64);
    // ln m = 2 artanh((m - 1) / (m + 1)).
    let s = (m - 1.0) / (m + 1.0);
    let mut sum = 0.0;
    for term in TERMS {
        sum = sum * (s * s) + term;
    }
    (exponent * std::f64::consts::LN_2 + sum * s) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Arguments of which the results are not those of float64, rounded; and that none is off by more than the last bit.
    fn wrong(arguments: impl Iterator<Item = f32>, f: fn(f32) -> f32, exact: fn(f64) -> f64) -> usize {
        arguments
            .filter(|&x| {
                let (got, expected) = (f(x), exact(f64::from(x)) as f32);
                assert!(
                    got.to_bits().abs_diff(expected.to_bits()) <= 1,
                    "{x:e}: {got:e}, expected {expected:e}"
                );
                got != expected
            })
            .count()
    }

    #[test]
    fn exp_is_rounded_once() {
        let arguments = (-1_000_000..=1_000_000).map(|i| i as f32 * 1.1e-5);
        assert!(wrong(arguments, exp, f64::exp) <= 20);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(wrong([-80.0, 80.0, -0.3, 10.0, 1e-30].into_iter(), exp, f64::exp), 0);
    }

    #[test]
    fn ln_is_rounded_once() {
        let arguments =
            (0..1_000_000).map(|i| f32::from_bits(1e-3f32.to_bits() + 167 * i)).filter(|&x| x <= 1e3);
        assert!(wrong(arguments, ln, f64::ln) <= 20);
        assert_eq!(ln(1.0), 0.0);
        // On both sides of where the exponent changes, and of 1.
        for center in [std::f32::consts::FRAC_1_SQRT_2, 1.0, std::f32::consts::SQRT_2] {
            let edges = [center.next_down(), center, center.next_up()];
            assert_eq!(wrong(edges.into_iter(), ln, f64::ln), 0);
        }
        assert_eq!(wrong([1e-3, 1e3].into_iter(), ln, f64::ln), 0);
        assert_eq!(wrong([2f32.powi(-60), 2f32.powi(60)].into_iter(), ln, f64::ln), 0);
    }
}
