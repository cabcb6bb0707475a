//! Unrounded parameters of a matrix on their way to the stored halves.

use half::f16;

use super::guard::RangeGuard;
use crate::{Saturation, round_to_half, through_half};

/// Row scale and zero point, column scale: float32, before rounding.
#[derive(Clone, Debug)]
pub(super) struct Parameters {
    pub row_scale: Vec<f32>,
    pub row_zero: Vec<f32>,
    pub column_scale: Vec<f32>,
}

impl Parameters {
    pub(super) fn new(rows: usize, columns: usize) -> Self {
        Self { row_scale: vec![0.0; rows], row_zero: vec![0.0; rows], column_scale: vec![0.0; columns] }
    }

    /// Moves the range guard's power of two from rows to columns.
    pub(super) fn guard(&mut self) {
        RangeGuard::new(&self.row_scale, &self.row_zero, &self.column_scale).apply(
            &mut self.row_scale,
            &mut self.row_zero,
            &mut self.column_scale,
        );
    }
}

/// Rounds to half, saturating (counted).
#[inline(always)]
pub(super) fn round(values: &[f32], halves: &mut [f16], saturation: &mut Saturation) {
    for (half, &value) in halves.iter_mut().zip(values) {
        *half = round_to_half(value, saturation);
    }
}

/// Replaces values by what their halves hold. What saturates here is counted when the final value is stored.
#[inline(always)]
pub(super) fn round_in_place(values: &mut [f32]) {
    for value in values {
        *value = through_half(*value);
    }
}
