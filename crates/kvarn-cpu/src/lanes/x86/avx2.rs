#![allow(clippy::wildcard_imports)] // dozens of intrinsics

use std::arch::x86_64::*;

use crate::lanes::{Floats, Lanes};

/// Integers, in two halves of 256 bits.
#[derive(Clone, Copy)]
pub(crate) struct Avx2([__m256i; 2]);

/// Floats, in two halves.
#[derive(Clone, Copy)]
pub(crate) struct Avx2Floats([__m256; 2]);

impl Lanes for Avx2 {
    type Floats = Avx2Floats;

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
    fn store(self, bytes: &mut [u8; 64]) {
        let at: *mut __m256i = bytes.as_mut_ptr().cast();
        unsafe {
            _mm256_storeu_si256(at, self.0[0]);
            _mm256_storeu_si256(at.add(1), self.0[1]);
        }
    }

    #[inline(always)]
    fn alternating(even: &[u8; 16], odd: &[u8; 16]) -> Self {
        Self::joined([even, odd, even, odd])
    }

    #[inline(always)]
    fn joined(quarters: [&[u8; 16]; 4]) -> Self {
        let [a, b, c, d] = quarters;
        unsafe {
            let (a, b) = (_mm_loadu_si128(a.as_ptr().cast()), _mm_loadu_si128(b.as_ptr().cast()));
            let (c, d) = (_mm_loadu_si128(c.as_ptr().cast()), _mm_loadu_si128(d.as_ptr().cast()));
            Self([_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)])
        }
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
    fn xor(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, other.0);
        Self(unsafe { [_mm256_xor_si256(a, c), _mm256_xor_si256(b, d)] })
    }

    #[inline(always)]
    fn shifted(self, count: i32) -> Self {
        let [a, b] = self.0;
        unsafe {
            let by = _mm_cvtsi32_si128(count.abs());
            Self(if count >= 0 {
                [_mm256_sll_epi32(a, by), _mm256_sll_epi32(b, by)]
            } else {
                [_mm256_srl_epi32(a, by), _mm256_srl_epi32(b, by)]
            })
        }
    }

    #[inline(always)]
    fn moved_down(self, counts: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, counts.0);
        Self(unsafe { [_mm256_srlv_epi32(a, c), _mm256_srlv_epi32(b, d)] })
    }

    #[inline(always)]
    fn transposed(vectors: [Self; 4]) -> [Self; 4] {
        let mut out = vectors;
        for half in 0..2 {
            let [a, b, c, d] =
                [vectors[0].0[half], vectors[1].0[half], vectors[2].0[half], vectors[3].0[half]];
            unsafe {
                let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
                let (upper_ab, upper_cd) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
                out[0].0[half] = _mm256_unpacklo_epi64(ab, cd);
                out[1].0[half] = _mm256_unpackhi_epi64(ab, cd);
                out[2].0[half] = _mm256_unpacklo_epi64(upper_ab, upper_cd);
                out[3].0[half] = _mm256_unpackhi_epi64(upper_ab, upper_cd);
            }
        }
        out
    }

    #[inline(always)]
    fn dot<const BITS: usize>(self, codes: Self, factors: Self) -> Self {
        let mut sum = self.0;
        for half in 0..2 {
            let (codes, factors) = (codes.0[half], factors.0[half]);
            unsafe {
                let (ones, mask) = (_mm256_set1_epi16(1), _mm256_set1_epi8(15));
                if BITS < 8 {
                    let pairs = _mm256_maddubs_epi16(codes, factors);
                    sum[half] = _mm256_add_epi32(sum[half], _mm256_madd_epi16(pairs, ones));
                    continue;
                }
                // As with AVX-512.
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
    fn sum(self) -> i32 {
        let [a, b] = self.0;
        unsafe {
            let eight = _mm256_add_epi32(a, b);
            let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
            let two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
            _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)))
        }
    }

    #[inline(always)]
    fn byte_pairs(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        let [a, b] = self.0;
        unsafe {
            // The low bytes of each quarter's lanes to its first dword, the second bytes to the next.
            let order = _mm256_broadcastsi128_si256(_mm_set_epi64x(-1, 0x0D09_0501_0C08_0400));
            let (a, b) = (_mm256_shuffle_epi8(a, order), _mm256_shuffle_epi8(b, order));
            // Quarters 0 and 2, 1 and 3.
            let joined = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(a, b), 0xD8);
            _mm256_storeu_si256(bytes.as_mut_ptr().cast(), joined);
        }
        bytes
    }

    #[inline(always)]
    fn floats(self) -> Avx2Floats {
        let [a, b] = self.0;
        Avx2Floats(unsafe { [_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)] })
    }
}

