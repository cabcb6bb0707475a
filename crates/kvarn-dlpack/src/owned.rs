//! A tensor lent to us, given back when dropped.

use std::ptr::NonNull;

use crate::abi::{FLAG_READ_ONLY, ManagedTensor, ManagedTensorVersioned, VERSION};
use crate::{BorrowedTensor, Error};

/// A managed tensor that we own: its deleter is called once, when this is dropped.
///
/// Not `Send`: some lenders' deleters want the thread that exported.
#[derive(Debug)]
pub struct OwnedTensor(Managed);

#[derive(Debug)]
enum Managed {
    Legacy(NonNull<ManagedTensor>),
    Versioned(NonNull<ManagedTensorVersioned>),
}

impl OwnedTensor {
    /// Takes over a tensor of the structure used before version 1.0.
    ///
    /// # Safety
    /// `managed` is valid, and nobody else calls its deleter.
    pub unsafe fn from_legacy(managed: NonNull<ManagedTensor>) -> Self {
        Self(Managed::Legacy(managed))
    }

    /// Takes over a tensor of the versioned structure. One of another major version is given back at once.
    ///
    /// # Safety
    /// `managed` is valid as far as its version says, and nobody else calls its deleter.
    pub unsafe fn from_versioned(managed: NonNull<ManagedTensorVersioned>) -> Result<Self, Error> {
        let owned = Self(Managed::Versioned(managed));
        // SAFETY: the version is the first field in every major version.
        let version = unsafe { (*managed.as_ptr()).version };
        if version.major == VERSION.major {
            Ok(owned)
        } else {
            Err(Error::Version { major: version.major, minor: version.minor })
        }
    }

    /// A checked view.
    pub fn view(&self) -> Result<BorrowedTensor<'_>, Error> {
        match self.0 {
            // SAFETY: valid until dropped, and the view borrows `self`.
            Managed::Legacy(managed) => unsafe {
                BorrowedTensor::from_raw(&(*managed.as_ptr()).dl_tensor, false)
            },
            // SAFETY: as above; the major version was checked.
            Managed::Versioned(managed) => unsafe {
                let managed = &*managed.as_ptr();
                BorrowedTensor::from_raw(&managed.dl_tensor, managed.flags & FLAG_READ_ONLY != 0)
            },
        }
    }
}

impl Drop for OwnedTensor {
    fn drop(&mut self) {
        match self.0 {
            // SAFETY: we own the tensor, and call its deleter once.
            Managed::Legacy(managed) => unsafe {
                if let Some(deleter) = (*managed.as_ptr()).deleter {
                    deleter(managed.as_ptr());
                }
            },
            // SAFETY: as above; the deleter lies at the same place in every major version.
            Managed::Versioned(managed) => unsafe {
                if let Some(deleter) = (*managed.as_ptr()).deleter {
                    deleter(managed.as_ptr());
                }
            },
        }
    }
}
