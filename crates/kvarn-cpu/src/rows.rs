//! Rows of new keys and values, straight to their slot.

use kvarn::codec::SlotType;

use crate::dtype::sixteen;
use crate::lanes::{Floats, with_floats};
use crate::prefetch::{LINE, fetch_to_write};
use kvarn::DType;

/// Elements of a vector.
const LANES: usize = 16;
/// Values beyond it would be counted: of a half, and of an input that was cut, as a rotation keeps the norm.
const LARGEST: f32 = 65504.0;

/// A row to be stored.
pub(crate) struct Row<'a> {
    /// Its elements, `head_dim` of the caller's type.
    pub from: &'a [u8],
    /// Where it goes, `head_dim` of the slot's type.
    pub to: &'a mut [u8],
    /// Whether it is there.
    pub stored: bool,
}

/// Rows before the one whose memory is asked for: rows of different heads and sequences lie far apart, and must not wait one for
/// the other. No more, as they lie multiples of 4 KB apart: the nearest cache has places for eight of these.
const AHEAD: usize = 3;

/// Whether rows of this length are rotated here.
pub(crate) const fn serves(head_dim: usize) -> bool {
    matches!(head_dim, 64 | 128 | 256)
}

/// Rotates rows of one length, which `serves`, and stores them, rounded to the slot's type. Those of which something must be
/// counted, what is not finite or saturates, are not `stored` then, and are to be stored in another way.
///
/// What is stored has the bits that [`kvarn::codec::Rotation`] and [`kvarn::codec::round_to_slot`] give.
pub(crate) fn store_rotated(rows: &mut [Row<'_>], dtype: DType, slot: SlotType) {
    with_floats!(
        store_with(rows: &mut [Row<'_>], dtype: DType, slot: SlotType) -> ()
    );
}

/// The same with one row, to float32. False, and nothing done, if it is not of a length that `serves` or something of it must be
/// counted.
pub(crate) fn load_rotated(from: &[u8], dtype: DType, to: &mut [f32], slot: SlotType) -> bool {
    with_floats!(load_with(from: &[u8], dtype: DType, to: &mut [f32], slot: SlotType) -> bool)
}

#[inline(always)]
fn store_with<F: Floats>(rows: &mut [Row<'_>], dtype: DType, slot: SlotType) {
    let Some(first) = rows.first() else { return };
    match first.to.len() / slot.bytes() {
        64 => store_as::<F, 4>(rows, dtype, slot),
        128 => store_as::<F, 8>(rows, dtype, slot),
        256 => store_as::<F, 16>(rows, dtype, slot),
        other => unreachable!("rows of {other}"),
    }
}

/// With what the loops over rows need to know when they are compiled.
#[inline(always)]
fn store_as<F: Floats, const VECTORS: usize>(rows: &mut [Row<'_>], dtype: DType, slot: SlotType) {
    use DType::{BFloat16, Float16, Float32};
    match (dtype, slot) {
        (Float16, SlotType::Float16) => store::<F, VECTORS>(rows, Float16, SlotType::Float16),
        (BFloat16, SlotType::Float16) => store::<F, VECTORS>(rows, BFloat16, SlotType::Float16),
        (Float32, SlotType::Float16) => store::<F, VECTORS>(rows, Float32, SlotType::Float16),
        (Float16, SlotType::Float32) => store::<F, VECTORS>(rows, Float16, SlotType::Float32),
        (BFloat16, SlotType::Float32) => store::<F, VECTORS>(rows, BFloat16, SlotType::Float32),
        (Float32, SlotType::Float32) => store::<F, VECTORS>(rows, Float32, SlotType::Float32),
    }
}

/// Of two rows at a time one is rotated within vectors and the other across them, which a processor does in different units.
#[inline(always)]
fn store<F: Floats, const VECTORS: usize>(rows: &mut [Row<'_>], dtype: DType, slot: SlotType) {
    for row in rows.iter().take(AHEAD) {
        ask_for(row.to.as_ptr(), row.to.len());
    }
    let mut row = [F::splat(0.0); VECTORS];
    for index in 0..VECTORS {
        row[index] = within(vector::<F>(rows[0].from, dtype, index));
    }
    for at in 0..rows.len() {
        // Checks come first: without branches among them the products of one row and the sums of the other stay side by side.
        let from = rows[(at + 1).min(rows.len() - 1)].from;
        assert_eq!(from.len(), LANES * VECTORS * dtype.bytes());
        let ahead = rows[(at + AHEAD).min(rows.len() - 1)].to.as_ptr();
        let to = &mut *rows[at].to;
        assert_eq!(to.len(), LANES * VECTORS * slot.bytes());
        ask_for(ahead, LANES * VECTORS * slot.bytes());
        // Behind the last row it comes once more, to no end.
        let mut next = [F::splat(0.0); VECTORS];
        for index in 0..VECTORS {
            next[index] = within(vector::<F>(from, dtype, index));
            across::<F, VECTORS>(&mut row, 2 * index);
            across::<F, VECTORS>(&mut row, 2 * index + 1);
        }
        let (scale, mut largest) = (scale::<F, VECTORS>(), F::splat(0.0));
        for index in 0..VECTORS {
            let vector = row[index].mul(scale);
            largest = largest.larger_size(vector);
            match slot {
                SlotType::Float16 => {
                    vector.store_halves((&mut to[32 * index..][..32]).try_into().expect("32 bytes"));
                }
                SlotType::Float32 => {
                    vector.store_bytes((&mut to[64 * index..][..64]).try_into().expect("64 bytes"));
                }
            }
        }
        rows[at].stored = largest.at_most(LARGEST);
        row = next;
    }
}

/// Asks for memory that will be written.
#[inline(always)]
fn ask_for(at: *const u8, bytes: usize) {
    for offset in (0..bytes).step_by(LINE) {
        fetch_to_write(at.wrapping_add(offset));
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
    assert_eq!(from.len(), LANES * VECTORS * dtype.bytes());
    let (mut row, scale, mut largest) = ([F::splat(0.0); VECTORS], scale::<F, VECTORS>(), F::splat(0.0));
    for index in 0..VECTORS {
        row[index] = within(vector::<F>(from, dtype, index));
    }
    for step in 0..2 * VECTORS {
        across::<F, VECTORS>(&mut row, step);
    }
    for index in 0..VECTORS {
        row[index] = row[index].mul(scale);
        largest = largest.larger_size(row[index]);
    }
    if !largest.at_most(LARGEST) {
        return false;
    }
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

/// Vector `index` of a row.
#[inline(always)]
fn vector<F: Floats>(row: &[u8], dtype: DType, index: usize) -> F {
    let bytes = LANES * dtype.bytes();
    sixteen(dtype, &row[bytes * index..][..bytes])
}

// A row is rotated as `kvarn::codec::Rotation::apply` rotates one whose length is a power of two, in the same order: within
// vectors, across them, scaled.

#[inline(always)]
fn within<F: Floats>(vector: F) -> F {
    vector.butterfly::<1>().butterfly::<2>().butterfly::<4>().butterfly::<8>()
}

/// Step `step` of the butterflies across vectors, of which there are fewer than twice as many as vectors.
#[inline(always)]
fn across<F: Floats, const VECTORS: usize>(row: &mut [F; VECTORS], step: usize) {
    let (level, pair) = (step / (VECTORS / 2), step % (VECTORS / 2));
    if level >= VECTORS.ilog2() as usize {
        return;
    }
    let stride = 1 << level;
    let first = pair / stride * 2 * stride + pair % stride;
    let (a, b) = (row[first], row[first + stride]);
    (row[first], row[first + stride]) = (a.add(b), a.sub(b));
}

#[inline(always)]
fn scale<F: Floats, const VECTORS: usize>() -> F {
    F::splat((1.0 / ((LANES * VECTORS) as f64).sqrt()) as f32)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use kvarn::Saturation;
    use kvarn::codec::{Rotation, round_to_slot};

    use super::*;
    use crate::lanes::{Lanes, Plain};

    type Store = fn(&mut [Row<'_>], DType, SlotType);

    fn paths() -> Vec<Store> {
        vec![store_rotated, store_with::<<Plain as Lanes>::Floats>]
    }

    /// Stores rows that lie one after the other; which of them failed.
    fn store(
        path: Store,
        from: &[u8],
        dtype: DType,
        to: &mut [u8],
        head_dim: usize,
        slot: SlotType,
    ) -> Vec<usize> {
        let from = from.chunks_exact(head_dim * dtype.bytes());
        let to = to.chunks_exact_mut(head_dim * slot.bytes());
        let mut rows: Vec<_> = from.zip(to).map(|(from, to)| Row { from, to, stored: false }).collect();
        path(&mut rows, dtype, slot);
        (0..rows.len()).filter(|&row| !rows[row].stored).collect()
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
            for (seed, head_dim) in [64, 128, 256].into_iter().enumerate() {
                for dtype in [DType::Float16, DType::BFloat16, DType::Float32] {
                    for (slot, out) in
                        [(SlotType::Float16, DType::Float16), (SlotType::Float32, DType::Float32)]
                    {
                        for (size, count) in [(1e-6, 1), (1.0, 2), (4000.0, 3), (1.0, 20)] {
                            let values: Vec<f32> =
                                (0..count * head_dim).map(|index| size * value(index, seed)).collect();
                            let from = bytes_of(&values, dtype);
                            let mut to = vec![7; count * head_dim * slot.bytes()];
                            assert!(store(path, &from, dtype, &mut to, head_dim, slot).is_empty());
                            let mut rows = vec![0.0; count * head_dim];
                            crate::dtype::convert(dtype, &from, &mut rows);
                            for row in rows.chunks_exact_mut(head_dim) {
                                Rotation::new(head_dim).apply(row);
                                round_to_slot(row, slot, &mut Saturation::default());
                            }
                            assert_eq!(to, bytes_of(&rows, out), "{head_dim} {dtype:?} {slot:?} {size}");
                            let mut loaded = vec![0.0; head_dim];
                            let row = &from[..head_dim * dtype.bytes()];
                            assert!(load_rotated(row, dtype, &mut loaded, slot));
                            assert_eq!(loaded, rows[..head_dim]);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn other_lengths_are_left_alone() {
        for head_dim in (16..=256).step_by(16) {
            let from = vec![0; 2 * head_dim];
            let mut row = vec![7.0; head_dim];
            let loaded = load_rotated(&from, DType::Float16, &mut row, SlotType::Float16);
            assert_eq!(loaded, serves(head_dim));
            assert_eq!(loaded, row.iter().all(|&value| value == 0.0));
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
                assert!(store(path, &from, DType::Float16, &mut to, 128, SlotType::Float16).is_empty());
            }
            println!("{name}: {:.1} ns a row of 128", start.elapsed().as_secs_f64() * 1e9 / (500.0 * 64.0));
        }
    }

    #[test]
    fn rows_that_must_be_counted_are_named() {
        for path in paths() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e9, 1e38] {
                for at in [0, 1, 63, 127] {
                    let mut values = [0.5; 5 * 128];
                    values[128 + at] = bad;
                    values[4 * 128 + at] = bad;
                    let (from, mut to) = (bytes_of(&values, DType::Float32), vec![7; 5 * 256]);
                    let failed = store(path, &from, DType::Float32, &mut to, 128, SlotType::Float16);
                    assert_eq!(failed, [1, 4], "{bad} {at}");
                    let mut row = [7.0; 128];
                    assert!(!load_rotated(&from[512..1024], DType::Float32, &mut row, SlotType::Float16));
                    assert_eq!(row, [7.0; 128]);
                }
            }
        }
    }
}
