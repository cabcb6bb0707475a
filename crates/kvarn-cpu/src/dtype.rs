//! Element types of callers' tensors.

use half::{bf16, f16};
use kvarn::codec::SlotType;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE half.
    Float16,
    /// bfloat16.
    BFloat16,
    /// float32.
    Float32,
}

impl DType {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Float16 | Self::BFloat16 => 2,
            Self::Float32 => 4,
        }
    }

    /// The slot type in which values of this type are cached.
    pub const fn slot_type(self) -> SlotType {
        match self {
            Self::Float16 | Self::BFloat16 => SlotType::Float16,
            Self::Float32 => SlotType::Float32,
        }
    }

    /// Name, as frameworks write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Float16 => "float16",
            Self::BFloat16 => "bfloat16",
            Self::Float32 => "float32",
        }
    }

    /// Reads `out.len()` elements; no alignment is assumed.
    ///
    /// # Safety
    /// `data` points to that many readable elements of this type.
    #[allow(clippy::cast_ptr_alignment)]
    pub(crate) unsafe fn load(self, data: *const u8, out: &mut [f32]) {
        for (index, value) in out.iter_mut().enumerate() {
            // SAFETY: index < out.len(); the caller vouches for the memory; no alignment is assumed.
            *value = unsafe {
                match self {
                    Self::Float16 => data.cast::<f16>().add(index).read_unaligned().to_f32(),
                    Self::BFloat16 => data.cast::<bf16>().add(index).read_unaligned().to_f32(),
                    Self::Float32 => data.cast::<f32>().add(index).read_unaligned(),
                }
            };
        }
    }

    /// Writes `values`, rounded to nearest even; half values beyond the range become ±65504, never infinite.
    ///
    /// # Safety
    /// `data` points to `values.len()` writable elements of this type that nobody else uses meanwhile.
    #[allow(clippy::cast_ptr_alignment)] // as in `load`
    pub(crate) unsafe fn store(self, values: &[f32], data: *mut u8) {
        for (index, &value) in values.iter().enumerate() {
            // SAFETY: as in `load`.
            unsafe {
                match self {
                    Self::Float16 => {
                        let value = f16::from_f32(value.clamp(-65504.0, 65504.0));
                        data.cast::<f16>().add(index).write_unaligned(value);
                    }
                    Self::BFloat16 => data.cast::<bf16>().add(index).write_unaligned(bf16::from_f32(value)),
                    Self::Float32 => data.cast::<f32>().add(index).write_unaligned(value),
                }
            }
        }
    }
}

/// The element type of a slot.
pub(crate) const fn slot_dtype(slot: SlotType) -> DType {
    match slot {
        SlotType::Float16 => DType::Float16,
        SlotType::Float32 => DType::Float32,
    }
}
