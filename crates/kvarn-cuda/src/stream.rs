//! Streams of the caller.

use std::ffi::c_void;

use cudarc::driver::sys::CUstream;

/// A stream that somebody else made, as torch does; never created, destroyed or waited for here.
///
/// It belongs to the primary context of the device it is used with, and outlives the steps it is used in. The per-thread
/// default stream is none: its handle means another stream on each thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream(usize);

impl Stream {
    /// The legacy default stream.
    pub const LEGACY: Self = Self(0);

    /// Takes a `CUstream` or `cudaStream_t`, which are the same.
    pub fn from_raw(stream: *mut c_void) -> Self {
        Self(stream as usize)
    }

    /// Takes the integer that torch's `cuda_stream` gives.
    pub const fn from_address(address: usize) -> Self {
        Self(address)
    }

    pub(crate) const fn raw(self) -> CUstream {
        self.0 as CUstream
    }
}
