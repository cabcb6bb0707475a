//! Lending memory of ours.

use std::any::Any;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::abi::{Device, FLAG_READ_ONLY, ManagedTensor, ManagedTensorVersioned, Tensor, VERSION};
use crate::{ElementType, Error};

/// Host memory to be lent, compact and row major. The owner lives until the last borrower is done, on whatever thread.
#[derive(Clone)]
pub struct Export {
    data: NonNull<u8>,
    element: ElementType,
    shape: Vec<i64>,
    device: Device,
    read_only: bool,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: `data` belongs to `owner`, which is `Send + Sync`; this type never reads or writes through it.
unsafe impl Send for Export {}
// SAFETY: as above.
unsafe impl Sync for Export {}

impl Export {
    /// Memory at `data`, kept alive by `owner`.
    ///
    /// # Safety
    /// `data` is aligned for `element` and holds as many elements as `shape` says for as long as `owner` lives. Unless
    /// `read_only`, it may be written at any time by whoever borrows it, so nothing may hold a Rust reference to it.
    pub unsafe fn new(
        data: NonNull<u8>,
        element: ElementType,
        shape: &[usize],
        read_only: bool,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let shape = shape.iter().map(|&size| size as i64).collect();
        Self { data, element, shape, device: Device::CPU, read_only, owner }
    }

    /// The same memory, which lies on `device`.
    #[must_use]
    pub fn on(self, device: Device) -> Self {
        Self { device, ..self }
    }

    /// Where the memory lies.
    pub const fn device(&self) -> Device {
        self.device
    }

    /// Element type.
    pub const fn element(&self) -> ElementType {
        self.element
    }

    /// Sizes.
    pub fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// Whether borrowers must not write.
    pub const fn read_only(&self) -> bool {
        self.read_only
    }

    /// Lends the memory by the versioned structure. The borrower calls its deleter.
    pub fn versioned(&self) -> NonNull<ManagedTensorVersioned> {
        let (tensor, sizes) = self.tensor();
        let loan = Loan {
            managed: ManagedTensorVersioned {
                version: VERSION,
                manager_ctx: std::ptr::null_mut(),
                deleter: Some(end_versioned),
                flags: if self.read_only { FLAG_READ_ONLY } else { 0 },
                dl_tensor: tensor,
            },
            _sizes: sizes,
            _owner: Arc::clone(&self.owner),
        };
        let loan = Box::into_raw(Box::new(loan));
        // SAFETY: just allocated. The pointer to the field is made from the pointer to the loan, so that the deleter may
        // free the whole.
        unsafe {
            let managed = &raw mut (*loan).managed;
            (*managed).manager_ctx = loan.cast();
            NonNull::new_unchecked(managed)
        }
    }

    /// Lends the memory by the structure used before version 1.0, which cannot say that it is read-only.
    pub fn legacy(&self) -> Result<NonNull<ManagedTensor>, Error> {
        if self.read_only {
            return Err(Error::ReadOnlyLegacy);
        }
        let (tensor, sizes) = self.tensor();
        let loan = Loan {
            managed: ManagedTensor {
                dl_tensor: tensor,
                manager_ctx: std::ptr::null_mut(),
                deleter: Some(end_legacy),
            },
            _sizes: sizes,
            _owner: Arc::clone(&self.owner),
        };
        let loan = Box::into_raw(Box::new(loan));
        // SAFETY: as in `versioned`.
        unsafe {
            let managed = &raw mut (*loan).managed;
            (*managed).manager_ctx = loan.cast();
            Ok(NonNull::new_unchecked(managed))
        }
    }

