#![allow(clippy::wildcard_imports)] // dozens of intrinsics

use std::arch::x86_64::*;

use kvarn::codec::Turn;

/// With SSE2, which every processor of the target has.
#[derive(Debug)]
pub(crate) struct SseTurn;

impl Turn for SseTurn {
    #[inline(always)]
    fn floats(square: &[f32; 256], turned: &mut [f32; 256]) {
        for i in 0..4 {
            for j in 0..4 {
                let (from, to) = (&square[64 * i + 4 * j..][..52], &mut turned[64 * j + 4 * i..][..52]);
                // SAFETY: 4 elements from 0, 16, 32 and 48 on lie within 52; part of the baseline.
                unsafe {
                    let from = from.as_ptr();
                    let (a, b) = (_mm_loadu_ps(from), _mm_loadu_ps(from.add(16)));
                    let (c, d) = (_mm_loadu_ps(from.add(32)), _mm_loadu_ps(from.add(48)));
                    let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
                    let (upper_ab, upper_cd) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
                    let to = to.as_mut_ptr();
                    _mm_storeu_ps(to, _mm_movelh_ps(ab, cd));
                    _mm_storeu_ps(to.add(16), _mm_movehl_ps(cd, ab));
                    _mm_storeu_ps(to.add(32), _mm_movelh_ps(upper_ab, upper_cd));
                    _mm_storeu_ps(to.add(48), _mm_movehl_ps(upper_cd, upper_ab));
                }
            }
        }
    }

    #[inline(always)]
    fn bytes(square: &[u8; 256]) -> [[u8; 16]; 16] {
        let mut turned = [[0; 16]; 16];
        // SAFETY: 16 bytes from each multiple of 16 on; part of the baseline.
        unsafe {
            let mut rows = [_mm_setzero_si128(); 16];
            for row in 0..16 {
                rows[row] = _mm_loadu_si128(square.as_ptr().add(16 * row).cast());
            }
            // Each step brings a bit of the row's number to the lowest place of a byte's number, and the highest bit of that
            // to the lowest place of the row's.
            for _ in 0..4 {
                let mut mixed = rows;
                for row in 0..8 {
                    mixed[2 * row] = _mm_unpacklo_epi8(rows[row], rows[row + 8]);
                    mixed[2 * row + 1] = _mm_unpackhi_epi8(rows[row], rows[row + 8]);
                }
                rows = mixed;
            }
            for row in 0..16 {
                _mm_storeu_si128(turned[row].as_mut_ptr().cast(), rows[row]);
            }
        }
        turned
    }
}

#[cfg(test)]
mod tests {
    use kvarn::codec::PlainTurn;

    use super::*;

    #[test]
    fn squares_are_turned_as_the_plain_way_does() {
        let bytes: [u8; 256] = std::array::from_fn(|index| index as u8);
        assert_eq!(SseTurn::bytes(&bytes), PlainTurn::bytes(&bytes));
        let floats: [f32; 256] = std::array::from_fn(|index| index as f32);
        let (mut found, mut expected) = ([0.0; 256], [0.0; 256]);
        SseTurn::floats(&floats, &mut found);
        PlainTurn::floats(&floats, &mut expected);
        assert_eq!(found, expected);
    }
}
