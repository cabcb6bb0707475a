//! Sixteen lanes of 32 bits: what loops that compilers do not vectorise need of a processor.
//!
//! All implementations give the same integers, and the same floats but where `mul_add` is used: elsewhere arithmetic is fused
//! only where that rounds alike, and sums of floats have one order. *Quarter* c of sixteen lanes are lanes 4 c to 4 c + 3.

mod plain;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use plain::Plain;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

/// How an encoder turns squares on this processor.
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::SseTurn as BestTurn;

#[cfg(not(target_arch = "x86_64"))]
pub(crate) use kvarn::codec::PlainTurn as BestTurn;

/// Compiles `$body`, generic over [`Floats`], for each instruction set, and calls the best one.
macro_rules! with_floats {
    ($body:ident($($arg:ident: $type:ty),*) -> $result:ty) => {{
        #[cfg(target_arch = "x86_64")]
        {
            use crate::features::{Level, level};
            use crate::lanes::{Avx2, Avx512, Lanes};
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
            fn avx512($($arg: $type),*) -> $result {
                $body::<<Avx512<false> as Lanes>::Floats>($($arg),*)
            }
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $type),*) -> $result {
                $body::<<Avx2 as Lanes>::Floats>($($arg),*)
            }
            match level() {
                // SAFETY: the features were found on this processor.
                Level::Avx512Vnni | Level::Avx512 => return unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                Level::Avx2 => return unsafe { avx2($($arg),*) },
                Level::Portable => {}
            }
        }
        $body::<<$crate::lanes::Plain as $crate::lanes::Lanes>::Floats>($($arg),*)
    }};
}
pub(crate) use with_floats;

/// Sixteen integers of 32 bits, or sixty-four bytes.
pub(crate) trait Lanes: Copy {
    type Floats: Floats<Integers = Self>;

    /// Lanes that are all `value`.
    fn splat(value: u32) -> Self;

    fn load(bytes: &[u8; 64]) -> Self;

    fn store(self, bytes: &mut [u8; 64]);

    /// Quarters 0 and 2 are `even`, 1 and 3 `odd`.
    fn alternating(even: &[u8; 16], odd: &[u8; 16]) -> Self;

    /// One after the other.
    fn joined(quarters: [&[u8; 16]; 4]) -> Self;

    fn and(self, other: Self) -> Self;

    fn or(self, other: Self) -> Self;

    fn xor(self, other: Self) -> Self;

    /// Shifted by `count` bits: to the left, or to the right where it is negative.
    fn shifted(self, count: i32) -> Self;

    /// Each lane moved down by the bits, less than 32, that the lane of `counts` says.
    fn moved_down(self, counts: Self) -> Self;

    /// In each quarter: lane i of vector j becomes lane j of vector i.
    fn transposed(vectors: [Self; 4]) -> [Self; 4];

    /// Adds to each lane of `self` the products of four codes of `BITS` bits (unsigned bytes) and four factors (signed
    /// bytes).
    fn dot<const BITS: usize>(self, codes: Self, factors: Self) -> Self;

    fn add(self, other: Self) -> Self;

    /// The sum of all lanes.
    fn sum(self) -> i32;

    /// In each quarter the lowest byte of each lane, then the second byte of each.
    fn byte_pairs(self) -> [u8; 32];

    /// As signed integers.
    fn floats(self) -> Self::Floats;
}

/// Sixteen float32.
pub(crate) trait Floats: Copy {
    type Integers: Lanes<Floats = Self>;

    fn splat(value: f32) -> Self;

    fn load(values: &[f32; 16]) -> Self;

    fn store(self, values: &mut [f32; 16]);

    /// As bytes.
    fn store_bytes(self, bytes: &mut [u8; 64]);

    /// Of sixteen float32 in bytes.
    fn load_bytes(bytes: &[u8; 64]) -> Self;

    /// Of sixteen halves.
    fn load_halves(halves: &[u8; 32]) -> Self;

    /// Of sixteen bfloat16.
    fn load_bfloats(values: &[u8; 32]) -> Self;

    /// As halves, rounded to nearest even; beyond their range infinite.
    fn store_halves(self, halves: &mut [u8; 32]);

    /// Lane i: the sum with lane i + `STRIDE` where i has not the bit `STRIDE`, else the difference, lane i - `STRIDE` less
    /// lane i. `STRIDE`: 1, 2, 4 or 8.
    fn butterfly<const STRIDE: usize>(self) -> Self;

    /// Of sixteen finite halves, four to a quarter.
    fn of_halves(quarters: [u64; 4]) -> Self;

    fn add(self, other: Self) -> Self;

    fn sub(self, other: Self) -> Self;

    fn mul(self, other: Self) -> Self;

    /// `self · factor + summand`, rounded once where that is one instruction, else twice.
    fn mul_add(self, factor: Self, summand: Self) -> Self;

    /// The larger of `self`, which has no sign, and the size of `other`; NaN where one is NaN.
    fn larger_size(self, other: Self) -> Self;

    /// In each quarter: lanes 0, 2, 1, 3.
    fn swapped(self) -> Self;

    /// Lanes 0, 8, 1, 9 and so on.
    fn interleaved(self) -> Self;

    /// The inverse: lanes 0, 2, 4 … 14, then 1, 3 … 15.
    fn deinterleaved(self) -> Self;

    /// The sum of all lanes: each step adds the upper half to the lower.
    fn sum(self) -> f32;

    /// The largest of lanes without sign; NaN if one is NaN.
    fn largest(self) -> f32;

    /// Whether all lanes, which have no sign, are `limit` at most; not if one is NaN.
    fn at_most(self, limit: f32) -> bool;

    /// The nearest integers, ties to even, of numbers below 2^22 in size.
    fn nearest(self) -> Self::Integers;
}
