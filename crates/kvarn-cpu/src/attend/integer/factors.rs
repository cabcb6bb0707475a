//! What codes are multiplied by: 16-bit integers, as two signed bytes each, in the order of the codes.
//!
//! Codes of a matrix are summed over its quantised rows, 16 of which meet in a fragment (`kvarn::record::CodeOrder`).
//! Here rows are in *dword order*: block of 16 rows by block, and within it by c, then e, then k half: the four rows whose
//! codes share a 32-bit lane lie side by side, as codes do once they are unpacked.

use kvarn::record::MatrixLayout;

/// A factor is `BASE · high + low`, both above -128.
pub(super) const BASE: u32 = 254;
/// The largest factor: half a `BASE` more would make 128 of its high part.
const LARGEST: f32 = 127.0 * BASE as f32 + 126.0;

/// Row, within its block, at each place of the dword order: `8 · k half + 2 c + e` at `4 c + 2 e + k half`.
const ROWS: [usize; 16] = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15];

/// Parameters of a record's matrix in float32.
#[derive(Debug, Default)]
pub(super) struct Parameters {
    /// `[rows]`, in dword order.
    pub row_scale: Vec<f32>,
    /// `[rows]`, in dword order.
    pub row_zero: Vec<f32>,
    /// `[columns]`, in their own order.
    pub column_scale: Vec<f32>,
    stored: Vec<f32>,
}

impl Parameters {
    #[inline(always)]
    pub(super) fn read(&mut self, layout: &MatrixLayout, record: &[u8]) {
        for (range, out) in [(&layout.row_scale, &mut self.row_scale), (&layout.row_zero, &mut self.row_zero)]
        {
            to_float32(&record[range.clone()], &mut self.stored);
            out.resize(layout.rows, 0.0);
            // Stored by c, then block, k half, e.
            let blocks = layout.rows / 16;
            for (c, stored) in self.stored.chunks_exact(4 * blocks).enumerate() {
                for (four, block) in stored.chunks_exact(4).zip(out.chunks_exact_mut(16)) {
                    block[4 * c..4 * c + 4].copy_from_slice(&[four[0], four[2], four[1], four[3]]);
                }
            }
        }
        to_float32(&record[layout.column_scale.clone()], &mut self.stored);
        self.column_scale.resize(layout.columns, 0.0);
        // Stored by g, then block, half of the block.
        let blocks = layout.columns / 16;
        for (g, stored) in self.stored.chunks_exact(2 * blocks).enumerate() {
            for (two, block) in stored.chunks_exact(2).zip(self.column_scale.chunks_exact_mut(16)) {
                (block[g], block[8 + g]) = (two[0], two[1]);
            }
        }
    }
}

/// Finite halves as float32.
#[inline(always)]
fn to_float32(bytes: &[u8], out: &mut Vec<f32>) {
    // 2^112: from the bias of a half's exponent to that of a float32; exact for subnormal halves too.
    const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
    out.resize(bytes.len() / 2, 0.0);
    for (half, out) in bytes.chunks_exact(2).zip(out) {
        let bits = u32::from(u16::from_le_bytes([half[0], half[1]]));
        let size = f32::from_bits((bits & 0x7FFF) << 13) * REBIAS;
        *out = f32::from_bits(size.to_bits() | (bits & 0x8000) << 16);
    }
}

/// The factors of one column of a product.
#[derive(Debug, Default)]
pub(super) struct Factors {
    /// `[rows]` of high parts, then of low parts: signed bytes in dword order.
    pub bytes: Vec<u8>,
    /// What a unit of a factor stands for.
    pub unit: f32,
    /// Sum over rows of what is multiplied, times what the middle of the codes decodes to.
    pub zero: f32,
    /// Sum of the factors.
    pub sum: i32,
    values: Vec<f32>,
}

impl Factors {
    /// Of `x` `[rows]`; false if they are not finite. Codes will count from `middle`: sums of them then do not nearly cancel
    /// against the zero points, which would make more of the rounding of factors.
    #[inline(always)]
    pub(super) fn make(&mut self, x: &[f32], parameters: &Parameters, middle: f32) -> bool {
        let rows = x.len();
        self.values.resize(rows, 0.0);
        let mut zeros = [0.0_f32; 16];
        let mut largest = [0.0_f32; 16];
        let blocks = self.values.chunks_exact_mut(16).zip(x.chunks_exact(16));
        let parameters = parameters.row_scale.chunks_exact(16).zip(parameters.row_zero.chunks_exact(16));
        for ((values, x), (scale, zero)) in blocks.zip(parameters) {
            let mut in_dwords = [0.0; 16];
            for at in 0..16 {
                in_dwords[at] = x[ROWS[at]];
            }
            for at in 0..16 {
                values[at] = in_dwords[at] * scale[at];
                zeros[at] += in_dwords[at] * (zero[at] + middle * scale[at]);
                // NaN is lost here, and found in the zeros, as a row's x is in both.
                largest[at] = largest[at].max(values[at].abs());
            }
        }
        self.zero = sum(zeros);
        let largest = largest.into_iter().fold(0.0, f32::max);
        if !(self.zero.is_finite() && largest.is_finite()) {
            return false;
        }
        self.quantize(largest);
        true
    }

    /// Makes factors of what the rounding of these left: products with them are to be added.
    #[inline(always)]
    pub(super) fn refine(&mut self) {
        let (high, low) = self.bytes.split_at(self.values.len());
        let mut largest = 0.0_f32;
        for ((value, &high), &low) in self.values.iter_mut().zip(high).zip(low) {
            let factor = BASE as i32 * i32::from(high as i8) + i32::from(low as i8);
            *value -= factor as f32 * self.unit;
            largest = largest.max(value.abs());
        }
        self.zero = 0.0;
        self.quantize(largest);
    }

    /// Of values none of which is larger than `largest`.
    #[inline(always)]
    fn quantize(&mut self, largest: f32) {
        let rows = self.values.len();
        // Where all are zeros, or so small that their inverse is infinite, nothing is left of them.
        let inverse = LARGEST / largest;
        let inverse = if inverse.is_finite() { inverse } else { 0.0 };
        self.unit = largest / LARGEST;
        self.bytes.resize(2 * rows, 0);
        let (high, low) = self.bytes.split_at_mut(rows);
        self.sum = 0;
        for ((value, high), low) in self.values.iter().zip(high).zip(low) {
            let factor = nearest(value * inverse);
            let upper = nearest(value * inverse * (1.0 / BASE as f32));
            self.sum += factor;
            *high = upper as u8;
            *low = (factor - BASE as i32 * upper) as u8;
        }
    }

    /// The dwords of a block, high or low parts.
    #[inline(always)]
    pub(super) fn block(&self, low: bool, block: usize) -> &[u8; 16] {
        let rows = self.bytes.len() / 2;
        self.bytes[usize::from(low) * rows + 16 * block..][..16].try_into().expect("16 bytes")
    }
}

/// The nearest integer, below 2^22 in size, ties to even: as adding 1.5 · 2^23 leaves it.
#[inline(always)]
fn nearest(value: f32) -> i32 {
    const ROUND: f32 = 12_582_912.0;
    (value + ROUND).to_bits() as i32 - ROUND.to_bits() as i32
}

#[inline(always)]
fn sum(mut lanes: [f32; 16]) -> f32 {
    let mut width = 8;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}
