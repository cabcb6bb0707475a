//! Strips, and reductions with a fixed order, so that results do not depend on how the compiler vectorises.
//!
//! A matrix lies in *strips* of 16 lines: `[lines / 16][length][16]`. A line is a row in row strips and a column in column
//! strips. What is found for each line then takes no sum over the lanes of a register, and a strip of 128 tokens or
//! channels stays in the nearest cache. Every size is a multiple of 16.

pub(super) const LANES: usize = 16;

/// One value of each lane.
pub(super) type Lanes = [f32; LANES];

/// Partial sums along a strip: enough of them to hide the time that an addition takes.
const PARTS: usize = 4;

/// For each lane the sum of `f(lane, value, of)` along a strip; `of` has a value for each step along it.
#[inline(always)]
pub(super) fn strip_sums(strip: &[f32], of: &[f32], f: impl Fn(usize, f32, f32) -> f32) -> Lanes {
    let (mut a, mut b, mut c, mut d) = ([0.0; LANES], [0.0; LANES], [0.0; LANES], [0.0; LANES]);
    for (values, of) in strip.chunks_exact(PARTS * LANES).zip(of.chunks_exact(PARTS)) {
        // Not a loop: the sums must be known to stay in registers.
        add(&mut a, &values[..LANES], |lane, value| f(lane, value, of[0]));
        add(&mut b, &values[LANES..2 * LANES], |lane, value| f(lane, value, of[1]));
        add(&mut c, &values[2 * LANES..3 * LANES], |lane, value| f(lane, value, of[2]));
        add(&mut d, &values[3 * LANES..], |lane, value| f(lane, value, of[3]));
    }
    total(a, b, c, d)
}

/// For each lane the sum of `f(lane, a, b)` along two strips.
#[inline(always)]
pub(super) fn strip_products(a: &[f32], b: &[f32], f: impl Fn(usize, f32, f32) -> f32) -> Lanes {
    let mut parts = ([0.0; LANES], [0.0; LANES], [0.0; LANES], [0.0; LANES]);
    for (a, b) in a.chunks_exact(PARTS * LANES).zip(b.chunks_exact(PARTS * LANES)) {
        add(&mut parts.0, &a[..LANES], |lane, value| f(lane, value, b[lane]));
        add(&mut parts.1, &a[LANES..2 * LANES], |lane, value| f(lane, value, b[LANES + lane]));
        add(&mut parts.2, &a[2 * LANES..3 * LANES], |lane, value| f(lane, value, b[2 * LANES + lane]));
        add(&mut parts.3, &a[3 * LANES..], |lane, value| f(lane, value, b[3 * LANES + lane]));
    }
    total(parts.0, parts.1, parts.2, parts.3)
}

/// For each lane the sum and the sum of squares of `value * of - shift` along a strip.
#[inline(always)]
pub(super) fn strip_moments(strip: &[f32], of: &[f32], shift: &Lanes) -> (Lanes, Lanes) {
    let (mut sum_a, mut sum_b) = ([0.0; LANES], [0.0; LANES]);
    let (mut squares_a, mut squares_b) = ([0.0; LANES], [0.0; LANES]);
    // Two parts: more would not stay in the registers of AVX2.
    for (values, of) in strip.chunks_exact(2 * LANES).zip(of.chunks_exact(2)) {
        add_moments(&mut sum_a, &mut squares_a, &values[..LANES], of[0], shift);
        add_moments(&mut sum_b, &mut squares_b, &values[LANES..], of[1], shift);
    }
    for lane in 0..LANES {
        sum_a[lane] += sum_b[lane];
        squares_a[lane] += squares_b[lane];
    }
    (sum_a, squares_a)
}

#[inline(always)]
fn add_moments(sum: &mut Lanes, squares: &mut Lanes, values: &[f32], of: f32, shift: &Lanes) {
    for lane in 0..LANES {
        let value = values[lane] * of - shift[lane];
        sum[lane] += value;
        squares[lane] += value * value;
    }
}

#[inline(always)]
fn add(sums: &mut Lanes, values: &[f32], f: impl Fn(usize, f32) -> f32) {
    for lane in 0..LANES {
        sums[lane] += f(lane, values[lane]);
    }
}

