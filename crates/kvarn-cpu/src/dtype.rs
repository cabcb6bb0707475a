//! Reading and writing elements of the types of callers' tensors and of slots.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use kvarn::DType;
use kvarn::codec::SlotType;

use crate::lanes::{Floats, with_floats};

/// Reads `out.len()` elements; no alignment is assumed.
///
/// # Safety
/// `data` points to that many readable elements of type `dtype`.
pub(crate) unsafe fn load(dtype: DType, data: *const u8, out: &mut [f32]) {
    // SAFETY: the caller vouches for the elements.
    convert(dtype, unsafe { std::slice::from_raw_parts(data, out.len() * dtype.bytes()) }, out);
}

/// Elements of type `dtype` to float32.
pub(crate) fn convert(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    with_floats!(convert_with(dtype: DType, bytes: &[u8], out: &mut [f32]) -> ());
}

#[inline(always)]
fn convert_with<F: Floats>(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let size = 16 * dtype.bytes();
    let (blocks, rest) = out.as_chunks_mut::<16>();
    for (bytes, out) in bytes.chunks_exact(size).zip(&mut *blocks) {
        sixteen::<F>(dtype, bytes).store(out);
    }
    if !rest.is_empty() {
        let (mut last, mut converted) = ([0; 64], [0.0; 16]);
        let bytes = &bytes[blocks.len() * size..];
        last[..bytes.len()].copy_from_slice(bytes);
        sixteen::<F>(dtype, &last[..size]).store(&mut converted);
        rest.copy_from_slice(&converted[..rest.len()]);
    }
}

/// Sixteen elements.
#[inline(always)]
pub(crate) fn sixteen<F: Floats>(dtype: DType, bytes: &[u8]) -> F {
    match dtype {
        DType::Float16 => F::load_halves(bytes.try_into().expect("32 bytes")),
        DType::BFloat16 => F::load_bfloats(bytes.try_into().expect("32 bytes")),
        DType::Float32 => F::load_bytes(bytes.try_into().expect("64 bytes")),
    }
}

/// Writes `values`, rounded to nearest even; half values beyond the range become ±65504, never infinite.
///
/// # Safety
/// `data` points to `values.len()` writable elements of type `dtype` that nobody else uses meanwhile.
#[allow(clippy::cast_ptr_alignment)]
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
