//! Dual-axis variance normalisation (arXiv 2606.03458, Algorithm 1).
//!
//! Alternately divides columns and rows by their standard deviation, in log space, and keeps the iterate with the
//! smallest imbalance. A column's std of the scaled matrix is its scale times the std over rows of `m / row scales`, so an iteration is one
//! sweep for the rows and one for the columns, without divisions, and the imbalance's column std is the next iteration's.

use super::elementary::{exp, ln};
use super::lanes::{LANES, lanes_of, min_max, strip_moments};

const LOG_MIN: f32 = -0.3;
const LOG_MAX: f32 = 10.0;

/// Scales by which a matrix was divided, and room to find them.
#[derive(Clone, Debug)]
pub(super) struct Normalizer {
    /// Scale of each column, `e^Lc` of the best iterate.
    pub column_scale: Vec<f32>,
    /// Scale of each row, `e^Lr` of the best iterate.
    pub row_scale: Vec<f32>,
    columns: Axis,
    rows: Axis,
}

/// The current iterate's columns, or rows.
#[derive(Clone, Debug)]
struct Axis {
    log: Vec<f32>,
    inverse: Vec<f32>,
    /// std of each line divided by the scales of the other axis only.
    raw: Vec<f32>,
    std: Vec<f32>,
}

impl Normalizer {
    pub(super) fn new(rows: usize, columns: usize) -> Self {
        Self {
            column_scale: vec![1.0; columns],
            row_scale: vec![1.0; rows],
            columns: Axis::new(columns),
            rows: Axis::new(rows),
        }
    }

    /// Finds the scales of a matrix, given in row strips and in column strips.
    #[inline(always)]
    pub(super) fn run(&mut self, row_strips: &[f32], column_strips: &[f32], iterations: usize) {
        let (columns, rows) = (&mut self.columns, &mut self.rows);
        columns.reset();
        rows.reset();
        let mut best = f32::INFINITY;
        for iterate in 0..=iterations {
            // Iterate 0 is the matrix itself.
            let scaled = iterate > 0;
            if scaled {
                columns.update();
            }
            rows.measure(row_strips, &columns.inverse);
            if scaled {
                rows.update();
            }
            columns.measure(column_strips, &rows.inverse);
            let imbalance = columns.spread() + rows.spread();
            // Ties go to the later iterate; a NaN never wins.
            if !scaled || imbalance <= best {
                best = imbalance;
                self.column_scale.copy_from_slice(&columns.log);
                self.row_scale.copy_from_slice(&rows.log);
            }
        }
        for scales in [&mut self.column_scale, &mut self.row_scale] {
            for scale in scales {
                *scale = exp(*scale);
            }
        }
    }
}

impl Axis {
    fn new(count: usize) -> Self {
        let zeros = vec![0.0; count];
        Self { log: zeros.clone(), inverse: zeros.clone(), raw: zeros.clone(), std: zeros }
    }

    #[inline(always)]
    fn reset(&mut self) {
        self.log.fill(0.0);
        self.inverse.fill(1.0);
    }

    /// Adds `ln std` to the log scales, `std` that of the current iterate.
    #[inline(always)]
    fn update(&mut self) {
        for ((log, inverse), raw) in self.log.iter_mut().zip(&mut self.inverse).zip(&self.raw) {
            let std = raw * *inverse;
            *log = (*log + ln(std.clamp(1e-3, 1e3))).clamp(LOG_MIN, LOG_MAX);
            *inverse = exp(-*log);
        }
    }

