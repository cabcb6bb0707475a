//! Dual-axis variance normalisation (arXiv 2606.03458, Algorithm 1).
//!
//! Alternately divides columns and rows by their standard deviation, in log space, and keeps the iterate with the
//! smallest imbalance. A column's std of the scaled matrix is its scale times the std over rows of `m / row scales`, so an iteration is one
//! sweep for the rows and one for the columns, without divisions, and the imbalance's column std is the next iteration's.

use super::elementary::{exp, ln};
use super::lanes::{self, LANES};

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
    /// Mean of each column of `m / row scales`.
    column_mean: Vec<f32>,
}

/// The current iterate's columns, or rows.
#[derive(Clone, Debug)]
struct Axis {
    log: Vec<f32>,
    inverse: Vec<f32>,
    std: Vec<f32>,
}

impl Normalizer {
    pub(super) fn new(rows: usize, columns: usize) -> Self {
        Self {
            column_scale: vec![1.0; columns],
            row_scale: vec![1.0; rows],
            columns: Axis::new(columns),
            rows: Axis::new(rows),
            column_mean: vec![0.0; columns],
        }
    }

    /// Finds the scales of `m` `[rows, columns]`.
    #[inline(always)]
    pub(super) fn run(&mut self, m: &[f32], iterations: usize) {
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
            sweep_rows(m, columns, rows, scaled, &mut self.column_mean);
            sweep_columns(m, columns, rows, &self.column_mean);
            let imbalance = spread(&columns.std) + spread(&rows.std);
            // Ties go to the later iterate; a NaN never wins.
            if !scaled || imbalance <= best {
                best = imbalance;
                self.column_scale.copy_from_slice(&columns.log);
                self.row_scale.copy_from_slice(&rows.log);
            }
        }
        for scale in [&mut self.column_scale, &mut self.row_scale].into_iter().flatten() {
            *scale = exp(*scale);
        }
    }
}

impl Axis {
    fn new(count: usize) -> Self {
        Self { log: vec![0.0; count], inverse: vec![1.0; count], std: vec![0.0; count] }
    }

    #[inline(always)]
    fn reset(&mut self) {
        self.log.fill(0.0);
        self.inverse.fill(1.0);
    }

    /// Adds `ln std` to the log scales.
    #[inline(always)]
    fn update(&mut self) {
        for ((log, inverse), std) in self.log.iter_mut().zip(&mut self.inverse).zip(&self.std) {
            (*log, *inverse) = updated(*log, *std);
        }
    }
}

/// The log scale with `ln std` added, and the inverse of the scale.
#[inline(always)]
fn updated(log: f32, std: f32) -> (f32, f32) {
    let log = (log + ln(std.clamp(1e-3, 1e3))).clamp(LOG_MIN, LOG_MAX);
    (log, exp(-log))
}

/// Finds each row's std, with `update` adds its logarithm to the rows' log scales, and finds the columns' means.
///
/// In blocks of rows, so that all but the first reading of a block comes from the nearest cache.
#[inline(always)]
fn sweep_rows(m: &[f32], columns: &Axis, rows: &mut Axis, update: bool, column_mean: &mut [f32]) {
    let (width, height) = (columns.log.len(), rows.log.len());
    column_mean.fill(0.0);
    let blocks = m.chunks_exact(LANES * width).zip(rows.log.chunks_exact_mut(LANES));
    let blocks = blocks.zip(rows.inverse.chunks_exact_mut(LANES).zip(rows.std.chunks_exact_mut(LANES)));
    for ((block, log), (inverse, std)) in blocks {
        let mut mean = lanes::row_sums(block, &columns.inverse, |_, value, inverse| value * inverse);
        for mean in &mut mean {
            *mean /= width as f32;
        }
        let squares = lanes::row_sums(block, &columns.inverse, |row, value, inverse| {
            let deviation = value * inverse - mean[row];
            deviation * deviation
        });
        for lane in 0..LANES {
            let raw = (squares[lane] / (width - 1) as f32).sqrt();
            if update {
                (log[lane], inverse[lane]) = updated(log[lane], raw * inverse[lane]);
            }
            std[lane] = raw * inverse[lane];
        }
        lanes::add_rows(block, column_mean, &columns.inverse, |row, value, _| value * inverse[row]);
    }
    for mean in column_mean {
        *mean /= height as f32;
    }
}

/// Finds each column's std.
#[inline(always)]
fn sweep_columns(m: &[f32], columns: &mut Axis, rows: &Axis, mean: &[f32]) {
    let (width, height) = (columns.log.len(), rows.log.len());
    columns.std.fill(0.0);
    for (block, inverse) in m.chunks_exact(LANES * width).zip(rows.inverse.chunks_exact(LANES)) {
        lanes::add_rows(block, &mut columns.std, mean, |row, value, mean| {
            let deviation = value * inverse[row] - mean;
            deviation * deviation
        });
    }
    for (std, inverse) in columns.std.iter_mut().zip(&columns.inverse) {
        *std = (*std / (height - 1) as f32).sqrt() * inverse;
    }
}

/// Ratio of the largest to the smallest std.
#[inline(always)]
fn spread(std: &[f32]) -> f32 {
    let (low, high) = lanes::min_max(std);
    high / low.max(1e-8)
}
