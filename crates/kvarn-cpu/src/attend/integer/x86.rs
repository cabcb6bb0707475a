//! AVX2 and AVX-512, with and without VNNI.
//!
//! Methods are inlined into functions that are compiled for these extensions and called where the processor has them
//! (`super::multiply`): that is what makes each intrinsic here sound. Closures are not: they would be compiled for the
//! baseline, with a call for each intrinsic, so there are none here and in what calls this.
#![allow(clippy::undocumented_unsafe_blocks)] // one reason for all, above
#![allow(clippy::wildcard_imports)] // dozens of intrinsics

use std::arch::x86_64::*;

use super::lanes::Lanes;

/// Two halves of 256 bits.
#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256i; 2]);

impl Lanes for Avx2 {
    #[inline(always)]
    fn splat(value: u32) -> Self {
        Self([unsafe { _mm256_set1_epi32(value as i32) }; 2])
    }

    #[inline(always)]
    fn load(bytes: &[u8; 64]) -> Self {
        let at: *const __m256i = bytes.as_ptr().cast();
        Self(unsafe { [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))] })
    }

    #[inline(always)]
    fn and(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, other.0);
        Self(unsafe { [_mm256_and_si256(a, c), _mm256_and_si256(b, d)] })
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, other.0);
        Self(unsafe { [_mm256_or_si256(a, c), _mm256_or_si256(b, d)] })
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self) -> Self {
        let [a, b] = self.0;
        unsafe {
            let count = _mm_cvtsi32_si128(N as i32);
            Self([_mm256_srl_epi32(a, count), _mm256_srl_epi32(b, count)])
        }
    }

    #[inline(always)]
    fn shift_left<const N: u32>(self) -> Self {
        let [a, b] = self.0;
        unsafe {
            let count = _mm_cvtsi32_si128(N as i32);
            Self([_mm256_sll_epi32(a, count), _mm256_sll_epi32(b, count)])
        }
    }

    #[inline(always)]
    fn dot<const WIDE: bool>(self, codes: Self, factors: Self) -> Self {
        let mut sum = self.0;
        for half in 0..2 {
            let (codes, factors) = (codes.0[half], factors.0[half]);
            unsafe {
                let (ones, mask) = (_mm256_set1_epi16(1), _mm256_set1_epi8(15));
                if !WIDE {
                    let pairs = _mm256_maddubs_epi16(codes, factors);
                    sum[half] = _mm256_add_epi32(sum[half], _mm256_madd_epi16(pairs, ones));
                    continue;
                }
                // Sums of two products of bytes saturate at 16 bits: a code is taken in halves of four bits.
                let low = _mm256_maddubs_epi16(_mm256_and_si256(codes, mask), factors);
                let upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask);
                let high = _mm256_maddubs_epi16(upper, factors);
                let (low, high) = (_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones));
                let products = _mm256_add_epi32(low, _mm256_slli_epi32(high, 4));
                sum[half] = _mm256_add_epi32(sum[half], products);
            }
        }
        Self(sum)
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, other.0);
        Self(unsafe { [_mm256_add_epi32(a, c), _mm256_add_epi32(b, d)] })
    }

    #[inline(always)]
    fn times(self, factor: u32) -> Self {
        let [a, b] = self.0;
        unsafe {
            let factor = _mm256_set1_epi32(factor as i32);
            Self([_mm256_mullo_epi32(a, factor), _mm256_mullo_epi32(b, factor)])
        }
    }

    #[inline(always)]
    fn sums(vectors: &[Self; 16], out: &mut [i32; 16]) {
        for first in [0, 8] {
            unsafe {
                let mut folded = [_mm256_setzero_si256(); 8];
                for i in 0..8 {
                    let [a, b] = vectors[first + i].0;
                    folded[i] = _mm256_add_epi32(a, b);
                }
                let a = _mm256_hadd_epi32(folded[0], folded[1]);
                let b = _mm256_hadd_epi32(folded[2], folded[3]);
                let c = _mm256_hadd_epi32(folded[4], folded[5]);
                let d = _mm256_hadd_epi32(folded[6], folded[7]);
                let (a, c) = (_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
                let low = _mm256_permute2x128_si256(a, c, 0x20);
                let high = _mm256_permute2x128_si256(a, c, 0x31);
                _mm256_storeu_si256(out[first..].as_mut_ptr().cast(), _mm256_add_epi32(low, high));
            }
        }
    }

    #[inline(always)]
    fn quarter_sums(self) -> [i32; 4] {
        let mut out = [0; 4];
        let [a, b] = self.0;
        unsafe {
            let folded = _mm256_add_epi32(a, b);
            let sums = _mm_add_epi32(_mm256_castsi256_si128(folded), _mm256_extracti128_si256(folded, 1));
            _mm_storeu_si128(out.as_mut_ptr().cast(), sums);
        }
        out
    }
}

