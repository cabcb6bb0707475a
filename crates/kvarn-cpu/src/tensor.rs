//! Borrowed tensors of callers: three dimensions, any strides of the outer two, the last one contiguous.

use std::marker::PhantomData;

use kvarn::DType;
use kvarn::pool::TensorShape;

use crate::dtype::{load, store};

/// A tensor to read: `[tokens, heads, head_dim]`, or `[tiles, group, head_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    data: *const u8,
    dtype: DType,
    shape: [usize; 3],
    strides: [isize; 2],
    lifetime: PhantomData<&'a [u8]>,
}

/// A tensor to write.
#[derive(Debug)]
pub struct TensorMut<'a> {
    data: *mut u8,
    dtype: DType,
    shape: [usize; 3],
    strides: [isize; 2],
    lifetime: PhantomData<&'a mut [u8]>,
}

// SAFETY: reading shared memory from several threads is sound; `from_raw` makes the caller vouch for the memory.
unsafe impl Send for TensorRef<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorRef<'_> {}
// SAFETY: threads of this crate write disjoint rows (`store_row`'s contract); the caller vouches for the memory.
unsafe impl Send for TensorMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorMut<'_> {}

impl TensorRef<'_> {
    /// A tensor of `shape` with `strides` in elements.
    ///
    /// # Safety
    /// Every element that shape and strides reach lies in memory that is readable for `'a`.
    ///
    /// # Panics
    /// If the last dimension is not contiguous.
    pub unsafe fn from_raw(data: *const u8, dtype: DType, shape: [usize; 3], strides: [isize; 3]) -> Self {
        assert!(strides[2] == 1 || shape[2] <= 1, "the last dimension must be contiguous");
        Self { data, dtype, shape, strides: [strides[0], strides[1]], lifetime: PhantomData }
    }

    /// Element type.
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents.
    pub const fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Shape and type, for the checks that all backends share.
    pub(crate) const fn description(&self) -> TensorShape {
        TensorShape { shape: self.shape, dtype: self.dtype }
    }

    /// Reads row `[i, j, :]`.
    pub(crate) fn load_row(&self, i: usize, j: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.shape[2]);
        // SAFETY: as many elements as the row has.
        unsafe { load(self.dtype, self.row(i, j).as_ptr(), out) }
    }

    /// Bytes from row (`i`, `j`) to (`i + 1`, `j`) and to (`i`, `j + 1`).
    pub(crate) const fn steps(&self) -> [isize; 2] {
        let bytes = self.dtype.bytes() as isize;
        [self.strides[0] * bytes, self.strides[1] * bytes]
    }

    /// The bytes of row (`i`, `j`).
    pub(crate) fn row(&self, i: usize, j: usize) -> &[u8] {
        assert!(i < self.shape[0] && j < self.shape[1]);
        let offset = i as isize * self.strides[0] + j as isize * self.strides[1];
        let bytes = self.dtype.bytes();
        // SAFETY: the row lies within the tensor, which `from_raw`'s caller vouched for.
        unsafe {
            std::slice::from_raw_parts(self.data.offset(offset * bytes as isize), self.shape[2] * bytes)
        }
    }
}

impl TensorMut<'_> {
    /// A tensor of `shape` with `strides` in elements.
    ///
    /// # Safety
    /// Every element that shape and strides reach lies in memory that is writable for the lifetime, that nobody else
    /// reads or writes meanwhile, and no two elements overlap.
    ///
    /// # Panics
    /// If the last dimension is not contiguous.
    pub unsafe fn from_raw(data: *mut u8, dtype: DType, shape: [usize; 3], strides: [isize; 3]) -> Self {
        assert!(strides[2] == 1 || shape[2] <= 1, "the last dimension must be contiguous");
        Self { data, dtype, shape, strides: [strides[0], strides[1]], lifetime: PhantomData }
    }

    /// Element type.
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents.
    pub const fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Writes row `[i, j, :]`.
    ///
    /// # Safety
    /// No other thread writes or reads this row meanwhile.
    pub(crate) unsafe fn store_row(&self, i: usize, j: usize, values: &[f32]) {
        assert!(i < self.shape[0] && j < self.shape[1] && values.len() == self.shape[2]);
        let offset = i as isize * self.strides[0] + j as isize * self.strides[1];
        // SAFETY: the row lies within the tensor, which `from_raw`'s caller vouched for.
        unsafe { store(self.dtype, values, self.data.offset(offset * self.dtype.bytes() as isize)) }
    }
}
