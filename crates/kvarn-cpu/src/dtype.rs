//! Reading and writing elements of the types of callers' tensors and of slots.

use half::{bf16, f16};
use kvarn::DType;
use kvarn::codec::SlotType;

/// Reads `out.len()` elements; no alignment is assumed.
///
/// # Safety
/// `data` points to that many readable elements of type `dtype`.
#[allow(clippy::cast_ptr_alignment)]
pub(crate) unsafe fn load(dtype: DType, data: *const u8, out: &mut [f32]) {
    for (index, value) in out.iter_mut().enumerate() {
        // SAFETY: index < out.len(); the caller vouches for the memory.
        *value = unsafe {
            match dtype {
                DType::Float16 => data.cast::<f16>().add(index).read_unaligned().to_f32(),
                DType::BFloat16 => data.cast::<bf16>().add(index).read_unaligned().to_f32(),
                DType::Float32 => data.cast::<f32>().add(index).read_unaligned(),
            }
        };
    }
}

/// Writes `values`, rounded to nearest even; half values beyond the range become ±65504, never infinite.
///
/// # Safety
/// `data` points to `values.len()` writable elements of type `dtype` that nobody else uses meanwhile.
#[allow(clippy::cast_ptr_alignment)] // as in `load`
pub(crate) unsafe fn store(dtype: DType, values: &[f32], data: *mut u8) {
    for (index, &value) in values.iter().enumerate() {
        // SAFETY: as in `load`.
        unsafe {
            match dtype {
                DType::Float16 => {
                    let value = f16::from_f32(value.clamp(-65504.0, 65504.0));
                    data.cast::<f16>().add(index).write_unaligned(value);
                }
                DType::BFloat16 => data.cast::<bf16>().add(index).write_unaligned(bf16::from_f32(value)),
                DType::Float32 => data.cast::<f32>().add(index).write_unaligned(value),
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
