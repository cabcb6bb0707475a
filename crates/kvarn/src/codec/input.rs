//! What happens to values before they are stored: non-finite ones become 0, rotated ones take the slot's type.

use crate::{Saturation, round_to_half};

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

/// Largest magnitude that a record can decode to, 65504², rounded down to a power of two.
const RECORD_MAX: f32 = 4_294_967_296.0 / 2.0;

/// Replaces every NaN and infinity by 0 and returns how many there were. To be done before rotating: a rotation would
/// spread them over the head.
#[inline]
pub fn zero_non_finite(values: &mut [f32]) -> u64 {
    let mut count = 0;
    for value in values {
        if !value.is_finite() {
            *value = 0.0;
            count += 1;
        }
    }
    count
}

/// Rounds rotated values to what a slot of type `slot` would hold, so that tiles encoded directly and tiles sealed from
/// slots agree. float32 values saturate (counted) at ±2³¹, about the largest that a record can represent.
#[inline]
pub fn round_to_slot(values: &mut [f32], slot: SlotType, saturation: &mut Saturation) {
    match slot {
        SlotType::Float16 => {
            for value in values {
                *value = round_to_half(*value, saturation).to_f32();
            }
        }
        SlotType::Float32 => {
            for value in values {
                if value.abs() > RECORD_MAX {
                    saturation.0 += 1;
                    *value = RECORD_MAX.copysign(*value);
                }
            }
        }
    }
}
