//! What happens to values before they are stored: non-finite ones become 0, rotated ones take the slot's type.

use super::EncodeCounts;
use crate::{Saturation, saturates, through_half};

/// Element type of a slot, hence of what the encoder sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotType {
    /// IEEE half: for fp16 and bf16 input.
    Float16,
    /// float32: for float32 input, on the CPU.
    Float32,
}

impl SlotType {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Float16 => 2,
            Self::Float32 => 4,
        }
    }
}

/// Inputs are cut here, so that sums of squares of a rotated tile stay finite in float32.
const INPUT_MAX: f32 = (1u64 << 48) as f32;

/// No rotated value of a cut input is beyond this: a rotation makes a value at most √256 times larger.
const ROTATED_MAX: f32 = 16.0 * INPUT_MAX;

/// Replaces every NaN and infinity by 0 and cuts what is beyond ±2⁴⁸. To be done before rotating: a rotation would spread
/// them over the head. Returns the counts of both.
#[inline(always)]
pub fn finite(values: &mut [f32]) -> EncodeCounts {
    finite_within(values, INPUT_MAX)
}

/// [`finite`] for values in the rotated frame, which leaves those alone that come of a cut input.
#[inline(always)]
pub(super) fn finite_rotated(values: &mut [f32]) -> EncodeCounts {
    finite_within(values, ROTATED_MAX)
}

#[inline(always)]
fn finite_within(values: &mut [f32], max: f32) -> EncodeCounts {
    let mut counts = EncodeCounts::default();
    // NaN and infinity have larger bits than any number: one comparison tells whether there is anything to do.
    let largest = values.iter().fold(0, |largest, value| value.abs().to_bits().max(largest));
    if largest <= max.to_bits() {
        return counts;
    }
    for value in values {
        if !value.is_finite() {
            *value = 0.0;
            counts.non_finite += 1;
        } else if value.abs() > max {
            *value = max.copysign(*value);
            counts.saturated += 1;
        }
    }
    counts
}

/// Rounds rotated values to what a slot of type `slot` would hold, so that tiles encoded directly and tiles sealed from
/// slots agree.
#[inline(always)]
pub fn round_to_slot(values: &mut [f32], slot: SlotType, saturation: &mut Saturation) {
    if slot == SlotType::Float16 {
        // Counted in 32 bits, which vectorise.
        saturation.0 += u64::from(values.iter().map(|&value| u32::from(saturates(value))).sum::<u32>());
        for value in values {
            *value = through_half(*value);
        }
    }
}