    /// The tensor, and the sizes and strides that it points to: a raw allocation, since the borrower reads it while the
    /// loan that owns it is moved about.
    fn tensor(&self) -> (Tensor, Sizes) {
        let mut strides = vec![1; self.shape.len()];
        for dimension in (1..self.shape.len()).rev() {
            strides[dimension - 1] = strides[dimension] * self.shape[dimension];
        }
        let sizes = Sizes {
            shape: Box::into_raw(self.shape.clone().into_boxed_slice()),
            strides: Box::into_raw(strides.into_boxed_slice()),
        };
        let empty = self.shape.contains(&0);
        let tensor = Tensor {
            data: if empty { std::ptr::null_mut() } else { self.data.as_ptr().cast() },
            device: self.device,
            ndim: self.shape.len() as i32,
            dtype: self.element.data_type(),
            shape: sizes.shape.cast(),
            strides: sizes.strides.cast(),
            byte_offset: 0,
        };
        (tensor, sizes)
    }
}

/// Leaked boxes, freed when dropped.
struct Sizes {
    shape: *mut [i64],
    strides: *mut [i64],
}

impl Drop for Sizes {
    fn drop(&mut self) {
        // SAFETY: both were leaked by `Export::tensor`, and are freed once.
        unsafe {
            drop(Box::from_raw(self.shape));
            drop(Box::from_raw(self.strides));
        }
    }
}

struct Loan<M> {
    managed: M,
    _sizes: Sizes,
    _owner: Arc<dyn Any + Send + Sync>,
}

unsafe extern "C" fn end_versioned(managed: *mut ManagedTensorVersioned) {
    if !managed.is_null() {
        // SAFETY: made by `Export::versioned`; the borrower calls this once.
        unsafe { end::<ManagedTensorVersioned>((*managed).manager_ctx) };
    }
}

unsafe extern "C" fn end_legacy(managed: *mut ManagedTensor) {
    if !managed.is_null() {
        // SAFETY: made by `Export::legacy`; the borrower calls this once.
        unsafe { end::<ManagedTensor>((*managed).manager_ctx) };
    }
}

/// # Safety
/// `loan` is a leaked box of `Loan<M>`, and freed once.
unsafe fn end<M>(loan: *mut c_void) {
    // SAFETY: the caller's promise.
    drop(unsafe { Box::from_raw(loan.cast::<Loan<M>>()) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OwnedTensor;

    fn export(read_only: bool) -> (Arc<Vec<u8>>, Export) {
        let owner = Arc::new((0..24).collect::<Vec<u8>>());
        let data = NonNull::new(owner.as_ptr().cast_mut()).unwrap();
        // SAFETY: 24 bytes, kept by the owner, and never written in these tests.
        let export =
            unsafe { Export::new(data, ElementType::UInt8, &[2, 3, 4], read_only, Arc::clone(&owner) as _) };
        (owner, export)
    }

    #[test]
    fn the_owner_lives_as_long_as_the_last_loan_on_any_thread() {
        let (owner, export) = export(true);
        // SAFETY: fresh loans, each taken over once.
        let first = unsafe { OwnedTensor::from_versioned(export.versioned()) }.unwrap();
        let second = export.versioned().as_ptr() as usize;
        drop(export);
        assert_eq!(Arc::strong_count(&owner), 3);
        let view = first.view().unwrap();
        assert_eq!((view.shape(), view.strides()), ([2, 3, 4].as_slice(), [12, 4, 1].as_slice()));
        assert!(view.read_only());
        // SAFETY: the last of 24 bytes.
        assert_eq!(unsafe { view.data().add(23).read() }, 23);
        std::thread::spawn(move || {
            let managed = NonNull::new(second as *mut ManagedTensorVersioned).unwrap();
            // SAFETY: the second loan, taken over here only.
            drop(unsafe { OwnedTensor::from_versioned(managed) });
        })
        .join()
        .unwrap();
        assert_eq!(Arc::strong_count(&owner), 2);
        drop(first);
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    #[test]
    fn legacy_loans_are_writable_only() {
        assert_eq!(export(true).1.legacy().unwrap_err(), Error::ReadOnlyLegacy);
        let (owner, export) = export(false);
        // SAFETY: a fresh loan, taken over once.
        let loan = unsafe { OwnedTensor::from_legacy(export.legacy().unwrap()) };
        assert!(!loan.view().unwrap().read_only());
        drop(loan);
        drop(export);
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    #[test]
    fn an_empty_tensor_has_no_data() {
        let owner = Arc::new(());
        // SAFETY: no element.
        let export = unsafe { Export::new(NonNull::dangling(), ElementType::Int32, &[0, 5], true, owner) };
        // SAFETY: a fresh loan, taken over once.
        let loan = unsafe { OwnedTensor::from_versioned(export.versioned()) }.unwrap();
        assert!(loan.view().unwrap().is_empty());
    }

    #[test]
    fn another_major_version_is_given_back_at_once() {
        let (owner, export) = export(true);
        let loan = export.versioned();
        // SAFETY: ours, and not lent yet.
        unsafe { (*loan.as_ptr()).version.major = 2 };
        drop(export);
        // SAFETY: taken over once.
        let error = unsafe { OwnedTensor::from_versioned(loan) }.unwrap_err();
        assert_eq!(error, Error::Version { major: 2, minor: 3 });
        assert_eq!(Arc::strong_count(&owner), 1);
    }
}
