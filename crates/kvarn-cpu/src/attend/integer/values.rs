//! Weighted sums of a record's values: codes of V, whose rows are tokens and whose columns are channels.
//!
//! Of 64 bytes of codes each lane has four tokens of one channel (or of several, a few bits each), and lanes w, w + 4, w + 8
//! and w + 12 have the other tokens of its slice of 16. What is summed over slices stays in vectors.

use kvarn::record::MatrixLayout;

use super::factors::{BASE, Factors};
use super::lanes::Lanes;

/// Columns of the product that share an unpacking of codes.
const TOGETHER: usize = 2;
/// Slices of 16 tokens, at most.
const MOST_STEPS: usize = 8;

/// Integer sums of every channel: `sums[column][channel]`.
#[inline(always)]
pub(super) fn sum_values<L: Lanes, const BITS: u32, const WIDE: bool, const KINDS: usize>(
    layout: &MatrixLayout,
    codes: &[u8],
    factors: &[Factors],
    sums: &mut [Vec<i32>],
) {
    let (slices, blocks) = (layout.rows / 16, layout.columns / 16);
    // Words of a lane in a slice, groups of four words that a slice takes, and slices that share a group of four.
    let words = blocks * BITS as usize / 4;
    let (groups, shared) = (words.div_ceil(4), 4 / words.min(4));
    let steps = slices / shared;
    for (factors, sums) in factors.chunks(TOGETHER).zip(sums.chunks_mut(TOGETHER)) {
        // A column too many is computed and not kept.
        let mut tables = [[[L::splat(0); MOST_STEPS]; 2]; TOGETHER];
        for (column, tables) in tables.iter_mut().enumerate() {
            let factors = &factors[column.min(factors.len() - 1)];
            for (part, made) in tables.iter_mut().enumerate() {
                table(factors, part == 1, shared, &mut made[..steps]);
            }
        }
        for group in 0..groups {
            // By column, w, kind, g.
            let mut found = [[[[0; 8]; KINDS]; 4]; TOGETHER];
            for g in 0..8 {
                let mut high = [[L::splat(0); KINDS]; TOGETHER];
                let mut low = [[L::splat(0); KINDS]; TOGETHER];
                for step in 0..steps {
                    let at = 512 * (step * groups + group) + 64 * g;
                    let unpacked =
                        unpack::<L, BITS, KINDS>(L::load(codes[at..at + 64].try_into().expect("64 bytes")));
                    for column in 0..TOGETHER {
                        let [upper, lower] = [tables[column][0][step], tables[column][1][step]];
                        for kind in 0..KINDS {
                            high[column][kind] = high[column][kind].dot::<WIDE>(unpacked[kind], upper);
                            low[column][kind] = low[column][kind].dot::<WIDE>(unpacked[kind], lower);
                        }
                    }
                }
                for column in 0..TOGETHER {
                    for kind in 0..KINDS {
                        let sum = high[column][kind].times(BASE).add(low[column][kind]).quarter_sums();
                        for w in 0..4 {
                            found[column][w][kind][g] = sum[w];
                        }
                    }
                }
            }
            for (sums, found) in sums.iter_mut().zip(&mut found) {
                if words == 2 {
                    // Lanes w and w + 2 have the same channels, of two slices.
                    let (kept, others) = found.split_at_mut(2);
                    for (kept, other) in kept
                        .as_flattened_mut()
                        .as_flattened_mut()
                        .iter_mut()
                        .zip(others.as_flattened().as_flattened())
                    {
                        *kept += other;
                    }
                }
                for (w, kinds) in found.iter().enumerate().take(words) {
                    for (kind, found) in kinds.iter().enumerate() {
                        sums[channel(BITS, 4 * group + w, kind)..][..8].copy_from_slice(found);
                    }
                }
            }
        }
    }
}

/// Codes of four tokens a lane, in bytes in dword order.
#[inline(always)]
fn unpack<L: Lanes, const BITS: u32, const KINDS: usize>(words: L) -> [L; KINDS] {
    let mask = L::splat(0x0101_0101 * ((1 << BITS) - 1));
    let mut made = [words; KINDS];
    if BITS == 8 {
        return made;
    }
    made[0] = words.and(mask);
    if BITS == 4 {
        made[1] = words.shift_right::<4>().and(mask);
    } else {
        made[1] = words.shift_right::<2>().and(mask);
        made[2] = words.shift_right::<4>().and(mask);
        made[3] = words.shift_right::<6>().and(mask);
    }
    made
}

/// The first channel, to which g is added, of word `word` of a slice.
#[inline(always)]
const fn channel(bits: u32, word: usize, kind: usize) -> usize {
    match bits {
        8 => 16 * (word / 2) + 8 * (word % 2),
        4 => 16 * word + 8 * kind,
        _ => 16 * (2 * word + kind / 2) + 8 * (kind % 2),
    }
}

/// High or low factors: for each step those of its slices, of which `shared` share four words.
#[inline(always)]
fn table<L: Lanes>(factors: &Factors, low: bool, shared: usize, made: &mut [L]) {
    for (step, made) in made.iter_mut().enumerate() {
        let mut bytes = [0; 64];
        bytes[..16].copy_from_slice(factors.block(low, step * shared));
        *made = if shared == 1 {
            L::permuted(&bytes, &[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
        } else {
            bytes[16..32].copy_from_slice(factors.block(low, step * shared + 1));
            L::permuted(&bytes, &[0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7])
        };
    }
}