    /// Finds the std of each line divided by the scales of the other axis only, `inverse` of which are given.
    ///
    /// In one pass, as strips come from the second-level cache: from sums of deviations from an element that is not an outlier. Where
    /// its own deviation from the mean is a few standard deviations, few bits cancel.
    #[inline(always)]
    fn measure(&mut self, strips: &[f32], inverse: &[f32]) {
        let length = inverse.len();
        for (strip, raw) in strips.chunks_exact(LANES * length).zip(self.raw.chunks_exact_mut(LANES)) {
            let [a, b, c] = [0, length / 2, length - 1]
                .map(|step| lanes_of(&strip[step * LANES..][..LANES]).map(|value| value * inverse[step]));
            let mut shift = [0.0; LANES];
            for lane in 0..LANES {
                shift[lane] = a[lane].min(b[lane]).max(a[lane].max(b[lane]).min(c[lane]));
            }
            let (sum, squares) = strip_moments(strip, inverse, &shift);
            for lane in 0..LANES {
                let variance = (squares[lane] - sum[lane] * sum[lane] / length as f32) / (length - 1) as f32;
                // Both sums may overflow: their difference is NaN then.
                let variance = if variance.is_nan() { f32::INFINITY } else { variance };
                raw[lane] = variance.max(0.0).sqrt();
            }
        }
    }

    /// Ratio of the largest to the smallest std of the current iterate.
    #[inline(always)]
    fn spread(&mut self) -> f32 {
        for ((std, raw), inverse) in self.std.iter_mut().zip(&self.raw).zip(&self.inverse) {
            *std = raw * inverse;
        }
        let (low, high) = min_max(&self.std);
        high / low.max(1e-8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Standard deviations that an axis measures of 16 lines, and those of float64.
    fn measured(line: impl Fn(usize, usize) -> f32, inverse: &[f32]) -> [(f32, f64); LANES] {
        let length = inverse.len();
        let strip: Vec<f32> = (0..length * LANES).map(|at| line(at % LANES, at / LANES)).collect();
        let mut axis = Axis::new(LANES);
        axis.measure(&strip, inverse);
        std::array::from_fn(|lane| {
            let scaled: Vec<f64> =
                (0..length).map(|step| f64::from(line(lane, step)) * f64::from(inverse[step])).collect();
            let mean = scaled.iter().sum::<f64>() / length as f64;
            let squares: f64 = scaled.iter().map(|value| (value - mean).powi(2)).sum();
            (axis.raw[lane], (squares / (length - 1) as f64).sqrt())
        })
    }

    fn noise(lane: usize, step: usize) -> f32 {
        ((lane * 7919 + step * 104_729) % 2003) as f32 / 1001.5 - 1.0
    }

    #[test]
    fn one_pass_loses_no_digits() {
        for length in [64, 96, 128, 256] {
            let inverse: Vec<f32> = (0..length).map(|step| 0.5 + (step * 37 % 64) as f32 / 64.0).collect();
            let ones = vec![1.0; length];
            // Offsets far beyond the deviation, and an element far from all others.
            let offset = |lane: usize, step: usize| 100.0 * lane as f32 + noise(lane, step);
            let first = |lane, step| if step == 0 { 1000.0 } else { noise(lane, step) };
            let last = |lane, step| if step == length - 1 { 1000.0 } else { noise(lane, step) };
            for (found, expected) in [
                measured(noise, &inverse),
                measured(offset, &ones),
                measured(first, &inverse),
                measured(last, &inverse),
                measured(|lane, step| 60_000.0 * noise(lane, step), &inverse),
            ]
            .concat()
            {
                // Elements are float32: an offset of 1500 leaves 1e-4 of a deviation of 0.6 at the most.
                assert!(
                    (f64::from(found) - expected).abs() <= 2e-5 * expected,
                    "{length}: {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn constant_lines_have_no_deviation_and_huge_ones_an_infinite_one() {
        for (found, _) in measured(|lane, _| 1e4 + lane as f32, &[1.0; 128]) {
            assert_eq!(found, 0.0);
        }
        for (found, _) in measured(|_, step| if step % 2 == 0 { 3e38 } else { -3e38 }, &[1.0; 128]) {
            assert_eq!(found, f32::INFINITY);
        }
    }
}
