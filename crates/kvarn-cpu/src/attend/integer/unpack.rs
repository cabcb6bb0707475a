//! Codes of a matrix as bytes, in the order in which a product reads them.
//!
//! A fragment of 16 × 16 codes (`kvarn::record::CodeOrder`) becomes four vectors of 64 bytes: its columns m in fours, whose
//! codes lane 4 c + m mod 4 holds: of rows 2 c, 8 + 2 c, 2 c + 1 and 9 + 2 c. Fragments that meet in a sum lie side by side:
//! all that have the same columns.

use kvarn::Side;
use kvarn::record::MatrixLayout;

use crate::lanes::Lanes;

/// Bytes of an unpacked fragment.
pub(super) const FRAGMENT: usize = 256;

/// Words of a lane that lie side by side.
const TOGETHER: usize = 4;
/// Bytes of so many words of all lanes.
const STRIPE: usize = 512;
/// Three-bit codes: four fragments share three words.
const MOST_STRIPES: usize = 3;

/// Words that `unpack` takes at once.
pub(super) const fn words_at_once(bits: usize) -> usize {
    if bits == 3 { TOGETHER * MOST_STRIPES } else { TOGETHER }
}

/// Where fragments go, which come by token first.
struct Places {
    /// From a fragment to the next one of the same tokens, and on to the first of the next tokens.
    step: usize,
    turn: usize,
    /// Fragments of the same tokens, and how many of them are left.
    row: usize,
    left: usize,
    at: usize,
}

impl Places {
    #[inline(always)]
    fn new(layout: &MatrixLayout) -> Self {
        let (rows, columns) = (layout.rows / 16, layout.columns / 16);
        match layout.code_order.side() {
            Side::Key => Self { step: 1, turn: 1, row: rows, left: rows, at: 0 },
            Side::Value => Self {
                step: rows,
                turn: 1_usize.wrapping_sub((columns - 1) * rows),
                row: columns,
                left: columns,
                at: 0,
            },
        }
    }

    /// The place of the next fragment.
    #[inline(always)]
    fn next<'a>(&mut self, out: &'a mut [u8]) -> &'a mut [u8; FRAGMENT] {
        let at = self.at;
        self.left -= 1;
        let last = self.left == 0;
        self.at = self.at.wrapping_add(if last { self.turn } else { self.step });
        self.left = if last { self.row } else { self.left };
        (&mut out[at * FRAGMENT..][..FRAGMENT]).try_into().expect("a fragment")
    }
}

/// Unpacks the codes of a matrix to `out`, a byte for each.
#[inline(always)]
pub(super) fn unpack<L: Lanes>(layout: &MatrixLayout, codes: &[u8], out: &mut [u8]) {
    match (layout.code_order.bits().get(), layout.code_order.side()) {
        (2, Side::Key) => unpack_as::<L, 2, true>(layout, codes, out),
        (2, Side::Value) => unpack_as::<L, 2, false>(layout, codes, out),
        (3, Side::Key) => unpack_as::<L, 3, true>(layout, codes, out),
        (3, Side::Value) => unpack_as::<L, 3, false>(layout, codes, out),
        (4, Side::Key) => unpack_as::<L, 4, true>(layout, codes, out),
        (4, Side::Value) => unpack_as::<L, 4, false>(layout, codes, out),
        (_, Side::Key) => unpack_as::<L, 8, true>(layout, codes, out),
        (_, Side::Value) => unpack_as::<L, 8, false>(layout, codes, out),
    }
}

#[inline(always)]
fn unpack_as<L: Lanes, const BITS: usize, const KEY: bool>(
    layout: &MatrixLayout,
    codes: &[u8],
    out: &mut [u8],
) {
    let mut places = Places::new(layout);
    for codes in codes.chunks_exact(STRIPE / TOGETHER * words_at_once(BITS)) {
        // By m mod 8 from 0 to 3 and from 4 to 7. In the transposed order each lane holds a word of its m.
        let mut words = [[[L::splat(0); 2]; TOGETHER]; MOST_STRIPES];
        for (words, stripe) in words.iter_mut().zip(codes.chunks_exact(STRIPE)) {
            for upper in 0..2 {
                let of = L::transposed([
                    load(stripe, 4 * upper),
                    load(stripe, 4 * upper + 1),
                    load(stripe, 4 * upper + 2),
                    load(stripe, 4 * upper + 3),
                ]);
                for (words, word) in words.iter_mut().zip(of) {
                    words[upper] = word;
                }
            }
        }
        match BITS {
            2 => {
                for word in words[0] {
                    for odd in 0..2 {
                        let out = places.next(out);
                        for upper in 0..2 {
                            put(
                                out,
                                upper,
                                [two::<L, KEY>(word[upper], odd, 0), two::<L, KEY>(word[upper], odd, 1)],
                            );
                        }
                    }
                }
            }
            3 => {
                let words = words.as_flattened();
                for three in 0..TOGETHER {
                    let three = [words[3 * three], words[3 * three + 1], words[3 * three + 2]];
                    for word in three {
                        let out = places.next(out);
                        for upper in 0..2 {
                            put(
                                out,
                                upper,
                                [three_of::<L, KEY>(word[upper], 0), three_of::<L, KEY>(word[upper], 1)],
                            );
                        }
                    }
                    let out = places.next(out);
                    for upper in 0..2 {
                        put(
                            out,
                            upper,
                            rest_of::<L, KEY>([three[0][upper], three[1][upper], three[2][upper]]),
                        );
                    }
                }
            }
            4 => {
                for word in words[0] {
                    let out = places.next(out);
                    for upper in 0..2 {
                        put(out, upper, [four::<L, KEY>(word[upper], 0), four::<L, KEY>(word[upper], 1)]);
                    }
                }
            }
            _ => {
                for pair in words[0].as_chunks::<2>().0 {
                    let out = places.next(out);
                    for upper in 0..2 {
                        put(out, upper, eight::<L, KEY>([pair[0][upper], pair[1][upper]]));
                    }
                }
            }
        }
    }
}

