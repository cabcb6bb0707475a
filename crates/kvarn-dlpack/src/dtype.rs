//! The element types that kvarn exchanges.

use crate::abi::DataType;

/// Element type of a tensor that kvarn reads, writes or lends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// IEEE half.
    Float16,
    /// bfloat16.
    BFloat16,
    /// IEEE single.
    Float32,
    /// Bytes of records.
    UInt8,
    /// Table entries.
    Int32,
}

impl ElementType {
    /// Every type.
    pub const ALL: [Self; 5] = [Self::Float16, Self::BFloat16, Self::Float32, Self::UInt8, Self::Int32];

    /// The type in DLPack's terms.
    pub const fn data_type(self) -> DataType {
        let (code, bits) = match self {
            Self::Float16 => (2, 16),
            Self::BFloat16 => (4, 16),
            Self::Float32 => (2, 32),
            Self::UInt8 => (1, 8),
            Self::Int32 => (0, 32),
        };
        DataType { code, bits, lanes: 1 }
    }

    /// The type of `data_type`, if kvarn exchanges it.
    pub fn from_data_type(data_type: DataType) -> Option<Self> {
        Self::ALL.into_iter().find(|element| element.data_type() == data_type)
    }

    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        self.data_type().bits as usize / 8
    }
}
