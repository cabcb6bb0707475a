//! Element types of callers' tensors.

use crate::codec::SlotType;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE half.
    Float16,
    /// bfloat16.
    BFloat16,
    /// float32.
    Float32,
}

impl DType {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Float16 | Self::BFloat16 => 2,
            Self::Float32 => 4,
        }
    }

    /// The slot type in which values of this type are cached.
    pub const fn slot_type(self) -> SlotType {
        match self {
            Self::Float16 | Self::BFloat16 => SlotType::Float16,
            Self::Float32 => SlotType::Float32,
        }
    }

    /// Name, as frameworks write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Float16 => "float16",
            Self::BFloat16 => "bfloat16",
            Self::Float32 => "float32",
        }
    }
}
