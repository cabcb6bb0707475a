//! A device that a kernel has brought down: told in full once, briefly ever after.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::Error;
use crate::driver::Failure;
use crate::launch::Entry;

/// Whether a device is lost, and the kernel that was started last on it.
#[derive(Debug, Default)]
pub(crate) struct Loss {
    lost: AtomicBool,
    name: Mutex<String>,
    last: AtomicPtr<Entry>,
}

impl Loss {
    /// An error if the device is lost.
    #[inline]
    pub(crate) fn check(&self, device: usize) -> Result<(), Error> {
        if self.lost() { Err(self.already(device)) } else { Ok(()) }
    }

    /// Whether the device is lost.
    #[inline]
    pub(crate) fn lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Remembers the kernel that is started now.
    #[inline]
    pub(crate) fn launched(&self, kernel: &'static Entry) {
        self.last.store(ptr::from_ref(kernel).cast_mut(), Ordering::Relaxed);
    }

    /// What to tell of `failure`, of a launch of `kernel` if there is one; a sticky failure marks the device as lost.
    pub(crate) fn error(&self, device: usize, failure: Failure, kernel: Option<&str>) -> Error {
        if !failure.sticky() {
            let call = kernel
                .map_or_else(|| failure.call.to_owned(), |kernel| format!("{} of {kernel}", failure.call));
            return Error::Driver { call, device, answer: failure.to_string() };
        }
        let mut name = self.name.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lost() {
            return Error::AlreadyLost { device, name: name.clone() };
        }
        *name = failure.name();
        self.lost.store(true, Ordering::Relaxed);
        // SAFETY: null, or a reference that lives for ever.
        let last = unsafe { self.last.load(Ordering::Relaxed).as_ref() };
        let suspect = last.map_or_else(
            || "no kernel of kvarn had been started on it".to_owned(),
            |kernel| format!("the last kernel of kvarn started on it was {}", kernel.name),
        );
        Error::Lost { device, answer: failure.to_string(), suspect }
    }

    fn already(&self, device: usize) -> Error {
        let name = self.name.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Error::AlreadyLost { device, name }
    }
}
