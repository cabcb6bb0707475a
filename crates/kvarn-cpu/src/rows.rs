//! Rows of new keys and values, straight to their slot.

use kvarn::codec::SlotType;

use crate::lanes::{Floats, with_floats};
use kvarn::DType;

/// Elements of a vector.
const LANES: usize = 16;
/// Values beyond it would be counted: of a half, and of an input that was cut, as a rotation keeps the norm.
const LARGEST: f32 = 65504.0;

/// Rotates a row and stores it, rounded to the slot's type. False, and nothing done, if the head dim is not 64, 128 or 256, or
/// if something of the row must be counted: what is not finite or saturates.
///
/// What is stored has the bits that [`kvarn::codec::Rotation`] and [`kvarn::codec::round_to_slot`] give.
pub(crate) fn store_rotated(from: &[u8], dtype: DType, to: &mut [u8], slot: SlotType) -> bool {
    with_floats!(store_with(from: &[u8], dtype: DType, to: &mut [u8], slot: SlotType) -> bool)
}

/// The same to float32.
pub(crate) fn load_rotated(from: &[u8], dtype: DType, to: &mut [f32], slot: SlotType) -> bool {
    with_floats!(load_with(from: &[u8], dtype: DType, to: &mut [f32], slot: SlotType) -> bool)
}

#[inline(always)]
fn store_with<F: Floats>(from: &[u8], dtype: DType, to: &mut [u8], slot: SlotType) -> bool {
    match to.len() / slot.bytes() {
        64 => store::<F, 4>(from, dtype, to, slot),
        128 => store::<F, 8>(from, dtype, to, slot),
        256 => store::<F, 16>(from, dtype, to, slot),
        _ => false,
    }
}

#[inline(always)]
fn load_with<F: Floats>(from: &[u8], dtype: DType, to: &mut [f32], slot: SlotType) -> bool {
    match to.len() {
        64 => load::<F, 4>(from, dtype, to, slot),
        128 => load::<F, 8>(from, dtype, to, slot),
        256 => load::<F, 16>(from, dtype, to, slot),
        _ => false,
    }
}

#[inline(always)]
fn load<F: Floats, const VECTORS: usize>(from: &[u8], dtype: DType, to: &mut [f32], slot: SlotType) -> bool {
    let Some(row) = rotated::<F, VECTORS>(from, dtype) else { return false };
    for index in 0..VECTORS {
        let mut rounded = row[index];
        if slot == SlotType::Float16 {
            let mut halves = [0; 2 * LANES];
            rounded.store_halves(&mut halves);
            rounded = F::load_halves(&halves);
        }
        rounded.store((&mut to[LANES * index..][..LANES]).try_into().expect("16 elements"));
    }
    true
}

/// Whether nothing of a rotated row must be counted.
#[inline(always)]
fn within<F: Floats, const VECTORS: usize>(row: &[F; VECTORS]) -> bool {
    let mut largest = F::splat(0.0);
    for index in 0..VECTORS {
        largest = largest.larger_size(row[index]);
    }
    largest.at_most(LARGEST)
}

/// A row in registers, rotated; none if something of it must be counted.
#[inline(always)]
fn rotated<F: Floats, const VECTORS: usize>(from: &[u8], dtype: DType) -> Option<[F; VECTORS]> {
    assert_eq!(from.len(), LANES * VECTORS * dtype.bytes());
    let mut row = [F::splat(0.0); VECTORS];
    // Loops of a length that is known, so that the row stays in registers.
    match dtype {
        DType::Float16 => {
            for index in 0..VECTORS {
                row[index] = F::load_halves(from[32 * index..][..32].try_into().expect("32 bytes"));
            }
        }
        DType::BFloat16 => {
            for index in 0..VECTORS {
                row[index] = F::load_bfloats(from[32 * index..][..32].try_into().expect("32 bytes"));
            }
        }
        DType::Float32 => {
            for index in 0..VECTORS {
                row[index] = F::load_bytes(from[64 * index..][..64].try_into().expect("64 bytes"));
            }
        }
    }
    rotate::<F, VECTORS>(&mut row);
    within(&row).then_some(row)
}

#[inline(always)]
fn store<F: Floats, const VECTORS: usize>(from: &[u8], dtype: DType, to: &mut [u8], slot: SlotType) -> bool {
    let Some(row) = rotated::<F, VECTORS>(from, dtype) else { return false };
    match slot {
        SlotType::Float16 => {
            for index in 0..VECTORS {
                row[index].store_halves((&mut to[32 * index..][..32]).try_into().expect("32 bytes"));
            }
        }
        SlotType::Float32 => {
            for index in 0..VECTORS {
                let mut values = [0.0; LANES];
                row[index].store(&mut values);
                for (value, to) in values.iter().zip(to[64 * index..][..64].as_chunks_mut::<4>().0) {
                    *to = value.to_le_bytes();
                }
            }
        }
    }
    true
}

