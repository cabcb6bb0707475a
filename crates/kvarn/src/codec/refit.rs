//! Refit: what the stored parameters can repair after rounding (ours).
//!
//! Rounding leaves each token's reconstruction with a random scale error, the one that arXiv 2606.03458 blames for the
//! accumulation of errors in decoding. Prescale keeps small tiles off the normalisation's lower clip, row refit fits scale
//! and zero point to the codes by least squares, and the token scale makes `⟨x̂, x⟩ = ⟨x, x⟩` for every token.

use super::lanes::{self, LANES, Lanes};
use super::quantize::row_codes;

/// Rounds of least squares and new codes.
const ROUNDS: usize = 4;

/// The power of two by which a matrix is divided first: its std is then in [4, 8). 1 for a constant matrix. `columns` has
/// as many elements as the matrix has columns.
#[inline(always)]
pub(super) fn prescale(m: &[f32], columns: &[f32]) -> f32 {
    let count = m.len() as f32;
    let sum = |f: &dyn Fn(&[f32]) -> Lanes| m.chunks_exact(LANES * columns.len()).flat_map(f).sum::<f32>();
    let mean = sum(&|block| lanes::row_sums(block, columns, |_, x, _| x)) / count;
    let squares = sum(&|block| lanes::row_sums(block, columns, |_, x, _| (x - mean) * (x - mean)));
    let std = (squares / (count - 1.0)).sqrt();
    if std > 0.0 && std.is_finite() { std.log2().floor().exp2() / 4.0 } else { 1.0 }
}

/// Refits 16 rows: least squares for scale and zero point given the codes, then codes again; `ROUNDS` times.
#[inline(always)]
pub(super) fn refit_rows(
    block: &[f32],
    scale: &mut [f32],
    zero: &mut [f32],
    max_code: f32,
    codes: &mut [f32],
) {
    let columns = block.len() / LANES;
    let count = columns as f32;
    let each = |sums: Lanes| sums.map(|sum| sum / count);
    let mean = each(lanes::row_sums(block, &block[..columns], |_, b, _| b));
    let mut fits = [true; LANES];
    for _ in 0..ROUNDS {
        let code_mean = each(lanes::row_sums(codes, &block[..columns], |_, q, _| q));
        let (mut variance, mut covariance) = ([[0.0; LANES]; LANES], [[0.0; LANES]; LANES]);
        let rows = block.chunks_exact(columns).zip(codes.chunks_exact(columns));
        for (row, (block, codes)) in rows.enumerate() {
            let (mut qq, mut qb) = ([0.0; LANES], [0.0; LANES]);
            for (b, q) in block.chunks_exact(LANES).zip(codes.chunks_exact(LANES)) {
                for lane in 0..LANES {
                    let deviation = q[lane] - code_mean[row];
                    qq[lane] += deviation * deviation;
                    qb[lane] += deviation * (b[lane] - mean[row]);
                }
            }
            (variance[row], covariance[row]) = (qq, qb);
        }
        let (variance, covariance) = (each(lanes::sum_each(variance)), each(lanes::sum_each(covariance)));
        let rows = block.chunks_exact(columns).zip(codes.chunks_exact_mut(columns));
        for (row, (block, codes)) in rows.enumerate() {
            let slope = covariance[row] / variance[row];
            // Written so that a NaN leaves the row as it is.
            fits[row] &= variance[row] > 1e-6 && slope > 0.0;
            if fits[row] {
                scale[row] = slope;
                zero[row] = mean[row] - slope * code_mean[row];
                row_codes(block, scale[row], zero[row], max_code, codes);
            }
        }
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
    #[inline(always)]
    pub(super) fn scale(self) -> Option<f32> {
        let scale = self.mm / self.rm;
        (self.rm > 0.25 * self.mm.sqrt() * self.rr.sqrt() && scale.is_finite()).then_some(scale)
    }
}

/// [`TokenSums`] of 16 lanes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TokenLanes {
    pub mm: Lanes,
    pub rm: Lanes,
    pub rr: Lanes,
}

impl TokenLanes {
    /// Adds 16 elements of the input and their reconstruction.
    #[inline(always)]
    pub(super) fn add(&mut self, m: &[f32], r: impl Fn(usize) -> f32) {
        for lane in 0..LANES {
            let (m, r) = (m[lane], r(lane));
            self.mm[lane] += m * m;
            self.rm[lane] += r * m;
            self.rr[lane] += r * r;
        }
    }

    /// The sums of one lane.
    #[inline(always)]
    pub(super) const fn lane(&self, lane: usize) -> TokenSums {
        TokenSums { mm: self.mm[lane], rm: self.rm[lane], rr: self.rr[lane] }
    }
}
