//! The structures of `dlpack.h`, version 1.3, field by field.

use std::ffi::c_void;
use std::fmt;

/// Version that this crate writes. Versions with the same major number have the same layout.
pub const VERSION: PackVersion = PackVersion { major: 1, minor: 3 };

/// `DLPackVersion`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackVersion {
    /// Changes with the layout.
    pub major: u32,
    /// Changes with added enumeration values.
    pub minor: u32,
}

/// `DLDevice`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// `DLDeviceType`.
    pub device_type: i32,
    /// Index of the device; 0 for the CPU.
    pub device_id: i32,
}

impl Device {
    /// Host memory.
    pub const CPU: Self = Self { device_type: 1, device_id: 0 };

    /// Memory of the CUDA device with this index.
    pub const fn cuda(index: i32) -> Self {
        Self { device_type: 2, device_id: index }
    }

    /// Whether the memory can be read by the CPU as it is: host memory, pinned or not.
    pub const fn is_host(self) -> bool {
        matches!(self.device_type, 1 | 3 | 11)
    }
}

impl fmt::Display for Device {
    /// The name that PyTorch users know, where there is one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.device_type {
            1 => return f.write_str("cpu"),
            2 => "cuda",
            3 => "cuda_host",
            8 => "mps",
            10 => "rocm",
            11 => "rocm_host",
            13 => "cuda_managed",
            14 => "xpu",
            other => return write!(f, "dlpack_device_{other}:{}", self.device_id),
        };
        write!(f, "{name}:{}", self.device_id)
    }
}

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataType {
    /// `DLDataTypeCode`.
    pub code: u8,
    /// Bits of one lane.
    pub bits: u8,
    /// Lanes of a vector type; 1 for scalars.
    pub lanes: u16,
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.code {
            0 => "int",
            1 => "uint",
            2 => "float",
            4 => "bfloat",
            5 => "complex",
            6 => return f.write_str("bool"),
            7..=14 => return f.write_str("float8"),
            other => return write!(f, "dlpack_type_{other} of {} bits", self.bits),
        };
        write!(f, "{name}{}", self.bits)?;
        if self.lanes == 1 { Ok(()) } else { write!(f, "x{}", self.lanes) }
    }
}

/// `DLTensor`: memory, its shape and its strides; owns nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    /// Start of the memory; may be null if the tensor is empty.
    pub data: *mut c_void,
    /// Where the memory lies.
    pub device: Device,
    /// Number of dimensions.
    pub ndim: i32,
    /// Element type.
    pub dtype: DataType,
    /// `ndim` sizes; may be null if `ndim` is 0.
    pub shape: *mut i64,
    /// `ndim` strides in elements; null: compact, row major (before version 1.2).
    pub strides: *mut i64,
    /// Bytes from `data` to the first element.
    pub byte_offset: u64,
}

/// `DLManagedTensor`, of versions before 1.0: a tensor and the way to give it back.
#[repr(C)]
#[derive(Debug)]
pub struct ManagedTensor {
    /// The tensor.
    pub dl_tensor: Tensor,
    /// The lender's.
    pub manager_ctx: *mut c_void,
    /// Frees the structure and ends the loan; may be null.
    pub deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
}

/// `DLManagedTensorVersioned`: a tensor and the way to give it back.
#[repr(C)]
#[derive(Debug)]
pub struct ManagedTensorVersioned {
    /// Version of the lender. With another major number only `deleter` may be used.
    pub version: PackVersion,
    /// The lender's.
    pub manager_ctx: *mut c_void,
    /// Frees the structure and ends the loan; may be null.
    pub deleter: Option<unsafe extern "C" fn(*mut ManagedTensorVersioned)>,
    /// [`FLAG_READ_ONLY`] and others.
    pub flags: u64,
    /// The tensor.
    pub dl_tensor: Tensor,
}

/// `DLPACK_FLAG_BITMASK_READ_ONLY`.
pub const FLAG_READ_ONLY: u64 = 1;

#[cfg(all(test, target_pointer_width = "64"))]
mod tests {
    use std::mem::{align_of, offset_of, size_of};

    use super::*;

    #[test]
    fn the_layout_is_that_of_the_header() {
        assert_eq!((size_of::<PackVersion>(), size_of::<Device>(), size_of::<DataType>()), (8, 8, 4));
        assert_eq!((size_of::<Tensor>(), align_of::<Tensor>()), (48, 8));
        assert_eq!(offset_of!(Tensor, data), 0);
        assert_eq!(offset_of!(Tensor, device), 8);
        assert_eq!(offset_of!(Tensor, ndim), 16);
        assert_eq!(offset_of!(Tensor, dtype), 20);
        assert_eq!(offset_of!(Tensor, shape), 24);
        assert_eq!(offset_of!(Tensor, strides), 32);
        assert_eq!(offset_of!(Tensor, byte_offset), 40);
        assert_eq!(size_of::<ManagedTensor>(), 64);
        assert_eq!(offset_of!(ManagedTensor, manager_ctx), 48);
        assert_eq!(offset_of!(ManagedTensor, deleter), 56);
        assert_eq!(size_of::<ManagedTensorVersioned>(), 80);
        assert_eq!(offset_of!(ManagedTensorVersioned, manager_ctx), 8);
        assert_eq!(offset_of!(ManagedTensorVersioned, deleter), 16);
        assert_eq!(offset_of!(ManagedTensorVersioned, flags), 24);
        assert_eq!(offset_of!(ManagedTensorVersioned, dl_tensor), 32);
    }

    #[test]
    fn names_are_those_of_array_libraries() {
        let data_type = |code, bits, lanes| DataType { code, bits, lanes }.to_string();
        assert_eq!(data_type(2, 64, 1), "float64");
        assert_eq!(data_type(4, 16, 1), "bfloat16");
        assert_eq!(data_type(0, 8, 4), "int8x4");
        assert_eq!(data_type(6, 8, 1), "bool");
        assert_eq!(Device::CPU.to_string(), "cpu");
        assert_eq!(Device { device_type: 2, device_id: 3 }.to_string(), "cuda:3");
        assert!(!Device { device_type: 2, device_id: 0 }.is_host());
    }
}
