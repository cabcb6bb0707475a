//! Random rows, tensors over vectors, and attention in float64.

use kvarn::DType;
use kvarn_cpu::{TensorMut, TensorRef};

/// Rows of standard-normal-like values, `[rows, heads, head_dim]`.
#[derive(Clone)]
pub(crate) struct Rows {
    pub(crate) values: Vec<f32>,
    pub(crate) shape: [usize; 3],
}

impl Rows {
    pub(crate) fn random(shape: [usize; 3], seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32
        };
        let normal = |_| (0..6).map(|_| uniform()).sum::<f32>() * 1.414 - 4.243;
        Self { values: (0..shape.iter().product()).map(normal).collect(), shape }
    }

    pub(crate) fn zeros(shape: [usize; 3]) -> Self {
        Self { values: vec![0.0; shape.iter().product()], shape }
    }

    pub(crate) fn row(&self, i: usize, j: usize) -> &[f32] {
        &self.values[(i * self.shape[1] + j) * self.shape[2]..][..self.shape[2]]
    }

    fn strides(&self) -> [isize; 3] {
        [(self.shape[1] * self.shape[2]) as isize, self.shape[2] as isize, 1]
    }

    pub(crate) fn tensor(&self) -> TensorRef<'_> {
        // SAFETY: shape and strides describe the vector.
        unsafe {
            TensorRef::from_raw(self.values.as_ptr().cast(), DType::Float32, self.shape, self.strides())
        }
    }

    pub(crate) fn tensor_mut(&mut self) -> TensorMut<'_> {
        let strides = self.strides();
        // SAFETY: shape and strides describe the vector, which is borrowed mutably.
        unsafe { TensorMut::from_raw(self.values.as_mut_ptr().cast(), DType::Float32, self.shape, strides) }
    }
}

/// Attention of one query over `keys` and `values` (index, row), and its log-sum-exp.
pub(crate) fn attend_f64<'a>(
    q: &[f32],
    seen: impl Iterator<Item = (&'a [f32], &'a [f32])>,
    scale: f64,
    softcap: Option<f32>,
    sink: Option<f32>,
) -> (Vec<f64>, f64) {
    let mut logits = Vec::new();
    let mut values = Vec::new();
    for (k, v) in seen {
        let dot: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let logit = dot * scale;
        logits.push(softcap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh()));
        values.push(v);
    }
    let sink = sink.map_or(f64::NEG_INFINITY, f64::from);
    let max = logits.iter().copied().fold(sink, f64::max);
    if max == f64::NEG_INFINITY {
        return (vec![0.0; q.len()], max);
    }
    let weights: Vec<f64> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let sum: f64 = weights.iter().sum::<f64>() + (sink - max).exp();
    let mut out = vec![0.0; q.len()];
    for (weight, v) in weights.iter().zip(values) {
        for (out, v) in out.iter_mut().zip(v) {
            *out += weight / sum * f64::from(*v);
        }
    }
    (out, max + sum.ln())
}
