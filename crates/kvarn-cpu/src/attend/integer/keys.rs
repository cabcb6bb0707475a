//! Logits of a record: codes of K, whose rows are channels and whose columns are tokens.
//!
//! 64 bytes of codes hold 64 channels or more of two tokens, g and g + 8 of a slice of 16: a vector of products has one
//! token's only, and is summed over all its lanes.

use kvarn::record::MatrixLayout;

use super::factors::{BASE, Factors};
use super::lanes::Lanes;

/// Integer sums of every token: `sums[column][token]`; `VECTORS`: vectors of codes of one token.
#[inline(always)]
pub(super) fn sum_keys<L: Lanes, const BITS: u32, const WIDE: bool, const VECTORS: usize>(
    layout: &MatrixLayout,
    codes: &[u8],
    factors: &[Factors],
    sums: &mut [Vec<i32>],
) {
    let mut tables = Vec::with_capacity(factors.len());
    for factors in factors {
        tables.push(table::<L, BITS, VECTORS>(factors));
    }
    let slice_bytes = codes.len() * 16 / layout.columns;
    for (slice, codes) in codes.chunks_exact(slice_bytes).enumerate() {
        let mut unpacked = [[L::splat(0); 16]; VECTORS];
        // Four words of each lane lie side by side, those of eight values of g one behind the other.
        for (index, codes) in codes.chunks_exact(64).enumerate() {
            let (group, g) = (index / 8, index % 8);
            let vectors = unpack::<L, BITS>(L::load(codes.try_into().expect("64 bytes")));
            for vector in 0..vectors_of(BITS) {
                let unpacked = &mut unpacked[vector + group * vectors_of(BITS)];
                (unpacked[g], unpacked[g + 8]) = (vectors[vector][0], vectors[vector][1]);
            }
        }
        for (table, sums) in tables.iter().zip(&mut *sums) {
            let mut products = [L::splat(0); 16];
            for token in 0..16 {
                let mut sum = L::splat(0);
                for vector in 0..VECTORS {
                    sum = sum.dot::<WIDE>(unpacked[vector][token], table[0][vector]);
                }
                sum = sum.times(BASE);
                for vector in 0..VECTORS {
                    sum = sum.dot::<WIDE>(unpacked[vector][token], table[1][vector]);
                }
                products[token] = sum;
            }
            L::sums(&products, (&mut sums[16 * slice..][..16]).try_into().expect("16 elements"));
        }
    }
}

/// Vectors that 64 bytes of codes give for each of their two tokens.
const fn vectors_of(bits: u32) -> usize {
    if bits == 2 { 2 } else { 1 }
}

/// Codes of tokens g and g + 8, `[vector][half]`, in bytes in dword order. Byte `half + 2 e` of a word has those of one token,
/// of both k halves, or with 8 bits of one.
#[inline(always)]
fn unpack<L: Lanes, const BITS: u32>(words: L) -> [[L; 2]; 2] {
    match BITS {
        4 => {
            let (low, high) = (L::splat(0x000F_000F), L::splat(0x0F00_0F00));
            let first = words.and(low).or(words.shift_left::<4>().and(high));
            let second = words.shift_right::<8>().and(low).or(words.shift_right::<4>().and(high));
            [[first, second]; 2]
        }
        2 => {
            let (low, high) = (L::splat(0x0003_0003), L::splat(0x0300_0300));
            [
                [
                    words.and(low).or(words.shift_left::<6>().and(high)),
                    words.shift_right::<8>().and(low).or(words.shift_right::<2>().and(high)),
                ],
                [
                    words.shift_right::<4>().and(low).or(words.shift_left::<2>().and(high)),
                    words.shift_right::<12>().and(low).or(words.shift_right::<6>().and(high)),
                ],
            ]
        }
        _ => {
            let low = L::splat(0x00FF_00FF);
            [[words.and(low), words.shift_right::<8>().and(low)]; 2]
        }
    }
}

/// High and low factors, as the vectors of codes want them.
#[inline(always)]
fn table<L: Lanes, const BITS: u32, const VECTORS: usize>(factors: &Factors) -> [[L; VECTORS]; 2] {
    let mut made = [[L::splat(0); VECTORS]; 2];
    for (part, made) in made.iter_mut().enumerate() {
        for (vector, made) in made.iter_mut().enumerate() {
            let mut bytes = [0; 64];
            for (w, bytes) in bytes.chunks_exact_mut(16).enumerate() {
                let block = match BITS {
                    4 => 4 * vector + w,
                    2 => 2 * (4 * (vector / 2) + w) + vector % 2,
                    _ => 2 * vector + w / 2,
                };
                bytes.copy_from_slice(factors.block(part == 1, block));
                if BITS == 8 {
                    // One k half: every second byte.
                    for dword in bytes.chunks_exact_mut(4) {
                        dword.copy_from_slice(&[dword[w % 2], 0, dword[2 + w % 2], 0]);
                    }
                }
            }
            // From w, c to c, w.
            *made = L::permuted(&bytes, &[0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]);
        }
    }
    made
}
