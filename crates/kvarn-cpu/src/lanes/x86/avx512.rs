#![allow(clippy::wildcard_imports)] // dozens of intrinsics

use std::arch::x86_64::*;

use crate::lanes::{Floats, Lanes};

/// Integers; `VNNI`: products of four bytes are one instruction.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>(__m512i);

/// Floats.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Floats<const VNNI: bool>(__m512);

impl<const VNNI: bool> Lanes for Avx512<VNNI> {
    type Floats = Avx512Floats<VNNI>;

    #[inline(always)]
    fn splat(value: u32) -> Self {
        Self(unsafe { _mm512_set1_epi32(value as i32) })
    }

    #[inline(always)]
    fn load(bytes: &[u8; 64]) -> Self {
        Self(unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) })
    }

    #[inline(always)]
    fn store(self, bytes: &mut [u8; 64]) {
        unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), self.0) }
    }

    #[inline(always)]
    fn alternating(even: &[u8; 16], odd: &[u8; 16]) -> Self {
        Self(unsafe {
            let even = _mm512_broadcast_i32x4(_mm_loadu_si128(even.as_ptr().cast()));
            _mm512_mask_broadcast_i32x4(even, 0xF0F0, _mm_loadu_si128(odd.as_ptr().cast()))
        })
    }

    #[inline(always)]
    fn joined(quarters: [&[u8; 16]; 4]) -> Self {
        let [a, b, c, d] = quarters;
        Self(unsafe {
            let (a, b) = (_mm_loadu_si128(a.as_ptr().cast()), _mm_loadu_si128(b.as_ptr().cast()));
            let (c, d) = (_mm_loadu_si128(c.as_ptr().cast()), _mm_loadu_si128(d.as_ptr().cast()));
            let (lower, upper) = (_mm256_set_m128i(b, a), _mm256_set_m128i(d, c));
            _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1)
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
    fn xor(self, other: Self) -> Self {
        Self(unsafe { _mm512_xor_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn shifted(self, count: i32) -> Self {
        unsafe {
            let by = _mm_cvtsi32_si128(count.abs());
            Self(if count >= 0 { _mm512_sll_epi32(self.0, by) } else { _mm512_srl_epi32(self.0, by) })
        }
    }

    #[inline(always)]
    fn moved_down(self, counts: Self) -> Self {
        Self(unsafe { _mm512_srlv_epi32(self.0, counts.0) })
    }

    #[inline(always)]
    fn transposed(vectors: [Self; 4]) -> [Self; 4] {
        let [Self(a), Self(b), Self(c), Self(d)] = vectors;
        unsafe {
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (upper_ab, upper_cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            [
                Self(_mm512_unpacklo_epi64(ab, cd)),
                Self(_mm512_unpackhi_epi64(ab, cd)),
                Self(_mm512_unpacklo_epi64(upper_ab, upper_cd)),
                Self(_mm512_unpackhi_epi64(upper_ab, upper_cd)),
            ]
        }
    }

    #[inline(always)]
    fn dot<const BITS: usize>(self, codes: Self, factors: Self) -> Self {
        unsafe {
            if VNNI {
                return Self(_mm512_dpbusd_epi32(self.0, codes.0, factors.0));
            }
            let (ones, mask) = (_mm512_set1_epi16(1), _mm512_set1_epi8(15));
            if BITS < 8 {
                let pairs = _mm512_maddubs_epi16(codes.0, factors.0);
                return Self(_mm512_add_epi32(self.0, _mm512_madd_epi16(pairs, ones)));
            }
            // Sums of two products of bytes saturate at 16 bits: a code is taken in halves of four bits.
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
    fn sum(self) -> i32 {
        unsafe { _mm512_reduce_add_epi32(self.0) }
    }

    #[inline(always)]
    fn byte_pairs(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        unsafe {
            let order =
                _mm256_broadcastsi128_si256(_mm_set_epi64x(0x0F0D_0B09_0E0C_0A08, 0x0705_0301_0604_0200));
            let pairs = _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(self.0), order);
            _mm256_storeu_si256(bytes.as_mut_ptr().cast(), pairs);
        }
        bytes
    }

    #[inline(always)]
    fn floats(self) -> Self::Floats {
        Avx512Floats(unsafe { _mm512_cvtepi32_ps(self.0) })
    }
}

impl<const VNNI: bool> Floats for Avx512Floats<VNNI> {
    type Integers = Avx512<VNNI>;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    fn load(values: &[f32; 16]) -> Self {
        Self(unsafe { _mm512_loadu_ps(values.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; 16]) {
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn store_bytes(self, bytes: &mut [u8; 64]) {
        unsafe { _mm512_storeu_ps(bytes.as_mut_ptr().cast(), self.0) }
    }

    #[inline(always)]
    fn load_bytes(bytes: &[u8; 64]) -> Self {
        Self(unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) })
    }

    #[inline(always)]
    fn load_halves(halves: &[u8; 32]) -> Self {
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(halves.as_ptr().cast())) })
    }

    #[inline(always)]
    fn load_bfloats(values: &[u8; 32]) -> Self {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(values.as_ptr().cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)))
        }
    }

    #[inline(always)]
    fn store_halves(self, halves: &mut [u8; 32]) {
        unsafe {
            let rounded = _mm512_cvtps_ph(self.0, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            _mm256_storeu_si256(halves.as_mut_ptr().cast(), rounded);
        }
    }

    #[inline(always)]
    fn butterfly<const STRIDE: usize>(self) -> Self {
        let Self(v) = self;
        unsafe {
            let other = match STRIDE {
                1 => _mm512_permute_ps(v, 0xB1),
                2 => _mm512_permute_ps(v, 0x4E),
                4 => _mm512_shuffle_f32x4(v, v, 0xB1),
                _ => _mm512_shuffle_f32x4(v, v, 0x4E),
            };
            let odd = match STRIDE {
                1 => 0xAAAA,
                2 => 0xCCCC,
                4 => 0xF0F0,
                _ => 0xFF00,
            };
            // A product with 1 or -1 is exact: the sum is rounded as one without it.
            let signs = _mm512_mask_blend_ps(odd, _mm512_set1_ps(1.0), _mm512_set1_ps(-1.0));
            Self(_mm512_fmadd_ps(v, signs, other))
        }
    }

    #[inline(always)]
    fn of_halves(quarters: [u64; 4]) -> Self {
        let [a, b, c, d] = quarters;
        Self(unsafe { _mm512_cvtph_ps(_mm256_setr_epi64x(a as i64, b as i64, c as i64, d as i64)) })
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, summand: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, summand.0) })
    }

    #[inline(always)]
    fn larger_size(self, other: Self) -> Self {
        // Bits of sizes have their order, and those of NaN are above all.
        Self(unsafe {
            let size = _mm512_castps_si512(_mm512_abs_ps(other.0));
            _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(self.0), size))
        })
    }

    #[inline(always)]
    fn swapped(self) -> Self {
        Self(unsafe { _mm512_permute_ps(self.0, 0xD8) })
    }

    #[inline(always)]
    fn interleaved(self) -> Self {
        Self(unsafe {
            let order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
            _mm512_permutexvar_ps(order, self.0)
        })
    }

    #[inline(always)]
    fn deinterleaved(self) -> Self {
        Self(unsafe {
            let order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            _mm512_permutexvar_ps(order, self.0)
        })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps(self.0, 1));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        f32::from_bits(unsafe { _mm512_reduce_max_epu32(_mm512_castps_si512(self.0)) })
    }

    #[inline(always)]
    fn at_most(self, limit: f32) -> bool {
        unsafe { _mm512_cmp_ps_mask(self.0, _mm512_set1_ps(limit), _CMP_NLE_UQ) == 0 }
    }

    #[inline(always)]
    fn nearest(self) -> Self::Integers {
        Avx512(unsafe { _mm512_cvtps_epi32(self.0) })
    }
}