impl Floats for Avx2Floats {
    type Integers = Avx2;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([unsafe { _mm256_set1_ps(value) }; 2])
    }

    #[inline(always)]
    fn load(values: &[f32; 16]) -> Self {
        let at = values.as_ptr();
        Self(unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))] })
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; 16]) {
        let at = values.as_mut_ptr();
        unsafe {
            _mm256_storeu_ps(at, self.0[0]);
            _mm256_storeu_ps(at.add(8), self.0[1]);
        }
    }

    #[inline(always)]
    fn store_bytes(self, bytes: &mut [u8; 64]) {
        let at: *mut f32 = bytes.as_mut_ptr().cast();
        unsafe {
            _mm256_storeu_ps(at, self.0[0]);
            _mm256_storeu_ps(at.add(8), self.0[1]);
        }
    }

    #[inline(always)]
    fn load_bytes(bytes: &[u8; 64]) -> Self {
        let at: *const f32 = bytes.as_ptr().cast();
        Self(unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))] })
    }

    #[inline(always)]
    fn load_halves(halves: &[u8; 32]) -> Self {
        let at: *const __m128i = halves.as_ptr().cast();
        Self(unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)))] })
    }

    #[inline(always)]
    fn load_bfloats(values: &[u8; 32]) -> Self {
        let at: *const __m128i = values.as_ptr().cast();
        unsafe {
            let (a, b) = (_mm_loadu_si128(at), _mm_loadu_si128(at.add(1)));
            let (a, b) = (_mm256_cvtepu16_epi32(a), _mm256_cvtepu16_epi32(b));
            Self([
                _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)),
            ])
        }
    }

    #[inline(always)]
    fn store_halves(self, halves: &mut [u8; 32]) {
        let at: *mut __m128i = halves.as_mut_ptr().cast();
        unsafe {
            _mm_storeu_si128(at, _mm256_cvtps_ph(self.0[0], _MM_FROUND_TO_NEAREST_INT));
            _mm_storeu_si128(at.add(1), _mm256_cvtps_ph(self.0[1], _MM_FROUND_TO_NEAREST_INT));
        }
    }

    #[inline(always)]
    fn butterfly<const STRIDE: usize>(self) -> Self {
        let [a, b] = self.0;
        if STRIDE == 8 {
            return Self(unsafe { [_mm256_add_ps(a, b), _mm256_sub_ps(a, b)] });
        }
        let mut out = self.0;
        for (out, v) in out.iter_mut().zip(self.0) {
            unsafe {
                let other = match STRIDE {
                    1 => _mm256_permute_ps(v, 0xB1),
                    2 => _mm256_permute_ps(v, 0x4E),
                    _ => _mm256_permute2f128_ps(v, v, 1),
                };
                let (one, minus) = (_mm256_set1_ps(1.0), _mm256_set1_ps(-1.0));
                let signs = match STRIDE {
                    1 => _mm256_blend_ps(one, minus, 0xAA),
                    2 => _mm256_blend_ps(one, minus, 0xCC),
                    _ => _mm256_blend_ps(one, minus, 0xF0),
                };
                // As with AVX-512.
                *out = _mm256_fmadd_ps(v, signs, other);
            }
        }
        Self(out)
    }

    #[inline(always)]
    fn of_halves(quarters: [u64; 4]) -> Self {
        let [a, b, c, d] = quarters;
        Self(unsafe {
            [
                _mm256_cvtph_ps(_mm_set_epi64x(b as i64, a as i64)),
                _mm256_cvtph_ps(_mm_set_epi64x(d as i64, c as i64)),
            ]
        })
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, other.0);
        Self(unsafe { [_mm256_add_ps(a, c), _mm256_add_ps(b, d)] })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, other.0);
        Self(unsafe { [_mm256_sub_ps(a, c), _mm256_sub_ps(b, d)] })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, other.0);
        Self(unsafe { [_mm256_mul_ps(a, c), _mm256_mul_ps(b, d)] })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, summand: Self) -> Self {
        let ([a, b], [c, d], [e, f]) = (self.0, factor.0, summand.0);
        Self(unsafe { [_mm256_fmadd_ps(a, c, e), _mm256_fmadd_ps(b, d, f)] })
    }

    #[inline(always)]
    fn larger_size(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, other.0);
        unsafe {
            // As with AVX-512.
            let sign = _mm256_set1_ps(-0.0);
            let (c, d) = (_mm256_andnot_ps(sign, c), _mm256_andnot_ps(sign, d));
            Self([
                _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(c))),
                _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(b), _mm256_castps_si256(d))),
            ])
        }
    }

    #[inline(always)]
    fn swapped(self) -> Self {
        let [a, b] = self.0;
        Self(unsafe { [_mm256_permute_ps(a, 0xD8), _mm256_permute_ps(b, 0xD8)] })
    }

    #[inline(always)]
    fn interleaved(self) -> Self {
        let [a, b] = self.0;
        unsafe {
            let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            Self([_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)])
        }
    }

    #[inline(always)]
    fn deinterleaved(self) -> Self {
        let [a, b] = self.0;
        unsafe {
            let order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
            let (a, b) = (_mm256_permutevar8x32_ps(a, order), _mm256_permutevar8x32_ps(b, order));
            Self([_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)])
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let [a, b] = self.0;
        unsafe {
            let eight = _mm256_add_ps(a, b);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        let [a, b] = self.0;
        unsafe {
            let eight = _mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b));
            let four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
            let two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
            f32::from_bits(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0xB1))) as u32)
        }
    }

    #[inline(always)]
    fn at_most(self, limit: f32) -> bool {
        let [a, b] = self.0;
        unsafe {
            // NaN, whose bits are the larger ones, stays.
            let larger =
                _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
            _mm256_movemask_ps(_mm256_cmp_ps(larger, _mm256_set1_ps(limit), _CMP_NLE_UQ)) == 0
        }
    }

    #[inline(always)]
    fn nearest(self) -> Avx2 {
        let [a, b] = self.0;
        Avx2(unsafe { [_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b)] })
    }
}