#[inline(always)]
fn total(a: Lanes, b: Lanes, c: Lanes, d: Lanes) -> Lanes {
    let mut sums = [0.0; LANES];
    for lane in 0..LANES {
        sums[lane] = (a[lane] + b[lane]) + (c[lane] + d[lane]);
    }
    sums
}

/// A copy of 16 values, which the compiler knows to change with no other slice.
#[inline(always)]
pub(super) fn lanes_of(values: &[f32]) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes.copy_from_slice(values);
    lanes
}

/// Repeats 16 values all along a strip, so that what is done with them is done on whole slices.
#[inline(always)]
pub(super) fn repeat(lanes: &Lanes, strip: &mut [f32]) {
    for out in strip.chunks_exact_mut(LANES) {
        out.copy_from_slice(lanes);
    }
}

/// Smallest and largest value of each lane of a strip.
#[inline(always)]
pub(super) fn strip_ranges(strip: &[f32]) -> (Lanes, Lanes) {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for values in strip.chunks_exact(LANES) {
        for lane in 0..LANES {
            low[lane] = if values[lane] < low[lane] { values[lane] } else { low[lane] };
            high[lane] = if values[lane] > high[lane] { values[lane] } else { high[lane] };
        }
    }
    (low, high)
}

/// Smallest and largest value.
#[inline(always)]
pub(super) fn min_max(values: &[f32]) -> (f32, f32) {
    let (low, high) = strip_ranges(values);
    (low.into_iter().fold(f32::INFINITY, f32::min), high.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// Cuts `tile` `[group, head_dim]` into strips of 16 channels, `[head_dim / 16][group][16]`.
#[inline(always)]
pub(super) fn channel_strips(tile: &[f32], head_dim: usize, strips: &mut [f32]) {
    let group = tile.len() / head_dim;
    for (index, strip) in strips.chunks_exact_mut(LANES * group).enumerate() {
        for (out, row) in strip.chunks_exact_mut(LANES).zip(tile.chunks_exact(head_dim)) {
            out.copy_from_slice(&row[index * LANES..][..LANES]);
        }
    }
}

/// Elements of a square.
const SQUARE: usize = LANES * LANES;

/// How squares of 16 × 16 are turned: processors have instructions for it, which compilers do not find.
pub trait Turn {
    /// Column i of `square` becomes row i of `turned`.
    fn floats(square: &[f32; SQUARE], turned: &mut [f32; SQUARE]);

    /// The columns of `square`.
    fn bytes(square: &[u8; SQUARE]) -> [[u8; LANES]; LANES];
}

/// Any processor.
#[derive(Debug)]
pub struct PlainTurn;

impl Turn for PlainTurn {
    #[inline(always)]
    fn floats(square: &[f32; SQUARE], turned: &mut [f32; SQUARE]) {
        for row in 0..LANES {
            for lane in 0..LANES {
                turned[row * LANES + lane] = square[lane * LANES + row];
            }
        }
    }

    #[inline(always)]
    fn bytes(square: &[u8; SQUARE]) -> [[u8; LANES]; LANES] {
        let mut turned = [[0; LANES]; LANES];
        for (row, turned) in turned.iter_mut().enumerate() {
            for (lane, turned) in turned.iter_mut().enumerate() {
                *turned = square[lane * LANES + row];
            }
        }
        turned
    }
}

/// Turns strips of `length` steps into strips of the other dimension.
#[inline(always)]
pub(super) fn turn<T: Turn>(strips: &[f32], length: usize, turned: &mut [f32]) {
    let lines = strips.len() / length;
    for (i, strip) in strips.chunks_exact(LANES * length).enumerate() {
        for (j, square) in strip.as_chunks::<SQUARE>().0.iter().enumerate() {
            let out = &mut turned[j * LANES * lines + i * SQUARE..][..SQUARE];
            T::floats(square, out.try_into().expect("a square"));
        }
    }
}

/// The rows `[16, columns]` of a strip of rows.
#[inline(always)]
pub(super) fn rows_of_strip<T: Turn>(strip: &[u8], rows: &mut [u8]) {
    let columns = strip.len() / LANES;
    for (first, square) in strip.as_chunks::<SQUARE>().0.iter().enumerate() {
        for (row, turned) in rows.chunks_exact_mut(columns).zip(T::bytes(square)) {
            row[first * LANES..][..LANES].copy_from_slice(&turned);
        }
    }
}
