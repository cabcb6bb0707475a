//! Rows of new keys and values, straight to their slot.

use std::marker::PhantomData;
use std::slice::{from_raw_parts, from_raw_parts_mut};

use kvarn::codec::SlotType;

use crate::dtype::sixteen;
use crate::lanes::{Floats, with_floats};
use crate::prefetch::{LINE, fetch_to_write};
use kvarn::DType;

/// Elements of a vector.
const LANES: usize = 16;
/// Values beyond it would be counted: of a half, and of an input that was cut, as a rotation keeps the norm.
const LARGEST: f32 = 65504.0;

/// Rows to be stored, each as far from the one before it.
pub(crate) struct Run<'a> {
    from: *const u8,
    from_step: isize,
    to: *mut u8,
    to_step: isize,
    /// Of a row: of its elements as they come, and as they are stored.
    bytes: (usize, usize),
    count: usize,
    /// Whether they are there, all of them.
    pub stored: bool,
    lifetime: PhantomData<(&'a [u8], &'a mut [u8])>,
}

impl Run<'_> {
    /// `count` rows of `bytes`, at least one, the first of them at `from` and to be stored at `to`; steps are in bytes.
    ///
    /// # Safety
    /// For `'a` all of these rows may be read, and where they go may be written, and no other run nor anybody else refers to that.
    pub(crate) unsafe fn new(
        (from, from_step): (*const u8, isize),
        (to, to_step): (*mut u8, isize),
        bytes: (usize, usize),
        count: usize,
    ) -> Self {
        assert!(count > 0, "a run has at least one row");
        Self { from, from_step, to, to_step, bytes, count, stored: false, lifetime: PhantomData }
    }
}

/// A row of a run.
#[derive(Clone, Copy, Default)]
struct Cursor {
    run: usize,
    row: usize,
}