/// 512 bits; `VNNI`: products of four bytes are one instruction.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const VNNI: bool>(__m512i);

impl<const VNNI: bool> Lanes for Avx512<VNNI> {
    #[inline(always)]
    fn splat(value: u32) -> Self {
        Self(unsafe { _mm512_set1_epi32(value as i32) })
    }

    #[inline(always)]
    fn load(bytes: &[u8; 64]) -> Self {
        Self(unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) })
    }

    #[inline(always)]
    fn permuted(bytes: &[u8; 64], order: &[u32; 16]) -> Self {
        Self(unsafe {
            let order = _mm512_loadu_si512(order.as_ptr().cast());
            _mm512_permutexvar_epi32(order, _mm512_loadu_si512(bytes.as_ptr().cast()))
        })
    }

    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(unsafe { _mm512_and_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(unsafe { _mm512_or_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self) -> Self {
        Self(unsafe { _mm512_srli_epi32(self.0, N) })
    }

    #[inline(always)]
    fn shift_left<const N: u32>(self) -> Self {
        Self(unsafe { _mm512_slli_epi32(self.0, N) })
    }

    #[inline(always)]
    fn dot<const WIDE: bool>(self, codes: Self, factors: Self) -> Self {
        unsafe {
            if VNNI {
                return Self(_mm512_dpbusd_epi32(self.0, codes.0, factors.0));
            }
            let (ones, mask) = (_mm512_set1_epi16(1), _mm512_set1_epi8(15));
            if !WIDE {
                let pairs = _mm512_maddubs_epi16(codes.0, factors.0);
                return Self(_mm512_add_epi32(self.0, _mm512_madd_epi16(pairs, ones)));
            }
            // As with AVX2.
            let low = _mm512_maddubs_epi16(_mm512_and_si512(codes.0, mask), factors.0);
            let upper = _mm512_and_si512(_mm512_srli_epi16(codes.0, 4), mask);
            let high = _mm512_maddubs_epi16(upper, factors.0);
            let (low, high) = (_mm512_madd_epi16(low, ones), _mm512_madd_epi16(high, ones));
            Self(_mm512_add_epi32(self.0, _mm512_add_epi32(low, _mm512_slli_epi32(high, 4))))
        }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_epi32(self.0, other.0) })
    }

    #[inline(always)]
    fn times(self, factor: u32) -> Self {
        Self(unsafe { _mm512_mullo_epi32(self.0, _mm512_set1_epi32(factor as i32)) })
    }

    #[inline(always)]
    fn sums(vectors: &[Self; 16], out: &mut [i32; 16]) {
        unsafe {
            // Each step adds halves of neighbours: lanes, pairs of lanes, quarters, pairs of quarters.
            let mut eight = [_mm512_setzero_si512(); 8];
            for i in 0..8 {
                let (a, b) = (vectors[i].0, vectors[i + 8].0);
                eight[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            }
            let mut four = [_mm512_setzero_si512(); 4];
            for i in 0..4 {
                let (a, b) = (eight[i], eight[i + 4]);
                four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
            }
            let mut two = [_mm512_setzero_si512(); 2];
            for i in 0..2 {
                let (a, b) = (four[i], four[i + 2]);
                two[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xEE));
            }
            let one = _mm512_add_epi32(
                _mm512_shuffle_i32x4(two[0], two[1], 0x88),
                _mm512_shuffle_i32x4(two[0], two[1], 0xDD),
            );
            // Vectors lie with the bits of their index reversed.
            let order = _mm512_setr_epi32(0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15);
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutexvar_epi32(order, one));
        }
    }

    #[inline(always)]
    fn quarter_sums(self) -> [i32; 4] {
        let mut out = [0; 4];
        unsafe {
            let folded =
                _mm256_add_epi32(_mm512_castsi512_si256(self.0), _mm512_extracti64x4_epi64(self.0, 1));
            let sums = _mm_add_epi32(_mm256_castsi256_si128(folded), _mm256_extracti128_si256(folded, 1));
            _mm_storeu_si128(out.as_mut_ptr().cast(), sums);
        }
        out
    }
}
