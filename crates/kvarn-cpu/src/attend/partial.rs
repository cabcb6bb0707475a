//! Partial attention results and their merge.

use kvarn::Aligned;

use super::softmax::exp2;

/// Softmax numerators over some keys, not yet divided: `out / sum` is the attention output over these keys.
#[derive(Clone, Debug)]
pub(super) struct Partial {
    /// Largest logit of each column, base 2; -inf if it saw no key.
    pub max: Vec<f32>,
    /// Sum of `2^(logit - max)`.
    pub sum: Vec<f32>,
    /// Sum of `2^(logit - max)` times values: `[columns, head_dim]`.
    pub out: Aligned<f32>,
}

impl Partial {
    /// The result over no keys.
    pub(super) fn empty(columns: usize, head_dim: usize) -> Self {
        Self {
            max: vec![f32::NEG_INFINITY; columns],
            sum: vec![0.0; columns],
            out: Aligned::zeros(columns * head_dim),
        }
    }

    /// The result over the keys of both.
    pub(super) fn merge(mut self, other: &Self) -> Self {
        let head_dim = self.out.len() / self.max.len();
        for (column, out) in self.out.chunks_exact_mut(head_dim).enumerate() {
            let max = self.max[column].max(other.max[column]);
            let (ours, theirs) = (weight(self.max[column], max), weight(other.max[column], max));
            self.max[column] = max;
            self.sum[column] = self.sum[column] * ours + other.sum[column] * theirs;
            for (a, b) in out.iter_mut().zip(&other.out[column * head_dim..][..head_dim]) {
                *a = *a * ours + b * theirs;
            }
        }
        self
    }

    /// Lets a logit without a value take part in the softmax.
    pub(super) fn add_logit(&mut self, column: usize, logit: f32) {
        let head_dim = self.out.len() / self.max.len();
        let max = self.max[column].max(logit);
        let (ours, theirs) = (weight(self.max[column], max), weight(logit, max));
        self.max[column] = max;
        self.sum[column] = self.sum[column] * ours + theirs;
        for value in &mut self.out[column * head_dim..][..head_dim] {
            *value *= ours;
        }
    }

    /// Natural logarithm of the sum of `e^logit`, -inf where there was no key.
    pub(super) fn log_sum_exp(&self) -> Vec<f32> {
        // Without a key both terms are -inf, and so is their sum.
        self.max.iter().zip(&self.sum).map(|(max, sum)| (max + sum.log2()) * std::f32::consts::LN_2).collect()
    }

    /// Divided by the sums; zeros where there was no key.
    pub(super) fn into_output(mut self) -> Aligned<f32> {
        let head_dim = self.out.len() / self.max.len();
        for (out, sum) in self.out.chunks_exact_mut(head_dim).zip(&self.sum) {
            let factor = if *sum == 0.0 { 0.0 } else { 1.0 / sum };
            for value in out {
                *value *= factor;
            }
        }
        self.out
    }
}

/// `2^(max - total)`, 0 for a part that saw no key.
fn weight(max: f32, total: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { exp2(max - total) }
}
