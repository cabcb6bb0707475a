//! Codes to words and back.

use super::CodeOrder;
use super::code_order::{FragmentCode, bit_place};
use crate::Bits;

/// How an array of codes is laid out: code (row, column) has index `row * self.row + column * self.column`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    /// Elements from a quantised row to the next.
    pub row: usize,
    /// Elements from a column to the next.
    pub column: usize,
}

/// Packs `codes` (one per byte, each at most `2^bits - 1`) into `packed`, which is overwritten.
///
/// # Panics
/// If a slice is shorter than the matrix.
pub fn pack_codes(order: CodeOrder, codes: &[u8], strides: Strides, packed: &mut [u8]) {
    let bits = order.bits();
    packed[..128 * order.words()].fill(0);
    visit(order, |code, row, column| {
        let value = u32::from(codes[row * strides.row + column * strides.column]);
        let mut set = |bit: usize, value: u32| {
            let place = bit_place(bits, code, bit);
            let at = order.word_byte(place.lane, place.word);
            let word = read_word(packed, at) | value << place.shift;
            packed[at..at + 4].copy_from_slice(&word.to_le_bytes());
        };
        if is_split(bits, code) {
            (0..3).for_each(|bit| set(bit, value >> bit & 1));
        } else {
            set(0, value);
        }
    });
}

/// Unpacks every code of a matrix from `packed` into `codes`, one per byte.
///
/// # Panics
/// If a slice is shorter than the matrix.
pub fn unpack_codes(order: CodeOrder, packed: &[u8], strides: Strides, codes: &mut [u8]) {
    let bits = order.bits();
    let mask = u32::from(bits.max_code());
    visit(order, |code, row, column| {
        let read = |bit: usize| {
            let place = bit_place(bits, code, bit);
            read_word(packed, order.word_byte(place.lane, place.word)) >> place.shift
        };
        let value = if is_split(bits, code) {
            read(0) & 1 | (read(1) & 1) << 1 | (read(2) & 1) << 2
        } else {
            read(0) & mask
        };
        codes[row * strides.row + column * strides.column] = value as u8;
    });
}

/// Calls `f(code, row, column)` for every code, word by word.
#[inline(always)]
fn visit(order: CodeOrder, mut f: impl FnMut(FragmentCode, usize, usize)) {
    for fragment in 0..order.fragments() {
        let (row0, column0) = order.fragment_origin(fragment);
        for lane in 0..32 {
            for (class, extraction) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                for odd in 0..2 {
                    let (row, column) = order.within_fragment(lane, class, extraction, odd);
                    f(FragmentCode { fragment, lane, class, extraction, odd }, row0 + row, column0 + column);
                }
            }
        }
    }
}

/// Whether the bits of this code lie in three words.
#[inline]
fn is_split(bits: Bits, code: FragmentCode) -> bool {
    bits == Bits::Three && code.fragment % 4 == 3 && code.class == 1 && code.extraction == 1
}

#[inline]
fn read_word(packed: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::record::RecordLayout;

    proptest! {
        #[test]
        fn codes_survive_and_lie_where_the_order_says(
            (key_bits, value_bits) in (0usize..4, 0usize..4), group in prop::sample::select(vec![64usize, 128]),
            head_blocks in 1usize..=16, seed in any::<u64>(), transposed in any::<bool>(),
        ) {
            let layout = RecordLayout::new(16 * head_blocks, group, Bits::ALL[key_bits], Bits::ALL[value_bits]);
            for matrix in [&layout.key, &layout.value] {
                let order = matrix.code_order;
                let (rows, columns) = (order.rows(), order.columns());
                let strides = if transposed { Strides { row: 1, column: rows } } else { Strides { row: columns, column: 1 } };
                let mut state = seed;
                let codes: Vec<u8> = (0..rows * columns).map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 33) as u8 & order.bits().max_code()
                }).collect();
                let mut packed = vec![0xAA; matrix.codes.len()];
                pack_codes(order, &codes, strides, &mut packed);
                let mut back = vec![0; codes.len()];
                unpack_codes(order, &packed, strides, &mut back);
                prop_assert_eq!(&back, &codes);
                for (row, column) in [(0, 0), (rows - 1, columns - 1), (seed as usize % rows, (seed >> 20) as usize % columns)] {
                    let mut code = 0;
                    for bit in 0..order.bits().get() {
                        let place = order.place(row, column, bit);
                        code |= (read_word(&packed, order.word_byte(place.lane, place.word)) >> place.shift & 1) << bit;
                    }
                    prop_assert_eq!(code as u8, codes[row * strides.row + column * strides.column]);
                }
            }
        }
    }
}
