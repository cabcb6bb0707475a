//! What is appended: random rows, plain ones and awkward ones, and what a pool must make of them.

use fastrand::Rng;
use half::{bf16, f16};
use kvarn::codec::{EncodeCounts, Rotation, SlotType, finite, round_to_slot};
use kvarn::{DType, Saturation};
use kvarn_cpu::TensorRef;

/// Keys or values of one layer of a step: `[tokens, kv_heads, head_dim]`.
pub(crate) struct Tensor {
    dtype: DType,
    shape: [usize; 3],
    bytes: Vec<u8>,
    values: Vec<f32>,
}

/// Keys and values of one layer of a step.
pub(crate) struct Rows {
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    /// Whether they come rotated.
    pub(crate) rotated: bool,
}

impl Rows {
    pub(crate) fn random(dtype: DType, shape: [usize; 3], random: &mut Rng) -> Self {
        Self {
            k: Tensor::random(dtype, shape, random),
            v: Tensor::random(dtype, shape, random),
            rotated: random.u8(..4) == 0,
        }
    }
}

impl Tensor {
    fn random(dtype: DType, shape: [usize; 3], random: &mut Rng) -> Self {
        let mut values: Vec<f32> = (0..shape.iter().product()).map(|_| random.f32() * 4.0 - 2.0).collect();
        let place = (!values.is_empty()).then(|| random.usize(..values.len()));
        match (random.u16(..512), place) {
            // An offset far above the spread, as K with a bias has.
            (0, _) => values.iter_mut().for_each(|value| *value += 40.0),
            (1, _) => values.fill(0.0),
            // Beyond the range of half once rotated.
            (2, _) => values.iter_mut().for_each(|value| *value *= 3e4),
            (3, Some(place)) => {
                values[place] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.usize(..3)];
            }
            (4, Some(place)) => values[place] = 1e30,
            _ => {}
        }
        let mut bytes = Vec::with_capacity(values.len() * dtype.bytes());
        for value in &mut values {
            match dtype {
                DType::Float16 => {
                    let stored = f16::from_f32(*value);
                    *value = stored.to_f32();
                    bytes.extend(stored.to_ne_bytes());
                }
                DType::BFloat16 => {
                    let stored = bf16::from_f32(*value);
                    *value = stored.to_f32();
                    bytes.extend(stored.to_ne_bytes());
                }
                DType::Float32 => bytes.extend(value.to_ne_bytes()),
            }
        }
        Self { dtype, shape, bytes, values }
    }

    pub(crate) fn tensor(&self) -> TensorRef<'_> {
        let [_, heads, head_dim] = self.shape;
        let strides = [(heads * head_dim) as isize, head_dim as isize, 1];
        // SAFETY: shape and strides describe the bytes.
        unsafe { TensorRef::from_raw(self.bytes.as_ptr(), self.dtype, self.shape, strides) }
    }

    /// Row `[token, head, :]` as a slot must hold it.
    pub(crate) fn stored_row(
        &self,
        (token, head): (usize, usize),
        rotation: Option<&Rotation>,
        slot: SlotType,
        out: &mut [f32],
    ) -> EncodeCounts {
        let [_, heads, head_dim] = self.shape;
        out.copy_from_slice(&self.values[(token * heads + head) * head_dim..][..head_dim]);
        let mut counts = finite(out);
        if let Some(rotation) = rotation {
            rotation.apply(out);
        }
        let mut saturation = Saturation::default();
        round_to_slot(out, slot, &mut saturation);
        counts.saturated += saturation.0;
        counts
    }
}
