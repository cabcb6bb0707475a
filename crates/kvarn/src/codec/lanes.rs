//! Reductions with a fixed order, so that results do not depend on how the compiler vectorises.
//!
//! A matrix is worked on in blocks of 16 rows, and a row in chunks of 16 columns: every size is a multiple of 16. Partial
//! sums of a block's rows go to memory before they are added up, which keeps 16 lanes together in one register: where a
//! sum over lanes follows directly, the compiler splits them in pairs.

pub(super) const LANES: usize = 16;

/// One value of each lane.
pub(super) type Lanes = [f32; LANES];

/// Sum of `f(row, value, of)` over each row of a block `[16, of.len()]`; `of` has a value for each column.
#[inline(always)]
pub(super) fn row_sums(block: &[f32], of: &[f32], f: impl Fn(usize, f32, f32) -> f32) -> Lanes {
    let mut partial = [[0.0; LANES]; LANES];
    for (row, (partial, values)) in partial.iter_mut().zip(block.chunks_exact(of.len())).enumerate() {
        let mut lanes = [0.0; LANES];
        for (values, of) in values.chunks_exact(LANES).zip(of.chunks_exact(LANES)) {
            for lane in 0..LANES {
                lanes[lane] += f(row, values[lane], of[lane]);
            }
        }
        *partial = lanes;
    }
    sum_each(partial)
}

/// Sum of each row of a square, its 16 values added pairwise.
#[inline(always)]
pub(super) fn sum_each(square: [Lanes; LANES]) -> Lanes {
    reduce(square, |a, b| a + b)
}

/// Adds `f(row, value, of)` over the rows of a block to `sums` `[columns]`, row by row; `of` has a value for each column.
#[inline(always)]
pub(super) fn add_rows(block: &[f32], sums: &mut [f32], of: &[f32], f: impl Fn(usize, f32, f32) -> f32) {
    let columns = sums.len();
    for (chunk, (sums, of)) in sums.chunks_exact_mut(LANES).zip(of.chunks_exact(LANES)).enumerate() {
        let mut lanes = [0.0; LANES];
        lanes.copy_from_slice(sums);
        for (row, values) in block.chunks_exact(columns).enumerate() {
            let values = &values[chunk * LANES..][..LANES];
            for lane in 0..LANES {
                lanes[lane] += f(row, values[lane], of[lane]);
            }
        }
        sums.copy_from_slice(&lanes);
    }
}

/// Smallest and largest value of each row of a block `[16, columns]`.
#[inline(always)]
pub(super) fn row_ranges(block: &[f32], columns: usize) -> (Lanes, Lanes) {
    let (mut low, mut high) = ([[0.0; LANES]; LANES], [[0.0; LANES]; LANES]);
    for ((low, high), values) in low.iter_mut().zip(&mut high).zip(block.chunks_exact(columns)) {
        (*low, *high) = lane_ranges(values);
    }
    (reduce(low, smaller), reduce(high, larger))
}

/// Smallest and largest value.
#[inline(always)]
pub(super) fn min_max(values: &[f32]) -> (f32, f32) {
    let (low, high) = lane_ranges(values);
    (low.into_iter().fold(f32::INFINITY, smaller), high.into_iter().fold(f32::NEG_INFINITY, larger))
}

#[inline(always)]
fn lane_ranges(values: &[f32]) -> (Lanes, Lanes) {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for values in values.chunks_exact(LANES) {
        for lane in 0..LANES {
            low[lane] = smaller(low[lane], values[lane]);
            high[lane] = larger(high[lane], values[lane]);
        }
    }
    (low, high)
}

/// The smaller one; the first where one is NaN.
#[inline(always)]
fn smaller(a: f32, b: f32) -> f32 {
    if b < a { b } else { a }
}

/// The larger one; the first where one is NaN.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Reduces each row of a square pairwise: lane `i` with lane `i + 8`, then with `i + 4`, `i + 2`, `i + 1`.
///
/// Over the whole square as if it were one row: what is added across rows is never looked at. Every step then takes
/// neighbours in memory, which no shuffle could do as cheaply on every processor.
#[inline(always)]
fn reduce(square: [Lanes; LANES], f: impl Fn(f32, f32) -> f32) -> Lanes {
    const ELEMENTS: usize = LANES * LANES;
    let mut values = [0.0; ELEMENTS + LANES];
    values[..ELEMENTS].copy_from_slice(square.as_flattened());
    let mut width = LANES / 2;
    while width > 0 {
        let mut reduced = [0.0; ELEMENTS + LANES];
        for index in 0..ELEMENTS {
            reduced[index] = f(values[index], values[index + width]);
        }
        values = reduced;
        width /= 2;
    }
    let mut first = [0.0; LANES];
    for lane in 0..LANES {
        first[lane] = values[LANES * lane];
    }
    first
}

/// A square with rows and lanes exchanged: one bit of their indices after the other, which takes whole registers.
#[inline(always)]
pub(super) fn transpose(square: [Lanes; LANES]) -> [Lanes; LANES] {
    exchange::<8>(exchange::<4>(exchange::<2>(exchange::<1>(square))))
}

/// Exchanges the bit `STRIDE` of row and lane.
#[inline(always)]
fn exchange<const STRIDE: usize>(square: [Lanes; LANES]) -> [Lanes; LANES] {
    let mut out = square;
    for row in 0..LANES {
        for lane in 0..LANES {
            if row & STRIDE != lane & STRIDE {
                out[row][lane] = square[row ^ STRIDE][lane ^ STRIDE];
            }
        }
    }
    out
}
