//! Callers' tensors on the device.

use kvarn::DType;
use kvarn::pool::TensorShape;

use crate::params;

/// A tensor `[rows, heads, head_dim]` on the pool's device, the last dimension contiguous.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTensor {
    address: u64,
    dtype: DType,
    shape: [usize; 3],
    strides: [isize; 2],
}

impl DeviceTensor {
    /// A tensor at `address` with `strides` in elements.
    ///
    /// # Safety
    /// Every element that shape and strides reach lies in memory of the device of the pool that it is passed to, until
    /// the work that reads or writes it has run; what is written is nobody else's meanwhile.
    ///
    /// # Panics
    /// If the last dimension is not contiguous.
    pub unsafe fn from_raw(address: u64, dtype: DType, shape: [usize; 3], strides: [isize; 3]) -> Self {
        assert!(strides[2] == 1 || shape[2] <= 1, "the last dimension must be contiguous");
        Self { address, dtype, shape, strides: [strides[0], strides[1]] }
    }

    /// Extents.
    pub const fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Element type.
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) const fn description(&self) -> TensorShape {
        TensorShape { shape: self.shape, dtype: self.dtype }
    }

    /// Whether every row starts at a multiple of `bytes`.
    pub(crate) fn is_aligned(&self, bytes: usize) -> bool {
        let [rows, heads] = self.strides.map(|stride| stride.unsigned_abs() * self.dtype.bytes());
        let used = |extent: usize, stride: usize| extent <= 1 || stride.is_multiple_of(bytes);
        self.address.is_multiple_of(bytes as u64) && used(self.shape[0], rows) && used(self.shape[1], heads)
    }

    pub(crate) const fn parameter(&self) -> params::Tensor {
        params::Tensor {
            data: self.address,
            row_stride: self.strides[0] as i64,
            head_stride: self.strides[1] as i64,
        }
    }
}

/// The kernels' number of an element type.
pub(crate) const fn dtype_number(dtype: DType) -> i32 {
    match dtype {
        DType::Float16 => 0,
        DType::BFloat16 | DType::Float32 => 1,
    }
}
