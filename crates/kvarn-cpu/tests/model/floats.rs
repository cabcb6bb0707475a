//! Float32 arrays that go to a pool and come back: queries, outputs, expansions.

use fastrand::Rng;
use kvarn::DType;
use kvarn_cpu::{TensorMut, TensorRef};

/// `[rows, heads, head_dim]`.
pub(crate) struct Floats {
    values: Vec<f32>,
    pub(crate) shape: [usize; 3],
}

impl Floats {
    pub(crate) fn zeros(shape: [usize; 3]) -> Self {
        Self { values: vec![0.0; shape.iter().product()], shape }
    }

    /// Values between -2 and 2.
    pub(crate) fn random(shape: [usize; 3], random: &mut Rng) -> Self {
        Self { values: (0..shape.iter().product()).map(|_| random.f32() * 4.0 - 2.0).collect(), shape }
    }

    pub(crate) fn row(&self, row: usize, head: usize) -> &[f32] {
        let [_, heads, head_dim] = self.shape;
        &self.values[(row * heads + head) * head_dim..][..head_dim]
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
