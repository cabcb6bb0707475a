//! Packed codes, turned so that what eight columns hold for the same rows lies together.
//!
//! A record's codes lie as tensor cores want them (`kvarn::record::CodeOrder`): lane 4 g + c of a fragment's word holds the
//! codes of columns g and g + 8 and of rows 2 c, 2 c + 1, 2 c + 8 and 2 c + 9. Turned, words come one after the other, of a
//! word g from 0 to 3, then from 4 to 7, of these c by c, of a c its four g side by side: what is summed by rows is then not
//! spread over lanes.

use crate::lanes::Lanes;

/// Bytes of four words of all lanes.
const STRIPE: usize = 512;
/// Words of a stripe: those of a lane lie side by side.
const WORDS: usize = 4;
/// Bytes of a word of all lanes.
const WORD: usize = 128;

/// Whether codes of `words` words can be turned.
pub(super) const fn serves(words: usize) -> bool {
    words.is_multiple_of(WORDS)
}

/// Turns codes.
#[inline(always)]
pub(super) fn turn<L: Lanes>(codes: &[u8], out: &mut [u8]) {
    for (codes, out) in codes.as_chunks::<STRIPE>().0.iter().zip(out.as_chunks_mut::<STRIPE>().0) {
        for half in 0..2 {
            let mut lanes = [L::splat(0); WORDS];
            for g in 0..4 {
                lanes[g] = L::load(codes[64 * (4 * half + g)..][..64].try_into().expect("64 bytes"));
            }
            let words = L::transposed(lanes);
            for word in 0..WORDS {
                let out = &mut out[WORD * word + 64 * half..][..64];
                words[word].store(out.try_into().expect("64 bytes"));
            }
        }
    }
}

/// A word's dwords of c: of g from 0 to 3, and from 4 to 7.
#[inline(always)]
pub(super) fn word(turned: &[u8], word: usize, c: usize) -> [&[u8; 16]; 2] {
    let word: &[u8; WORD] = turned[WORD * word..][..WORD].try_into().expect("a word");
    let (lower, upper) = (&word[16 * c..][..16], &word[64 + 16 * c..][..16]);
    [lower.try_into().expect("four dwords"), upper.try_into().expect("four dwords")]
}
