//! Transposition of a tile: K is quantised per channel.

use super::lanes::{self, LANES};

/// `out[j][i] = m[i][j]` for `m` `[_, columns]`, both sizes multiples of 16: in squares of 16 that stay in registers.
#[inline(always)]
pub(super) fn transpose(m: &[f32], columns: usize, out: &mut [f32]) {
    let rows = m.len() / columns;
    for row in (0..rows).step_by(LANES) {
        for column in (0..columns).step_by(LANES) {
            let mut square = [[0.0; LANES]; LANES];
            for (index, lanes) in square.iter_mut().enumerate() {
                lanes.copy_from_slice(&m[(row + index) * columns + column..][..LANES]);
            }
            let square = lanes::transpose(square);
            for (index, lanes) in square.iter().enumerate() {
                out[(column + index) * rows + row..][..LANES].copy_from_slice(lanes);
            }
        }
    }
}
