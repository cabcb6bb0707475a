//! Tensors that others lend through DLPack.

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr::{self, NonNull};

use kvarn_dlpack::abi::{
    DataType, Device, FLAG_READ_ONLY, ManagedTensor, ManagedTensorVersioned, PackVersion, Tensor,
};
use kvarn_dlpack::{BorrowedTensor, OwnedTensor};

/// Fields of a lent tensor, whatever they say.
#[derive(Clone, Debug)]
pub struct LentTensor {
    /// Number of the device's type, and its index.
    pub device: (i32, i32),
    /// Dimensions that the structure claims.
    pub ndim: i32,
    /// Code, bits, lanes.
    pub dtype: (u8, u8, u16),
    /// Sizes; `None` is a null pointer. As many as may be read.
    pub shape: Option<[i64; 8]>,
    /// Strides; `None` is a null pointer.
    pub strides: Option<[i64; 8]>,
    /// Bytes from the address to the first element.
    pub byte_offset: u64,
    /// Address of the memory, which nobody may read.
    pub address: usize,
    /// Version; `None` is the structure from before versions.
    pub version: Option<(u32, u32)>,
    /// Flags of a versioned tensor.
    pub flags: u64,
}

/// Views a lent tensor and gives it back: a view that is granted is consistent, and the lender gets its tensor back once, in
/// any case. Returns whether it was granted.
///
/// # Panics
/// If not.
pub fn lent_tensor(lent: &LentTensor) -> bool {
    let (mut shape, mut strides) = (lent.shape, lent.strides);
    let pointer =
        |array: &mut Option<[i64; 8]>| array.as_mut().map_or(ptr::null_mut(), |array| array.as_mut_ptr());
    let dl_tensor = Tensor {
        data: ptr::without_provenance_mut(lent.address),
        device: Device { device_type: lent.device.0, device_id: lent.device.1 },
        ndim: lent.ndim,
        dtype: DataType { code: lent.dtype.0, bits: lent.dtype.1, lanes: lent.dtype.2 },
        shape: pointer(&mut shape),
        strides: pointer(&mut strides),
        byte_offset: lent.byte_offset,
    };
    let returned = Cell::new(0);
    let manager_ctx = ptr::from_ref(&returned).cast_mut().cast::<c_void>();
    let granted = if let Some((major, minor)) = lent.version {
        let mut managed = ManagedTensorVersioned {
            version: PackVersion { major, minor },
            manager_ctx,
            deleter: Some(versioned_returned),
            flags: lent.flags,
            dl_tensor,
        };
        // SAFETY: a live structure that nobody else gives back.
        let owned = unsafe { OwnedTensor::from_versioned(NonNull::from(&mut managed)) };
        assert_eq!(owned.is_ok(), major == 1);
        owned.is_ok_and(|owned| {
            let view = owned.view();
            let read_only = lent.flags & FLAG_READ_ONLY != 0;
            view.is_ok_and(|view| is_consistent(lent, &view, read_only))
        })
    } else {
        let mut managed = ManagedTensor { dl_tensor, manager_ctx, deleter: Some(legacy_returned) };
        // SAFETY: as above.
        let owned = unsafe { OwnedTensor::from_legacy(NonNull::from(&mut managed)) };
        owned.view().is_ok_and(|view| is_consistent(lent, &view, false))
    };
    assert_eq!(returned.get(), 1, "given back once");
    let device = Device { device_type: lent.device.0, device_id: lent.device.1 };
    // SAFETY: shape and strides are null or hold eight elements, more than which no view reads; the data is not read.
    let on_device = unsafe { BorrowedTensor::from_raw_on(device, &dl_tensor, false) };
    let supported = lent.version.is_none_or(|(major, _)| major == 1);
    assert_eq!(granted, on_device.is_ok() && device.is_host() && supported);
    if let Ok(view) = on_device {
        is_consistent(lent, &view, false);
    }
    granted
}

/// Checks what a view promises.
fn is_consistent(lent: &LentTensor, view: &BorrowedTensor<'_>, read_only: bool) -> bool {
    let ndim = usize::try_from(lent.ndim).unwrap();
    let sizes = &lent.shape.unwrap_or_default()[..ndim];
    assert!(view.shape().iter().zip(sizes).all(|(&size, &given)| i64::try_from(size) == Ok(given)));
    assert_eq!((view.shape().len(), view.strides().len()), (ndim, ndim));
    let elements = view.shape().iter().try_fold(1usize, |product, &size| product.checked_mul(size)).unwrap();
    assert_eq!((view.len(), view.is_empty()), (elements, elements == 0));
    let bytes = elements.checked_mul(view.element().bytes()).unwrap();
    assert!(isize::try_from(bytes).is_ok());
    if elements > 0 {
        assert!(lent.address != 0 && view.data().addr().is_multiple_of(view.element().bytes()));
    }
    match lent.strides {
        Some(strides) => assert!(view.strides().iter().zip(strides).all(|(&a, b)| a as i64 == b)),
        None => assert!(view.is_contiguous()),
    }
    assert_eq!(view.read_only(), read_only);
    assert_eq!((lent.dtype.1, lent.dtype.2), (view.element().bytes() as u8 * 8, 1));
    let _ = view.is_contiguous();
    true
}

unsafe extern "C" fn versioned_returned(managed: *mut ManagedTensorVersioned) {
    // SAFETY: called with the structure of `lent_tensor`, whose counter lives.
    unsafe { count((*managed).manager_ctx) };
}

unsafe extern "C" fn legacy_returned(managed: *mut ManagedTensor) {
    // SAFETY: as above.
    unsafe { count((*managed).manager_ctx) };
}

/// # Safety
/// `returned` is the counter of `lent_tensor`.
unsafe fn count(returned: *mut c_void) {
    // SAFETY: the caller's promise.
    let returned = unsafe { &*returned.cast::<Cell<u32>>() };
    returned.set(returned.get() + 1);
}