impl Cursor {
    /// The row behind it; behind the last one, this again.
    #[inline(always)]
    fn next(self, runs: &[Run<'_>]) -> Self {
        if self.row + 1 < runs[self.run].count {
            Self { row: self.row + 1, ..self }
        } else if self.run + 1 < runs.len() {
            Self { run: self.run + 1, row: 0 }
        } else {
            self
        }
    }

    #[inline(always)]
    fn from(self, runs: &[Run<'_>]) -> *const u8 {
        let run = &runs[self.run];
        run.from.wrapping_offset(self.row as isize * run.from_step)
    }

    #[inline(always)]
    fn to(self, runs: &[Run<'_>]) -> *mut u8 {
        let run = &runs[self.run];
        run.to.wrapping_offset(self.row as isize * run.to_step)
    }
}

/// Rows before the one whose memory is asked for: rows of different heads and sequences lie far apart, and must not wait one for
/// the other. No more, as they lie multiples of 4 KB apart: the nearest cache has places for eight of these.
const AHEAD: usize = 3;

/// Whether rows of this length are rotated here.
pub(crate) const fn serves(head_dim: usize) -> bool {
    matches!(head_dim, 64 | 128 | 256)
}

/// Rotates rows of `head_dim` elements, which `serves`, and stores them, rounded to the slot's type. A run in which something
/// must be counted, what is not finite or saturates, is not `stored` then, and is to be stored in another way.
///
/// What is stored has the bits that [`kvarn::codec::Rotation`] and [`kvarn::codec::round_to_slot`] give.
pub(crate) fn store_rotated(runs: &mut [Run<'_>], head_dim: usize, dtype: DType, slot: SlotType) {
    with_floats!(
        store_with(runs: &mut [Run<'_>], head_dim: usize, dtype: DType, slot: SlotType) -> ()
    );
}

/// The same with one row, to float32. False, and nothing done, if it is not of a length that `serves` or something of it must be
/// counted.
pub(crate) fn load_rotated(from: &[u8], dtype: DType, to: &mut [f32], slot: SlotType) -> bool {
    with_floats!(load_with(from: &[u8], dtype: DType, to: &mut [f32], slot: SlotType) -> bool)
}

#[inline(always)]
fn store_with<F: Floats>(runs: &mut [Run<'_>], head_dim: usize, dtype: DType, slot: SlotType) {
    if runs.is_empty() {
        return;
    }
    match head_dim {
        64 => store_as::<F, 4>(runs, dtype, slot),
        128 => store_as::<F, 8>(runs, dtype, slot),
        256 => store_as::<F, 16>(runs, dtype, slot),
        other => unreachable!("rows of {other}"),
    }
}

/// With what the loops over rows need to know when they are compiled.
#[inline(always)]
fn store_as<F: Floats, const VECTORS: usize>(runs: &mut [Run<'_>], dtype: DType, slot: SlotType) {
    use DType::{BFloat16, Float16, Float32};
    match (dtype, slot) {
        (Float16, SlotType::Float16) => store::<F, VECTORS>(runs, Float16, SlotType::Float16),
        (BFloat16, SlotType::Float16) => store::<F, VECTORS>(runs, BFloat16, SlotType::Float16),
        (Float32, SlotType::Float16) => store::<F, VECTORS>(runs, Float32, SlotType::Float16),
        (Float16, SlotType::Float32) => store::<F, VECTORS>(runs, Float16, SlotType::Float32),
        (BFloat16, SlotType::Float32) => store::<F, VECTORS>(runs, BFloat16, SlotType::Float32),
        (Float32, SlotType::Float32) => store::<F, VECTORS>(runs, Float32, SlotType::Float32),
    }
}

/// Of two rows at a time one is rotated within vectors and the other across them, which a processor does in different units.
#[inline(always)]
fn store<F: Floats, const VECTORS: usize>(runs: &mut [Run<'_>], dtype: DType, slot: SlotType) {
    let (from_bytes, to_bytes) = (LANES * VECTORS * dtype.bytes(), LANES * VECTORS * slot.bytes());
    assert!(runs.iter().all(|run| run.bytes == (from_bytes, to_bytes)), "rows of {VECTORS} vectors");
    let (mut next, mut ahead) = (Cursor::default(), Cursor::default());
    for _ in 0..AHEAD {
        ask_for(ahead.to(runs), to_bytes);
        ahead = ahead.next(runs);
    }
    let scale = scale::<F, VECTORS>();
    // SAFETY: `Run::new`'s caller vouched for rows of these bytes.
    let mut row = load_within::<F, VECTORS>(unsafe { from_raw_parts(next.from(runs), from_bytes) }, dtype);
    for run in 0..runs.len() {
        let mut largest = F::splat(0.0);
        for index in 0..runs[run].count {
            // Branches come first: without any among them the products of one row and the sums of the other stay side by side.
            next = next.next(runs);
            let to = Cursor { run, row: index }.to(runs);
            // SAFETY: as above.
            let (from, to) =
                unsafe { (from_raw_parts(next.from(runs), from_bytes), from_raw_parts_mut(to, to_bytes)) };
            ask_for(ahead.to(runs), to_bytes);
            ahead = ahead.next(runs);
            // Behind the last row it comes once more, to no end.
            let mut following = [F::splat(0.0); VECTORS];
            for index in 0..VECTORS {
                following[index] = within(vector::<F>(from, dtype, index));
                across::<F, VECTORS>(&mut row, 2 * index);
                across::<F, VECTORS>(&mut row, 2 * index + 1);
            }
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
            row = following;
        }
        runs[run].stored = largest.at_most(LARGEST);
    }
}

/// A row, rotated within its vectors.
#[inline(always)]
fn load_within<F: Floats, const VECTORS: usize>(from: &[u8], dtype: DType) -> [F; VECTORS] {
    let mut row = [F::splat(0.0); VECTORS];
    for index in 0..VECTORS {
        row[index] = within(vector::<F>(from, dtype, index));
    }
    row
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
    let (scale, mut largest) = (scale::<F, VECTORS>(), F::splat(0.0));
    let mut row = load_within::<F, VECTORS>(from, dtype);
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

    type Store = fn(&mut [Run<'_>], usize, DType, SlotType);

    fn paths() -> Vec<Store> {
        vec![store_rotated, store_with::<<Plain as Lanes>::Floats>]
    }

    /// Stores rows that lie one after the other, in runs of these lengths, every second one from its end; which runs failed.
    fn store(
        path: Store,
        from: &[u8],
        dtype: DType,
        to: &mut [u8],
        (head_dim, slot): (usize, SlotType),
        counts: &[usize],
    ) -> Vec<usize> {
        let (from_bytes, to_bytes) = (head_dim * dtype.bytes(), head_dim * slot.bytes());
        let rows: usize = counts.iter().sum();
        assert_eq!((from.len(), to.len()), (rows * from_bytes, rows * to_bytes));
        let (mut runs, mut first) = (vec![], 0);
        for (index, &count) in counts.iter().enumerate() {
            let (start, sign) = if index % 2 == 0 { (first, 1) } else { (first + count - 1, -1) };
            let from = from[start * from_bytes..].as_ptr();
            let to = to[start * to_bytes..].as_mut_ptr();
            // SAFETY: rows of the two slices, each once.
            runs.push(unsafe {
                Run::new(
                    (from, sign * from_bytes as isize),
                    (to, sign * to_bytes as isize),
                    (from_bytes, to_bytes),
                    count,
                )
            });
            first += count;
        }
        path(&mut runs, head_dim, dtype, slot);
        (0..runs.len()).filter(|&run| !runs[run].stored).collect()
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
                        let runs: [(f32, &[usize]); 5] = [
                            (1e-6, &[1]),
                            (1.0, &[2]),
                            (4000.0, &[3]),
                            (1.0, &[8, 8, 4]),
                            (1.0, &[1, 1, 3, 1]),
                        ];
                        for (size, counts) in runs {
                            let count: usize = counts.iter().sum();
                            let values: Vec<f32> =
                                (0..count * head_dim).map(|index| size * value(index, seed)).collect();
                            let from = bytes_of(&values, dtype);
                            let mut to = vec![7; count * head_dim * slot.bytes()];
                            let failed = store(path, &from, dtype, &mut to, (head_dim, slot), counts);
                            assert!(failed.is_empty());
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
                let failed = store(path, &from, DType::Float16, &mut to, (128, SlotType::Float16), &[8; 8]);
                assert!(failed.is_empty());
            }
            println!("{name}: {:.1} ns a row of 128", start.elapsed().as_secs_f64() * 1e9 / (500.0 * 64.0));
        }
    }

    #[test]
    fn runs_in_which_something_must_be_counted_are_named() {
        for path in paths() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e9, 1e38] {
                for at in [0, 1, 63, 127] {
                    // The first and the last row of a run, and the last of all.
                    let mut values = [0.5; 9 * 128];
                    for row in [1, 5, 8] {
                        values[row * 128 + at] = bad;
                    }
                    let (from, mut to) = (bytes_of(&values, DType::Float32), vec![7; 9 * 256]);
                    let counts = [1, 2, 1, 2, 2, 1];
                    let failed =
                        store(path, &from, DType::Float32, &mut to, (128, SlotType::Float16), &counts);
                    assert_eq!(failed, [1, 3, 5], "{bad} {at}");
                    let mut row = [7.0; 128];
                    assert!(!load_rotated(&from[512..1024], DType::Float32, &mut row, SlotType::Float16));
                    assert_eq!(row, [7.0; 128]);
                }
            }
        }
    }
}
