//! The one error of this crate.

use crate::abi::{DataType, Device};

/// Why a lent tensor cannot be used. Texts name the offending value, what was expected, and the fix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The lender speaks another major version.
    #[error(
        "dlpack version {major}.{minor}: expected 1.x; use a release of the array library that speaks it"
    )]
    Version {
        /// Major number of the lender.
        major: u32,
        /// Minor number of the lender.
        minor: u32,
    },
    /// The memory cannot be reached by the CPU.
    #[error("device {0}: expected cpu; copy the tensor to the host first, as in .cpu()")]
    Device(Device),
    /// The memory is that of another device than the one asked for.
    #[error("device {got}: expected {expected}; move the tensor there, as in .to(\"{expected}\")")]
    OtherDevice {
        /// Where it is.
        got: Device,
        /// Where it was expected.
        expected: Device,
    },
    /// More or fewer dimensions than a tensor here may have.
    #[error("{0} dimensions: expected 0 to 8; reshape the tensor")]
    Dimensions(i32),
    /// An element type that kvarn does not exchange.
    #[error(
        "dtype {0}: expected float16, bfloat16, float32, uint8 or int32; convert the tensor, as in .to(torch.float16) or .astype(\"float16\")"
    )]
    ElementType(DataType),
    /// A size is negative, or the sizes multiply to more bytes than memory has.
    #[error("shape {0:?}: expected sizes of 0 or more and fewer than 2^63 bytes; the exporter is faulty")]
    Shape(Vec<i64>),
    /// Elements, but nowhere.
    #[error("null data of {0} elements: expected memory; the tensor has none (a fake or freed tensor)")]
    NullData(usize),
    /// The first element is not at a multiple of its size.
    #[error("data at {address:#x}: expected a multiple of {bytes} bytes; copy the array to aligned memory")]
    Alignment {
        /// Address of the first element.
        address: usize,
        /// Bytes of an element.
        bytes: usize,
    },
    /// A legacy structure cannot say that its memory is read-only.
    #[error(
        "read-only memory: expected a consumer of dlpack 1.0 or newer; import it with a newer array library"
    )]
    ReadOnlyLegacy,
}
