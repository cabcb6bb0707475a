//! Sixteen 32-bit lanes: what the integer products need of a processor, and a plain implementation.
//!
//! All implementations give the same integers.

/// Sixteen lanes of 32 bits, four bytes each.
pub(super) trait Lanes: Copy {
    /// Lanes that are all `value`.
    fn splat(value: u32) -> Self;

    /// 64 bytes.
    fn load(bytes: &[u8; 64]) -> Self;

    /// Lane i: the four bytes from `4 · order[i]` on.
    #[inline(always)]
    fn permuted(bytes: &[u8; 64], order: &[u32; 16]) -> Self {
        let mut lanes = [0; 64];
        for (lane, &from) in lanes.chunks_exact_mut(4).zip(order) {
            lane.copy_from_slice(&bytes[4 * from as usize..][..4]);
        }
        Self::load(&lanes)
    }

    fn and(self, other: Self) -> Self;

    fn or(self, other: Self) -> Self;

    fn shift_right<const N: u32>(self) -> Self;

    fn shift_left<const N: u32>(self) -> Self;

    /// Adds to each lane of `self` the products of four codes (unsigned bytes, below 64 unless `WIDE`) and four factors
    /// (signed bytes, above -128).
    fn dot<const WIDE: bool>(self, codes: Self, factors: Self) -> Self;

    fn add(self, other: Self) -> Self;

    /// Each lane times `factor`.
    fn times(self, factor: u32) -> Self;

    /// `out[i]`: the sum of the lanes of `vectors[i]`.
    fn sums(vectors: &[Self; 16], out: &mut [i32; 16]);

    /// Element w: the sum of lanes w, w + 4, w + 8 and w + 12.
    fn quarter_sums(self) -> [i32; 4];
}

/// Any processor.
#[derive(Clone, Copy)]
pub(super) struct Plain([u32; 16]);

impl Lanes for Plain {
    #[inline(always)]
    fn splat(value: u32) -> Self {
        Self([value; 16])
    }

    #[inline(always)]
    fn load(bytes: &[u8; 64]) -> Self {
        Self(std::array::from_fn(|lane| {
            u32::from_le_bytes(std::array::from_fn(|byte| bytes[4 * lane + byte]))
        }))
    }

    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] & other.0[lane]))
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] | other.0[lane]))
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self) -> Self {
        Self(self.0.map(|lane| lane >> N))
    }

    #[inline(always)]
    fn shift_left<const N: u32>(self) -> Self {
        Self(self.0.map(|lane| lane << N))
    }

    #[inline(always)]
    fn dot<const WIDE: bool>(self, codes: Self, factors: Self) -> Self {
        Self(std::array::from_fn(|lane| {
            let (codes, factors) = (codes.0[lane].to_le_bytes(), factors.0[lane].to_le_bytes());
            let product = |byte: usize| i32::from(codes[byte]) * i32::from(factors[byte] as i8);
            self.0[lane].wrapping_add((product(0) + product(1) + product(2) + product(3)) as u32)
        }))
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane].wrapping_add(other.0[lane])))
    }

    #[inline(always)]
    fn times(self, factor: u32) -> Self {
        Self(self.0.map(|lane| lane.wrapping_mul(factor)))
    }

    #[inline(always)]
    fn sums(vectors: &[Self; 16], out: &mut [i32; 16]) {
        for (vector, out) in vectors.iter().zip(out) {
            *out = vector.0.iter().fold(0, |sum, &lane| sum.wrapping_add(lane as i32));
        }
    }

    #[inline(always)]
    fn quarter_sums(self) -> [i32; 4] {
        std::array::from_fn(|w| (0..4).map(|c| self.0[4 * c + w] as i32).sum())
    }
}
