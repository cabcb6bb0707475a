//! Dual-axis variance normalisation (arXiv 2606.03458, Algorithm 1).
//!
//! Alternately divides columns and rows by their standard deviation, in log space, and keeps the iterate with the
//! smallest imbalance. A column's std of the scaled matrix is its scale times the std over rows of `m / row scales`, so an
//! iteration is one pass over the columns and one over the rows, without divisions, and the imbalance's column std is the
//! next iteration's.

use super::lanes;

const LOG_MIN: f32 = -0.3;
const LOG_MAX: f32 = 10.0;

/// Scales by which a matrix was divided, and room to find them.
#[derive(Clone, Debug)]
pub(super) struct Normalizer {
    /// Scale of each column, `e^Lc` of the best iterate.
    pub column_scale: Vec<f32>,
    /// Scale of each row, `e^Lr` of the best iterate.
    pub row_scale: Vec<f32>,
    column_log: Vec<f32>,
    row_log: Vec<f32>,
    column_inverse: Vec<f32>,
    row_inverse: Vec<f32>,
    column_mean: Vec<f32>,
    /// std of each column of the current iterate.
    column_std: Vec<f32>,
    row_std: Vec<f32>,
    scaled_row: Vec<f32>,
}

impl Normalizer {
    pub(super) fn new(rows: usize, columns: usize) -> Self {
        let (r, c) = (vec![0.0; rows], vec![0.0; columns]);
        Self {
            column_scale: c.clone(),
            row_scale: r.clone(),
            column_log: c.clone(),
            row_log: r.clone(),
            column_inverse: c.clone(),
            row_inverse: r.clone(),
            column_mean: c.clone(),
            column_std: c.clone(),
            row_std: r,
            scaled_row: c,
        }
    }

    /// Finds the scales of `m` `[rows, columns]`.
    pub(super) fn run(&mut self, m: &[f32], iterations: usize) {
        self.column_log.fill(0.0);
        self.row_log.fill(0.0);
        for ones in
            [&mut self.column_scale, &mut self.row_scale, &mut self.column_inverse, &mut self.row_inverse]
        {
            ones.fill(1.0);
        }
        self.find_column_std(m);
        self.find_row_std(m);
        let mut best = self.imbalance();
        for _ in 0..iterations {
            update(&mut self.column_log, &mut self.column_inverse, &self.column_std);
            self.find_row_std(m);
            let before = self.row_inverse.clone();
            update(&mut self.row_log, &mut self.row_inverse, &self.row_std);
            for (std, (new, old)) in self.row_std.iter_mut().zip(self.row_inverse.iter().zip(&before)) {
                *std *= new / old;
            }
            self.find_column_std(m);
            let imbalance = self.imbalance();
            // Ties go to the later iterate; a NaN never wins.
            if imbalance <= best {
                best = imbalance;
                for (scale, log) in self.column_scale.iter_mut().zip(&self.column_log) {
                    *scale = log.exp();
                }
                for (scale, log) in self.row_scale.iter_mut().zip(&self.row_log) {
                    *scale = log.exp();
                }
            }
        }
    }

    /// std of each row of the current iterate.
    fn find_row_std(&mut self, m: &[f32]) {
        let columns = self.column_inverse.len();
        for (row, (values, std)) in m.chunks_exact(columns).zip(&mut self.row_std).enumerate() {
            for ((scaled, value), inverse) in self.scaled_row.iter_mut().zip(values).zip(&self.column_inverse)
            {
                *scaled = value * inverse;
            }
            let mean = lanes::sum(&self.scaled_row, |x| x) / columns as f32;
            let squares = lanes::sum(&self.scaled_row, |x| (x - mean) * (x - mean));
            *std = (squares / (columns - 1) as f32).sqrt() * self.row_inverse[row];
        }
    }

    /// std of each column of the current iterate.
    fn find_column_std(&mut self, m: &[f32]) {
        let (columns, rows) = (self.column_inverse.len(), self.row_inverse.len());
        self.column_mean.fill(0.0);
        for (values, inverse) in m.chunks_exact(columns).zip(&self.row_inverse) {
            for (sum, value) in self.column_mean.iter_mut().zip(values) {
                *sum += value * inverse;
            }
        }
        self.column_mean.iter_mut().for_each(|sum| *sum /= rows as f32);
        self.column_std.fill(0.0);
        for (values, inverse) in m.chunks_exact(columns).zip(&self.row_inverse) {
            for ((sum, value), mean) in self.column_std.iter_mut().zip(values).zip(&self.column_mean) {
                let deviation = value * inverse - mean;
                *sum += deviation * deviation;
            }
        }
        for (std, inverse) in self.column_std.iter_mut().zip(&self.column_inverse) {
            *std = (*std / (rows - 1) as f32).sqrt() * inverse;
        }
    }

    /// Ratio of the largest to the smallest std, columns plus rows.
    fn imbalance(&self) -> f32 {
        spread(&self.column_std) + spread(&self.row_std)
    }
}

/// Adds `ln std` to the log scales and refreshes their inverses.
fn update(log: &mut [f32], inverse: &mut [f32], std: &[f32]) {
    for ((log, inverse), std) in log.iter_mut().zip(inverse).zip(std) {
        *log = (*log + std.clamp(1e-3, 1e3).ln()).clamp(LOG_MIN, LOG_MAX);
        *inverse = (-*log).exp();
    }
}

fn spread(std: &[f32]) -> f32 {
    let (low, high) = lanes::min_max(std);
    high / low.max(1e-8)
}
