//! Codes to words and back.
//!
//! Both ways go fragment by fragment: the 32 lanes' words as `[c][g]` for lane `4 g + c`, so that the eight codes of a row
//! (fixed `c`) are neighbours in registers and in memory.

use super::CodeOrder;
use super::code_order::{FragmentCode, bit_place};
use crate::Bits;

/// One word of each lane, `[c][g]`.
type LaneWords = [[u32; 8]; 4];

/// Four fragments take as many words as a code has bits.
const FRAGMENTS: usize = 4;

/// Packs `codes` `[rows, columns]` (one per byte, each at most `2^bits - 1`) into `packed`, which is overwritten.
///
/// # Panics
/// If a slice is shorter than the matrix.
#[inline(always)]
pub fn pack_codes(order: CodeOrder, codes: &[u8], packed: &mut [u8]) {
    match order.bits() {
        Bits::Two => pack::<2>(order, Bits::Two, codes, packed),
        Bits::Three => pack::<3>(order, Bits::Three, codes, packed),
        Bits::Four => pack::<4>(order, Bits::Four, codes, packed),
        Bits::Eight => pack::<8>(order, Bits::Eight, codes, packed),
    }
}

/// [`pack_codes`] for one width, so that shifts and masks are constants.
#[inline(always)]
fn pack<const WORDS: usize>(order: CodeOrder, bits: Bits, codes: &[u8], packed: &mut [u8]) {
    for block in 0..order.fragments() / FRAGMENTS {
        let mut words: [LaneWords; WORDS] = [[[0; 8]; 4]; WORDS];
        for part in 0..FRAGMENTS {
            for (class, extraction) in QUADRANTS {
                let values = gather(order, block * FRAGMENTS + part, class, extraction, codes);
                for (from, word, to, width) in pieces(bits, part, class, extraction) {
                    let mask = ((1 << width) - 1) * 0x0001_0001;
                    for c in 0..4 {
                        for g in 0..8 {
                            words[word][c][g] |= (values[c][g] >> from & mask) << to;
                        }
                    }
                }
            }
        }
        for (word, values) in words.iter().enumerate() {
            write_words(order, packed, block * WORDS + word, values);
        }
    }
}

/// Unpacks every code of a matrix from `packed` into `codes` `[rows, columns]`, one per byte.
///
/// # Panics
/// If a slice is shorter than the matrix.
#[inline(always)]
pub fn unpack_codes(order: CodeOrder, packed: &[u8], codes: &mut [u8]) {
    let mask = u32::from(order.bits().max_code());
    for fragment in 0..order.fragments() {
        for (class, extraction) in QUADRANTS {
            let pieces = pieces(order.bits(), fragment, class, extraction);
            let mut values: LaneWords = [[0; 8]; 4];
            for (from, word, to, width) in pieces {
                let mask = ((1 << width) - 1) * 0x0001_0001;
                let words = read_words(order, packed, word);
                for c in 0..4 {
                    for g in 0..8 {
                        values[c][g] |= (words[c][g] >> to & mask) << from;
                    }
                }
            }
            scatter(order, fragment, class, extraction, &values, mask, codes);
        }
    }
}

/// Place-value class and extraction of a fragment's four quarters.
const QUADRANTS: [(usize, usize); 4] = [(0, 0), (0, 1), (1, 0), (1, 1)];

/// Where the codes of a quarter lie: bits `from…` of a code are bits `to…` of word `word`, `width` of them; the odd code of
/// a pair 16 bits higher in both.
#[inline(always)]
fn pieces(
    bits: Bits,
    fragment: usize,
    class: usize,
    extraction: usize,
) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    let split = bits == Bits::Three && fragment % 4 == 3 && (class, extraction) == (1, 1);
    let (count, width) = if split { (3, 1) } else { (1, bits.get()) };
    (0..count).map(move |from| {
        let code = FragmentCode { fragment, lane: 0, class, extraction, odd: 0 };
        let place = bit_place(bits, code, from);
        (from, place.word, place.shift, width)
    })
}

/// Pairs of codes of a quarter, the even `k` in the low half.
#[inline(always)]
fn gather(order: CodeOrder, fragment: usize, class: usize, extraction: usize, codes: &[u8]) -> LaneWords {
    let columns = order.columns();
    let (row0, column0) = order.fragment_origin(fragment);
    let mut values = [[0; 8]; 4];
    for c in 0..4 {
        for odd in 0..2 {
            let (row, column) = order.within_fragment(c, class, extraction, odd);
            let row = &codes[(row0 + row) * columns + column0 + column..][..8];
            for g in 0..8 {
                values[c][g] |= u32::from(row[g]) << (16 * odd);
            }
        }
    }
    values
}

/// The inverse of [`gather`].
#[inline(always)]
fn scatter(
    order: CodeOrder,
    fragment: usize,
    class: usize,
    extraction: usize,
    values: &LaneWords,
    mask: u32,
    codes: &mut [u8],
) {
    let columns = order.columns();
    let (row0, column0) = order.fragment_origin(fragment);
    for c in 0..4 {
        for odd in 0..2 {
            let (row, column) = order.within_fragment(c, class, extraction, odd);
            let row = &mut codes[(row0 + row) * columns + column0 + column..][..8];
            for g in 0..8 {
                row[g] = (values[c][g] >> (16 * odd) & mask) as u8;
            }
        }
    }
}

#[inline(always)]
fn read_words(order: CodeOrder, packed: &[u8], word: usize) -> LaneWords {
    let (first, stride) = (order.word_byte(0, word), order.word_byte(1, word) - order.word_byte(0, word));
    let packed = &packed[first..=first + 31 * stride + 3];
    let mut words = [[0; 8]; 4];
    for g in 0..8 {
        for c in 0..4 {
            let at = (4 * g + c) * stride;
            words[c][g] = u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]]);
        }
    }
    words
}

#[inline(always)]
fn write_words(order: CodeOrder, packed: &mut [u8], word: usize, values: &LaneWords) {
    let (first, stride) = (order.word_byte(0, word), order.word_byte(1, word) - order.word_byte(0, word));
    let packed = &mut packed[first..=first + 31 * stride + 3];
    for g in 0..8 {
        for c in 0..4 {
            packed[(4 * g + c) * stride..][..4].copy_from_slice(&values[c][g].to_le_bytes());
        }
    }
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
            head_blocks in 1usize..=16, seed in any::<u64>(),
        ) {
            let layout = RecordLayout::new(16 * head_blocks, group, Bits::ALL[key_bits], Bits::ALL[value_bits]);
            for matrix in [&layout.key, &layout.value] {
                let order = matrix.code_order;
                let (rows, columns) = (order.rows(), order.columns());
                let mut state = seed;
                let codes: Vec<u8> = (0..rows * columns).map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 33) as u8 & order.bits().max_code()
                }).collect();
                let mut packed = vec![0xAA; matrix.codes.len()];
                pack_codes(order, &codes, &mut packed);
                let mut back = vec![0; codes.len()];
                unpack_codes(order, &packed, &mut back);
                prop_assert_eq!(&back, &codes);
                for (row, column) in [(0, 0), (rows - 1, columns - 1), (seed as usize % rows, (seed >> 20) as usize % columns)] {
                    let mut code = 0;
                    for bit in 0..order.bits().get() {
                        let place = order.place(row, column, bit);
                        let at = order.word_byte(place.lane, place.word) + place.shift / 8;
                        code |= (packed[at] >> (place.shift % 8) & 1) << bit;
                    }
                    prop_assert_eq!(code, codes[row * columns + column]);
                }
            }
        }
    }
}
