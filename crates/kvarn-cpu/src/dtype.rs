//! Reading and writing elements of the types of callers' tensors and of slots.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use kvarn::DType;
use kvarn::codec::SlotType;

/// Reads `out.len()` elements; no alignment is assumed.
///
/// # Safety
/// `data` points to that many readable elements of type `dtype`.
#[allow(clippy::cast_ptr_alignment)]
pub(crate) unsafe fn load(dtype: DType, data: *const u8, out: &mut [f32]) {
    let count = out.len();
    // SAFETY: the caller vouches for `count` elements; slices are only made of aligned ones.
    unsafe {
        match dtype {
            DType::Float16 if data.cast::<f16>().is_aligned() => {
                std::slice::from_raw_parts(data.cast::<f16>(), count).convert_to_f32_slice(out);
            }
            DType::BFloat16 if data.cast::<bf16>().is_aligned() => {
                std::slice::from_raw_parts(data.cast::<bf16>(), count).convert_to_f32_slice(out);
            }
            DType::Float32 => std::ptr::copy_nonoverlapping(data, out.as_mut_ptr().cast(), 4 * count),
            DType::Float16 => {
                for (index, value) in out.iter_mut().enumerate() {
                    *value = data.cast::<f16>().add(index).read_unaligned().to_f32();
                }
            }
            DType::BFloat16 => {
                for (index, value) in out.iter_mut().enumerate() {
                    *value = data.cast::<bf16>().add(index).read_unaligned().to_f32();
                }
            }
        }
    }
}

/// Writes `values`, rounded to nearest even; half values beyond the range become ±65504, never infinite.
///
/// # Safety
/// `data` points to `values.len()` writable elements of type `dtype` that nobody else uses meanwhile.
#[allow(clippy::cast_ptr_alignment)] // as in `load`
pub(crate) unsafe fn store(dtype: DType, values: &[f32], data: *mut u8) {
    // SAFETY: the caller vouches for the memory; slices are only made of aligned elements, other writes assume no alignment.
    unsafe {
        match dtype {
            DType::Float16 if data.cast::<f16>().is_aligned() => {
                let out = std::slice::from_raw_parts_mut(data.cast::<f16>(), values.len());
                let mut limited = [0.0; 64];
                for (values, out) in values.chunks(64).zip(out.chunks_mut(64)) {
                    let limited = &mut limited[..values.len()];
                    for (limited, value) in limited.iter_mut().zip(values) {
                        *limited = value.clamp(-65504.0, 65504.0);
                    }
                    out.convert_from_f32_slice(limited);
                }
            }
            DType::BFloat16 if data.cast::<bf16>().is_aligned() => {
                let out = std::slice::from_raw_parts_mut(data.cast::<bf16>(), values.len());
                out.convert_from_f32_slice(values);
            }
            DType::Float16 => {
                for (index, &value) in values.iter().enumerate() {
                    let value = f16::from_f32(value.clamp(-65504.0, 65504.0));
                    data.cast::<f16>().add(index).write_unaligned(value);
                }
            }
            DType::BFloat16 => {
                for (index, &value) in values.iter().enumerate() {
                    data.cast::<bf16>().add(index).write_unaligned(bf16::from_f32(value));
                }
            }
            DType::Float32 => std::ptr::copy_nonoverlapping(values.as_ptr().cast(), data, 4 * values.len()),
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
