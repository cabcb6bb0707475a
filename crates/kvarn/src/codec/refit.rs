//! Refit: what the stored parameters can repair after rounding (ours).
//!
//! Rounding leaves each token's reconstruction with a random scale error, the one that arXiv 2606.03458 blames for the
//! accumulation of errors in decoding. Prescale keeps small tiles off the normalisation's lower clip, row refit fits scale
//! and zero point to the codes by least squares, and the token scale makes `⟨x̂, x⟩ = ⟨x, x⟩` for every token.

use super::lanes;
use super::quantize::row_codes;

/// Rounds of least squares and new codes.
const ROUNDS: usize = 4;

/// The power of two by which a matrix is divided first: its std is then in [4, 8). 1 for a constant matrix.
pub(super) fn prescale(m: &[f32]) -> f32 {
    let count = m.len() as f32;
    let mean = lanes::sum(m, |x| x) / count;
    let std = (lanes::sum(m, |x| (x - mean) * (x - mean)) / (count - 1.0)).sqrt();
    if std > 0.0 && std.is_finite() { std.log2().floor().exp2() / 4.0 } else { 1.0 }
}

/// Refits one row: least squares for scale and zero point given the codes, then codes again; `ROUNDS` times.
pub(super) fn refit_row(row: &[f32], scale: &mut f32, zero: &mut f32, max_code: f32, codes: &mut [f32]) {
    let count = row.len() as f32;
    for _ in 0..ROUNDS {
        let code_mean = lanes::sum(codes, |q| q) / count;
        let mean = lanes::sum(row, |b| b) / count;
        let variance = lanes::sum(codes, |q| (q - code_mean) * (q - code_mean)) / count;
        let covariance = lanes::sum_pairs(codes, row, |q, b| (q - code_mean) * (b - mean)) / count;
        let slope = covariance / variance;
        // Written so that a NaN leaves the row as it is.
        if !(variance > 1e-6 && slope > 0.0) {
            return;
        }
        *scale = slope;
        *zero = mean - slope * code_mean;
        row_codes(row, *scale, *zero, max_code, codes);
    }
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
    pub(super) fn scale(self) -> Option<f32> {
        let scale = self.mm / self.rm;
        (self.rm > 0.25 * self.mm.sqrt() * self.rr.sqrt() && scale.is_finite()).then_some(scale)
    }
}