/// The words of lanes 4 g to 4 g + 3 of a stripe.
#[inline(always)]
fn load<L: Lanes>(stripe: &[u8], g: usize) -> L {
    L::load(stripe[64 * g..][..64].try_into().expect("64 bytes"))
}

/// Stores vectors of both halves of m.
#[inline(always)]
fn put<L: Lanes>(out: &mut [u8; FRAGMENT], upper: usize, halves: [L; 2]) {
    for (half, vector) in halves.into_iter().enumerate() {
        let at = 128 * half + 64 * upper;
        vector.store((&mut out[at..at + 64]).try_into().expect("64 bytes"));
    }
}

/// Bits from `even` on to the even bytes, those from `odd` on to the odd ones; `mask`: of one code.
///
/// Each half of a word has the codes of an even or an odd row, whose byte 0 is of the lower half of k and byte 1 of the upper.
#[inline(always)]
fn halves<L: Lanes>(word: L, even: i32, odd: i32, mask: u32) -> L {
    let even = word.shifted(-even).and(L::splat(mask | mask << 16));
    even.or(word.shifted(8 - odd).and(L::splat(mask << 8 | mask << 24)))
}

/// Codes of 4 bits of one half of m.
#[inline(always)]
fn four<L: Lanes, const KEY: bool>(word: L, half: i32) -> L {
    if KEY {
        return halves(word, 8 * half, 8 * half + 4, 15);
    }
    word.shifted(-4 * half).and(L::splat(0x0F0F_0F0F))
}

/// Codes of 2 bits: of the even or the odd one of two fragments, and one half of m.
#[inline(always)]
fn two<L: Lanes, const KEY: bool>(word: L, odd: i32, half: i32) -> L {
    if KEY {
        return halves(word, 8 * half + 4 * odd, 8 * half + 4 * odd + 2, 3);
    }
    word.shifted(-(4 * odd + 2 * half)).and(L::splat(0x0303_0303))
}

/// Codes of 8 bits of both halves of m.
#[inline(always)]
fn eight<L: Lanes, const KEY: bool>(words: [L; 2]) -> [L; 2] {
    if !KEY {
        return words;
    }
    // Each word has one half of k.
    let (even, odd) = (L::splat(0x00FF_00FF), L::splat(0xFF00_FF00));
    [
        words[0].and(even).or(words[1].shifted(8).and(odd)),
        words[0].shifted(-8).and(even).or(words[1].and(odd)),
    ]
}

/// Codes of 3 bits, of a fragment that has a word of its own.
#[inline(always)]
fn three_of<L: Lanes, const KEY: bool>(word: L, half: i32) -> L {
    if KEY {
        halves(word, 3 + 6 * half, 6 + 6 * half, 7)
    } else {
        halves(word, 3 + 3 * half, 9 + 3 * half, 7)
    }
}

/// Codes of 3 bits of the fragment that shares the words of three others, both halves of m.
#[inline(always)]
fn rest_of<L: Lanes, const KEY: bool>(words: [L; 3]) -> [L; 2] {
    let (even, odd) = (L::splat(0x0007_0007), L::splat(0x0700_0700));
    // The last quarter of the codes, a bit in the highest place of each.
    let mut last = words[0].shifted(-7).and(L::splat(0x0100_0100));
    last = last.or(words[1].shifted(-6).and(L::splat(0x0200_0200)));
    last = last.or(words[2].shifted(-5).and(L::splat(0x0400_0400)));
    let (second, third) = if KEY { (words[2], words[1]) } else { (words[1], words[2]) };
    [words[0].and(even).or(second.shifted(8).and(odd)), third.and(even).or(last)]
}
