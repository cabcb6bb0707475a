//! Lanes of any processor.

use std::array::from_fn;

use half::f16;

use super::{Floats, Lanes};

/// Sixteen integers.
#[derive(Clone, Copy)]
pub(crate) struct Plain([u32; 16]);

/// Sixteen float32.
#[derive(Clone, Copy)]
pub(crate) struct PlainFloats([f32; 16]);

impl Lanes for Plain {
    type Floats = PlainFloats;

    fn splat(value: u32) -> Self {
        Self([value; 16])
    }

    fn load(bytes: &[u8; 64]) -> Self {
        Self(from_fn(|lane| u32::from_le_bytes(from_fn(|byte| bytes[4 * lane + byte]))))
    }

    fn store(self, bytes: &mut [u8; 64]) {
        for (bytes, lane) in bytes.chunks_exact_mut(4).zip(self.0) {
            bytes.copy_from_slice(&lane.to_le_bytes());
        }
    }

    fn alternating(even: &[u8; 16], odd: &[u8; 16]) -> Self {
        Self::joined([even, odd, even, odd])
    }

    fn joined(quarters: [&[u8; 16]; 4]) -> Self {
        Self(from_fn(|lane| u32::from_le_bytes(from_fn(|byte| quarters[lane / 4][lane % 4 * 4 + byte]))))
    }

    fn and(self, other: Self) -> Self {
        Self(from_fn(|lane| self.0[lane] & other.0[lane]))
    }

    fn or(self, other: Self) -> Self {
        Self(from_fn(|lane| self.0[lane] | other.0[lane]))
    }

    fn xor(self, other: Self) -> Self {
        Self(from_fn(|lane| self.0[lane] ^ other.0[lane]))
    }

    fn shifted(self, count: i32) -> Self {
        Self(self.0.map(|lane| if count >= 0 { lane << count } else { lane >> -count }))
    }

    fn moved_down(self, counts: Self) -> Self {
        Self(from_fn(|lane| self.0[lane] >> counts.0[lane]))
    }

    fn transposed(vectors: [Self; 4]) -> [Self; 4] {
        from_fn(|i| Self(from_fn(|lane| vectors[lane % 4].0[lane / 4 * 4 + i])))
    }

    fn dot<const BITS: usize>(self, codes: Self, factors: Self) -> Self {
        Self(from_fn(|lane| {
            let (codes, factors) = (codes.0[lane].to_le_bytes(), factors.0[lane].to_le_bytes());
            let product = |byte: usize| i32::from(codes[byte]) * i32::from(factors[byte] as i8);
            self.0[lane].wrapping_add((product(0) + product(1) + product(2) + product(3)) as u32)
        }))
    }

    fn add(self, other: Self) -> Self {
        Self(from_fn(|lane| self.0[lane].wrapping_add(other.0[lane])))
    }

    fn sum(self) -> i32 {
        self.0.iter().fold(0, |sum, &lane| sum.wrapping_add(lane as i32))
    }

    fn byte_pairs(self) -> [u8; 32] {
        from_fn(|index| self.0[index / 8 * 4 + index % 4].to_le_bytes()[index % 8 / 4])
    }

    fn floats(self) -> PlainFloats {
        PlainFloats(self.0.map(|lane| lane as i32 as f32))
    }
}

impl Floats for PlainFloats {
    type Integers = Plain;

    fn splat(value: f32) -> Self {
        Self([value; 16])
    }

    fn load(values: &[f32; 16]) -> Self {
        Self(*values)
    }

    fn store(self, values: &mut [f32; 16]) {
        *values = self.0;
    }

    fn store_bytes(self, bytes: &mut [u8; 64]) {
        for (bytes, lane) in bytes.chunks_exact_mut(4).zip(self.0) {
            bytes.copy_from_slice(&lane.to_le_bytes());
        }
    }

    fn load_bytes(bytes: &[u8; 64]) -> Self {
        Self(from_fn(|lane| f32::from_le_bytes(from_fn(|byte| bytes[4 * lane + byte]))))
    }

    fn load_halves(halves: &[u8; 32]) -> Self {
        Self(from_fn(|lane| f16::from_le_bytes([halves[2 * lane], halves[2 * lane + 1]]).to_f32()))
    }

    fn load_bfloats(values: &[u8; 32]) -> Self {
        let bits = |lane: usize| u32::from(u16::from_le_bytes([values[2 * lane], values[2 * lane + 1]]));
        Self(from_fn(|lane| f32::from_bits(bits(lane) << 16)))
    }

    fn store_halves(self, halves: &mut [u8; 32]) {
        for (half, lane) in halves.chunks_exact_mut(2).zip(self.0) {
            half.copy_from_slice(&f16::from_f32(lane).to_le_bytes());
        }
    }

    fn butterfly<const STRIDE: usize>(self) -> Self {
        let other = |lane: usize| self.0[lane ^ STRIDE];
        Self(from_fn(|lane| {
            if lane & STRIDE == 0 { self.0[lane] + other(lane) } else { other(lane) - self.0[lane] }
        }))
    }

    fn of_halves(quarters: [u64; 4]) -> Self {
        // 2^112: from the bias of a half's exponent to that of a float32; exact for subnormal halves too.
        const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
        Self(from_fn(|lane| {
            let bits = (quarters[lane / 4] >> (16 * (lane % 4))) as u32;
            let size = f32::from_bits((bits & 0x7FFF) << 13) * REBIAS;
            f32::from_bits(size.to_bits() | (bits & 0x8000) << 16)
        }))
    }

    fn add(self, other: Self) -> Self {
        Self(from_fn(|lane| self.0[lane] + other.0[lane]))
    }

    fn sub(self, other: Self) -> Self {
        Self(from_fn(|lane| self.0[lane] - other.0[lane]))
    }

    fn mul(self, other: Self) -> Self {
        Self(from_fn(|lane| self.0[lane] * other.0[lane]))
    }

    fn mul_add(self, factor: Self, summand: Self) -> Self {
        self.mul(factor).add(summand)
    }

    fn larger_size(self, other: Self) -> Self {
        // Bits of sizes have their order, and those of NaN are above all.
        Self(from_fn(|lane| f32::from_bits(self.0[lane].to_bits().max(other.0[lane].abs().to_bits()))))
    }

    fn swapped(self) -> Self {
        Self(from_fn(|lane| self.0[lane / 4 * 4 + [0, 2, 1, 3][lane % 4]]))
    }

    fn interleaved(self) -> Self {
        Self(from_fn(|lane| self.0[lane / 2 + 8 * (lane % 2)]))
    }

    fn deinterleaved(self) -> Self {
        Self(from_fn(|lane| self.0[lane % 8 * 2 + lane / 8]))
    }

    fn sum(self) -> f32 {
        let mut lanes = self.0;
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }

    fn largest(self) -> f32 {
        f32::from_bits(self.0.into_iter().fold(0, |largest, lane| largest.max(lane.to_bits())))
    }

    fn at_most(self, limit: f32) -> bool {
        self.largest() <= limit
    }

    fn nearest(self) -> Plain {
        // Adding it leaves the integer in the lowest bits.
        const ROUND: f32 = 12_582_912.0;
        Plain(self.0.map(|value| (value + ROUND).to_bits().wrapping_sub(ROUND.to_bits())))
    }
}
