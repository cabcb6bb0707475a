//! Codes of a fragment as vectors of bytes: what a product reads.
//!
//! Of a fragment of 16 × 16 codes there is a vector for each c from 0 to 3: lane m has the codes of column m, of rows 2 c,
//! 8 + 2 c, 2 c + 1 and 9 + 2 c. Words are those of `turned`: lanes 0 to 7 and 8 to 15, the halves of m, come of the same
//! words, or for some of words that lie apart. Where bits lie: `kvarn::record::CodeOrder`.

use super::turned::word;
use crate::lanes::Lanes;

/// Turned codes of a matrix.
#[derive(Clone, Copy)]
pub(super) struct Codes<'a> {
    /// Words.
    pub turned: &'a [u8],
    /// Fragments from one to the next whose rows come behind its own.
    pub step: usize,
    /// From one to the next with other columns.
    pub turn: usize,
}

/// Splits of the bits of a word in halves of 16: the lower have the codes of even rows, the upper those of odd ones.
const fn both(bits: u32) -> u32 {
    bits | bits << 16
}

/// `lower` in lanes 0 to 7, `upper` in the others.
#[inline(always)]
fn halves<L: Lanes>(lower: u32, upper: u32) -> L {
    let mut bytes = [0; 64];
    for (lane, bytes) in bytes.chunks_exact_mut(4).enumerate() {
        bytes.copy_from_slice(&if lane < 8 { lower } else { upper }.to_le_bytes());
    }
    L::load(&bytes)
}

impl Codes<'_> {
    /// Whether `vector` is to take all words of `fragment` from those of others.
    #[inline(always)]
    pub(super) const fn shares<const BITS: usize>(fragment: usize) -> bool {
        BITS == 3 && fragment % 4 == 3
    }

    /// The vector of fragment `fragment`, which `SHARES` its words or not, and `c`.
    #[inline(always)]
    pub(super) fn vector<L: Lanes, const BITS: usize, const KEY: bool, const SHARES: bool>(
        &self,
        fragment: usize,
        c: usize,
    ) -> L {
        match (BITS, KEY) {
            (2, true) => {
                let word = self.moved::<L>(fragment / 2, c, [0, 8], 4 * (fragment % 2));
                word.and(L::splat(both(3))).or(word.shifted(6).and(L::splat(both(3 << 8))))
            }
            (2, false) => {
                let word = self.moved::<L>(fragment / 2, c, [0, 2], 4 * (fragment % 2));
                word.and(L::splat(both(3 | 3 << 8)))
            }
            (3, _) if SHARES => self.rest::<L, KEY>(fragment / 4 * 3, c),
            (3, true) => {
                let word = self.moved::<L>(fragment / 4 * 3 + fragment % 4, c, [3, 9], 0);
                word.and(L::splat(both(7))).or(word.shifted(5).and(L::splat(both(7 << 8))))
            }
            (3, false) => {
                let word = self.moved::<L>(fragment / 4 * 3 + fragment % 4, c, [3, 6], 0);
                word.and(L::splat(both(7))).or(word.shifted(2).and(L::splat(both(7 << 8))))
            }
            (4, true) => {
                let word = self.moved::<L>(fragment, c, [0, 8], 0);
                word.and(L::splat(both(15))).or(word.shifted(4).and(L::splat(both(15 << 8))))
            }
            (4, false) => self.moved::<L>(fragment, c, [0, 4], 0).and(L::splat(both(15 | 15 << 8))),
            (_, true) => {
                // Each word has one half of the rows.
                let (low, high) = (2 * fragment, 2 * fragment + 1);
                let (low, high) = (self.moved::<L>(low, c, [0, 8], 0), self.moved::<L>(high, c, [0, 8], 0));
                low.and(L::splat(both(255))).or(high.shifted(8).and(L::splat(both(255 << 8))))
            }
            // And here one half of the columns.
            (_, false) => {
                let [a, b] = word(self.turned, 2 * fragment, c);
                let [d, e] = word(self.turned, 2 * fragment + 1, c);
                L::joined([a, b, d, e])
            }
        }
    }

    /// A word for both halves of m, its bits moved down as far as each wants, and `more`.
    #[inline(always)]
    fn moved<L: Lanes>(&self, index: usize, c: usize, [lower, upper]: [u32; 2], more: usize) -> L {
        let [even, odd] = word(self.turned, index, c);
        L::alternating(even, odd).moved_down(halves::<L>(lower, upper).add(L::splat(more as u32)))
    }

    /// Codes of 3 bits of the fragment that shares the words of three others, `first` and the two behind it.
    #[inline(always)]
    fn rest<L: Lanes, const KEY: bool>(&self, first: usize, c: usize) -> L {
        let [a, b] = word(self.turned, first, c);
        let [d, e] = word(self.turned, first + 1, c);
        let [f, g] = word(self.turned, first + 2, c);
        let (second, third) = (L::alternating(d, e), L::alternating(f, g));
        // A quarter of the codes lies in the highest bits of all three, the other three in the lowest of one each.
        let mut last = L::alternating(a, b).shifted(-7).and(halves::<L>(0, both(1 << 8)));
        last = last.or(second.shifted(-6).and(halves::<L>(0, both(1 << 9))));
        last = last.or(third.shifted(-5).and(halves::<L>(0, both(1 << 10))));
        let (joined, lower) =
            if KEY { (L::joined([a, b, d, e]), third) } else { (L::joined([a, b, f, g]), second) };
        let lower = lower.shifted(8).and(halves::<L>(both(7 << 8), 0));
        joined.and(L::splat(both(7))).or(lower).or(last)
    }
}
