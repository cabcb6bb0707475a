//! The primary context of a device, which torch uses too.

use std::marker::PhantomData;
use std::ptr;

use cudarc::driver::sys::{self, CUcontext, CUdevice};

use crate::driver::{Answer, check};

/// A primary context, retained once and never released: memory and kernels of it may live as long as the process.
#[derive(Debug)]
pub(crate) struct Context {
    raw: CUcontext,
    device: CUdevice,
}

// SAFETY: a handle of the driver, which may be used from every thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// The context is current on this thread as long as this lives; then the one before is again.
///
/// A fresh thread has no context, and a caller's thread may have that of another device.
#[derive(Debug)]
pub(crate) struct Current {
    pushed: bool,
    /// Not to be sent: it is about this thread.
    thread: PhantomData<*const ()>,
}

impl Context {
    /// Retains the primary context of the device with this index; the driver must run.
    pub(crate) fn retain(index: usize) -> Answer<Self> {
        let (mut device, mut raw) = (0, ptr::null_mut());
        // SAFETY: `device` is writable; a wrong index is refused.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, index as i32) })?;
        // SAFETY: `raw` is writable, the device exists.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) })?;
        Ok(Self { raw, device })
    }

    /// The driver's handle of the device.
    pub(crate) const fn device(&self) -> CUdevice {
        self.device
    }

    /// Makes the context current on this thread.
    pub(crate) fn enter(&self) -> Answer<Current> {
        let mut now = ptr::null_mut();
        // SAFETY: `now` is writable.
        check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&raw mut now) })?;
        let pushed = now != self.raw;
        if pushed {
            // SAFETY: a context that is never destroyed.
            check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.raw) })?;
        }
        Ok(Current { pushed, thread: PhantomData })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = ptr::null_mut();
            // SAFETY: pushed on this thread; `popped` is writable. A lost device refuses, which later calls report.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
        }
    }
}
