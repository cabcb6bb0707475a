//! The rotation along the head dim: block-diagonal Sylvester Hadamard, natural order, no signs.
//!
//! Symmetric and its own inverse (arXiv 2606.03458, section 3). A head dim that is no power of two is cut greedily into
//! powers of two: 96 = 64 + 32, 80 = 64 + 16.

use super::lanes::LANES;
use crate::HEAD_DIMS;

/// Elements of the largest block.
const LARGEST: usize = *HEAD_DIMS.end();

/// The rotation of one head dim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Block sizes, descending powers of two that add up to the head dim.
    blocks: Vec<usize>,
}

impl Rotation {
    /// The rotation for heads of `head_dim` channels.
    ///
    /// # Panics
    /// If `head_dim` is no multiple of 16.
    pub fn new(head_dim: usize) -> Self {
        assert!(head_dim.is_multiple_of(LANES), "head dim {head_dim}: expected a multiple of {LANES}");
        let bits = (0..usize::BITS).rev().map(|bit| 1 << bit);
        Self { blocks: bits.filter(|block| head_dim & block != 0).collect() }
    }

    /// Rotates one head vector in place. The inverse is the same call.
    ///
    /// Butterflies with strides 1, 2, 4 … and one multiplication by `1/sqrt(block)`, in this order: every float32
    /// implementation that keeps it gives the same bits.
    ///
    /// # Panics
    /// If `vector` is shorter than the head dim.
    #[inline(always)]
    pub fn apply(&self, vector: &mut [f32]) {
        let mut rest = vector;
        for &block in &self.blocks {
            let (part, tail) = rest.split_at_mut(block);
            butterflies(part);
            let scale = (1.0 / (block as f64).sqrt()) as f32;
            for value in part.iter_mut() {
                *value *= scale;
            }
            rest = tail;
        }
    }
}

#[inline(always)]
fn butterflies(part: &mut [f32]) {
    for stride in [1, 2, 4, 8] {
        short_butterflies(part, stride);
    }
    let mut stride = LANES;
    while stride < part.len() {
        for pair in part.chunks_exact_mut(2 * stride) {
            let (low, high) = pair.split_at_mut(stride);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        stride *= 2;
    }
}

/// Butterflies shorter than a vector register: every element's neighbours are read at both distances, one of which counts.
#[inline(always)]
fn short_butterflies(part: &mut [f32], stride: usize) {
    let mut padded = [0.0; LARGEST + 2 * LANES];
    padded[LANES..LANES + part.len()].copy_from_slice(part);
    let below = &padded[LANES - stride..][..part.len()];
    let above = &padded[LANES + stride..][..part.len()];
    for (index, ((value, below), above)) in part.iter_mut().zip(below).zip(above).enumerate() {
        *value = if index & stride == 0 { *value + above } else { below - *value };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_block_diagonal_hadamard_matrix() {
        for head_dim in (16..=256).step_by(16) {
            let rotation = Rotation::new(head_dim);
            let mut first = 0;
            for &block in &rotation.blocks {
                for column in 0..block {
                    let mut unit = vec![0.0; head_dim];
                    unit[first + column] = 1.0;
                    rotation.apply(&mut unit);
                    for (row, &value) in unit.iter().enumerate() {
                        let inside = (first..first + block).contains(&row);
                        let sign = if ((row.wrapping_sub(first)) & column).count_ones() % 2 == 0 {
                            1.0
                        } else {
                            -1.0
                        };
                        let expected = if inside { sign / (block as f32).sqrt() } else { 0.0 };
                        assert!((value - expected).abs() < 1e-6, "{head_dim} {row} {column}");
                    }
                }
                first += block;
            }
            assert_eq!(first, head_dim);
        }
    }
}
