//! Dual-axis variance normalisation (arXiv 2606.03458, Algorithm 1).
//!
//! Alternately divides columns and rows by their standard deviation, in log space, and keeps the iterate with the
//! smallest imbalance. A column's std of the scaled matrix is its scale times the std over rows of `m / row scales`, so an iteration is one
//! sweep for the rows and one for the columns, without divisions, and the imbalance's column std is the next iteration's.

use super::elementary::{exp, ln};
use super::lanes::{LANES, lanes_of, min_max, strip_sums};

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
    mean: Vec<f32>,
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
        Self {
            log: zeros.clone(),
            inverse: zeros.clone(),
            raw: zeros.clone(),
            mean: zeros.clone(),
            std: zeros,
        }
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
    #[inline(always)]
    fn measure(&mut self, strips: &[f32], inverse: &[f32]) {
        let length = inverse.len();
        // All means first: they then come from memory, as whole registers.
        for (strip, mean) in strips.chunks_exact(LANES * length).zip(self.mean.chunks_exact_mut(LANES)) {
            mean.copy_from_slice(&strip_sums(strip, inverse, |_, value, inverse| value * inverse));
        }
        for mean in &mut self.mean {
            *mean /= length as f32;
        }
        let lines = self.mean.chunks_exact(LANES).zip(self.raw.chunks_exact_mut(LANES));
        for (strip, (mean, raw)) in strips.chunks_exact(LANES * length).zip(lines) {
            let mean = lanes_of(mean);
            raw.copy_from_slice(&strip_sums(strip, inverse, |lane, value, inverse| {
                let deviation = value * inverse - mean[lane];
                deviation * deviation
            }));
        }
        for raw in &mut self.raw {
            *raw = (*raw / (length - 1) as f32).sqrt();
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
