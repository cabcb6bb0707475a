//! Random rows, and tensors over vectors.

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
