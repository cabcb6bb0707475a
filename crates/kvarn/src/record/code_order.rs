//! Order of the codes: tensor-core fragment order, the same on every backend.
//!
//! A matrix is cut into fragments of 16 × 16 codes. In a fragment, `m` runs over the output dimension of the matrix
//! product (K: tokens, V: channels), `k` over the reduced one (K: channels, V: tokens): in terms of the encoded matrix,
//! `k` is the quantised row and `m` the column, for K and V alike. Lane `4 (m mod 8) + (k mod 8) div 2` holds the codes
//! of `m`, `m + 8`, `k`, `k + 1`, `k + 8`, `k + 9`.

use crate::{Bits, Side};

/// Where bits of a code lie: bit `shift` and up of 32-bit word `word` of `lane`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitPlace {
    /// Lane, 0 to 31.
    pub lane: usize,
    /// Word of the lane.
    pub word: usize,
    /// Lowest bit.
    pub shift: usize,
}

/// The order of one matrix's codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeOrder {
    side: Side,
    bits: Bits,
    head_dim: usize,
    group: usize,
}

/// One code's coordinates within the fragments.
#[derive(Clone, Copy, Debug)]
pub(super) struct FragmentCode {
    pub fragment: usize,
    pub lane: usize,
    /// Place-value class: decided by the `k` half for K and by the `m` half for V, where it can be folded for free.
    pub class: usize,
    /// Which of the two extractions of a word yields the code.
    pub extraction: usize,
    /// Even or odd `k`: the low or high half of a word.
    pub odd: usize,
}

impl CodeOrder {
    pub(super) const fn new(side: Side, bits: Bits, head_dim: usize, group: usize) -> Self {
        Self { side, bits, head_dim, group }
    }

    /// Width of a code.
    pub const fn bits(self) -> Bits {
        self.bits
    }

    /// K or V.
    pub const fn side(self) -> Side {
        self.side
    }

    /// Quantised rows of the matrix.
    pub const fn rows(self) -> usize {
        match self.side {
            Side::Key => self.head_dim,
            Side::Value => self.group,
        }
    }

    /// Columns of the matrix.
    pub const fn columns(self) -> usize {
        match self.side {
            Side::Key => self.group,
            Side::Value => self.head_dim,
        }
    }

    /// 16 × 16 fragments of the matrix.
    pub const fn fragments(self) -> usize {
        self.head_dim * self.group / 256
    }

    /// 32-bit words that each of the 32 lanes holds.
    pub const fn words(self) -> usize {
        self.head_dim * self.group * self.bits.get() / 1024
    }

    /// Byte offset of a lane's word: words come four to a 16-byte read of each lane, the remaining ones side by side.
    #[inline]
    pub const fn word_byte(self, lane: usize, word: usize) -> usize {
        let whole = self.words() / 4 * 4;
        if word < whole {
            (word / 4) * 512 + 16 * lane + 4 * (word % 4)
        } else {
            let rest = self.words() - whole;
            128 * whole + 4 * rest * lane + 4 * (word - whole)
        }
    }

    /// `(row, column)` in the matrix of a fragment's first code.
    #[inline]
    pub(super) const fn fragment_origin(self, fragment: usize) -> (usize, usize) {
        // Fragments are ordered by token first, so that 16-token slices are contiguous.
        let (token, channel) = (fragment / (self.head_dim / 16), fragment % (self.head_dim / 16));
        match self.side {
            Side::Key => (16 * channel, 16 * token),
            Side::Value => (16 * token, 16 * channel),
        }
    }

    /// `(row, column)` within a fragment.
    #[inline]
    pub(super) const fn within_fragment(
        self,
        lane: usize,
        class: usize,
        extraction: usize,
        odd: usize,
    ) -> (usize, usize) {
        let (k_half, m_half) = match self.side {
            Side::Key => (class, extraction),
            Side::Value => (extraction, class),
        };
        (8 * k_half + 2 * (lane % 4) + odd, 8 * m_half + lane / 4)
    }

    /// Where bit `bit` of the code at matrix position (`row`, `column`) lies.
    pub fn place(self, row: usize, column: usize, bit: usize) -> BitPlace {
        let (token, channel) = match self.side {
            Side::Key => (column, row),
            Side::Value => (row, column),
        };
        let (k, m) = (row % 16, column % 16);
        let (k_half, m_half) = (k / 8, m / 8);
        let (class, extraction) = match self.side {
            Side::Key => (k_half, m_half),
            Side::Value => (m_half, k_half),
        };
        let code = FragmentCode {
            fragment: (token / 16) * (self.head_dim / 16) + channel / 16,
            lane: 4 * (m % 8) + (k % 8) / 2,
            class,
            extraction,
            odd: k % 2,
        };
        bit_place(self.bits, code, bit)
    }
}

/// Where bit `bit` of a code lies.
#[inline]
pub(super) fn bit_place(bits: Bits, code: FragmentCode, bit: usize) -> BitPlace {
    let FragmentCode { fragment, lane, class, extraction, odd } = code;
    let (word, shift) = match bits {
        Bits::Four => (fragment, 8 * extraction + 4 * class + bit),
        Bits::Two => (fragment / 2, 8 * extraction + 4 * (fragment % 2) + 2 * class + bit),
        Bits::Eight => (2 * fragment + class, 8 * extraction + bit),
        Bits::Three => {
            // Four fragments share three words: three fill bits 3 to 14 of a word each, the fourth the bits left over.
            let (first, part) = (3 * (fragment / 4), fragment % 4);
            match (part, class, extraction) {
                (3, 1, 1) => (first + bit, 15),
                (3, _, _) => (first + 2 * class + extraction, bit),
                _ => (first + part, 3 + 3 * class + 6 * extraction + bit),
            }
        }
    };
    BitPlace { lane, word, shift: shift + 16 * odd }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_is_a_bijection_without_gaps() {
        for side in [Side::Key, Side::Value] {
            for bits in Bits::ALL {
                for group in [64, 128] {
                    for head_dim in (16..=256).step_by(16) {
                        let order = CodeOrder::new(side, bits, head_dim, group);
                        let mut seen = vec![false; head_dim * group * bits.get()];
                        for row in 0..order.rows() {
                            for column in 0..order.columns() {
                                for bit in 0..bits.get() {
                                    let place = order.place(row, column, bit);
                                    let at = 8 * order.word_byte(place.lane, place.word) + place.shift;
                                    assert!(
                                        !std::mem::replace(&mut seen[at], true),
                                        "{side:?} {bits:?} {row} {column}"
                                    );
                                }
                            }
                        }
                        assert!(seen.iter().all(|&seen| seen));
                    }
                }
            }
        }
    }

    #[test]
    fn fragment_coordinates_agree_with_places() {
        for side in [Side::Key, Side::Value] {
            let order = CodeOrder::new(side, Bits::Four, 96, 64);
            for fragment in 0..order.fragments() {
                for lane in 0..32 {
                    for (class, extraction, odd) in [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)] {
                        let (row0, column0) = order.fragment_origin(fragment);
                        let (row, column) = order.within_fragment(lane, class, extraction, odd);
                        let code = FragmentCode { fragment, lane, class, extraction, odd };
                        assert_eq!(
                            order.place(row0 + row, column0 + column, 0),
                            bit_place(Bits::Four, code, 0)
                        );
                    }
                }
            }
        }
    }
}