/// As [`kvarn::codec::Rotation::apply`] rotates a head dim that is a power of two, in the same order.
#[inline(always)]
fn rotate<F: Floats, const VECTORS: usize>(row: &mut [F; VECTORS]) {
    for vector in &mut *row {
        *vector = vector.butterfly::<1>().butterfly::<2>().butterfly::<4>().butterfly::<8>();
    }
    across::<F, VECTORS, 1>(row);
    across::<F, VECTORS, 2>(row);
    across::<F, VECTORS, 4>(row);
    across::<F, VECTORS, 8>(row);
    let scale = F::splat((1.0 / ((LANES * VECTORS) as f64).sqrt()) as f32);
    for vector in &mut *row {
        *vector = vector.mul(scale);
    }
}

/// Butterflies of vectors `STRIDE` apart.
#[inline(always)]
fn across<F: Floats, const VECTORS: usize, const STRIDE: usize>(row: &mut [F; VECTORS]) {
    if STRIDE >= VECTORS {
        return;
    }
    for index in 0..VECTORS {
        if index & STRIDE == 0 {
            let (a, b) = (row[index], row[index + STRIDE]);
            (row[index], row[index + STRIDE]) = (a.add(b), a.sub(b));
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use kvarn::Saturation;
    use kvarn::codec::{Rotation, round_to_slot};

    use super::*;
    use crate::lanes::{Lanes, Plain};

    type Store = fn(&[u8], DType, &mut [u8], SlotType) -> bool;

    fn paths() -> Vec<Store> {
        vec![store_rotated, store_with::<<Plain as Lanes>::Floats>]
    }

    fn bytes_of(values: &[f32], dtype: DType) -> Vec<u8> {
        match dtype {
            DType::Float16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
            DType::BFloat16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
            DType::Float32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        }
    }

    fn value(index: usize, seed: usize) -> f32 {
        ((index * 7919 + seed * 104_729) % 2003) as f32 / 501.5 - 2.0
    }

    #[test]
    fn rows_have_the_bits_of_the_rotation_and_the_slot() {
        for path in paths() {
            for (seed, head_dim) in [16, 64, 96, 128, 256].into_iter().enumerate() {
                for dtype in [DType::Float16, DType::BFloat16, DType::Float32] {
                    for (slot, out) in
                        [(SlotType::Float16, DType::Float16), (SlotType::Float32, DType::Float32)]
                    {
                        for size in [1e-6, 1.0, 4000.0] {
                            let values: Vec<f32> =
                                (0..head_dim).map(|index| size * value(index, seed)).collect();
                            let from = bytes_of(&values, dtype);
                            let mut to = vec![7; head_dim * slot.bytes()];
                            let stored = path(&from, dtype, &mut to, slot);
                            assert_eq!(stored, [64, 128, 256].contains(&head_dim));
                            if !stored {
                                assert!(to.iter().all(|&byte| byte == 7));
                                continue;
                            }
                            let mut row = vec![0.0; head_dim];
                            // SAFETY: as many elements as the row has.
                            unsafe { crate::dtype::load(dtype, from.as_ptr(), &mut row) };
                            Rotation::new(head_dim).apply(&mut row);
                            round_to_slot(&mut row, slot, &mut Saturation::default());
                            assert_eq!(to, bytes_of(&row, out), "{head_dim} {dtype:?} {slot:?} {size}");
                            let mut loaded = vec![0.0; head_dim];
                            assert!(load_rotated(&from, dtype, &mut loaded, slot));
                            assert_eq!(loaded, row);
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[ignore = "prints times"]
    fn row_time() {
        let values: Vec<f32> = (0..64 * 128).map(|index| value(index, 3)).collect();
        let (from, mut to) = (bytes_of(&values, DType::Float16), vec![0; 64 * 256]);
        for (path, name) in paths().into_iter().zip(["best", "plain"]) {
            let start = std::time::Instant::now();
            for _ in 0..500 {
                for (from, to) in from.chunks_exact(256).zip(to.chunks_exact_mut(256)) {
                    assert!(path(from, DType::Float16, to, SlotType::Float16));
                }
            }
            println!("{name}: {:.1} ns a row of 128", start.elapsed().as_secs_f64() * 1e9 / (500.0 * 64.0));
        }
    }

    #[test]
    fn what_is_to_be_counted_is_left_alone() {
        for path in paths() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e9, 1e38] {
                for at in [0, 1, 63, 127] {
                    let mut values = [0.5; 128];
                    values[at] = bad;
                    let mut to = [7; 256];
                    let from = bytes_of(&values, DType::Float32);
                    assert!(!path(&from, DType::Float32, &mut to, SlotType::Float16), "{bad} {at}");
                    assert_eq!(to, [7; 256]);
                    let mut row = [7.0; 128];
                    assert!(!load_rotated(&from, DType::Float32, &mut row, SlotType::Float16));
                    assert_eq!(row, [7.0; 128]);
                }
            }
        }
    }
}
