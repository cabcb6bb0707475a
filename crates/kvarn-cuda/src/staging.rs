//! Pinned host memory from which a stream copies to the device.

use std::ptr;

use cudarc::driver::sys::{self, CUevent, CUevent_flags};

use crate::driver::{Answer, check};
use crate::memory::Held;
use crate::{Device, Error, Stream};

/// A point in a stream.
#[derive(Debug)]
pub(crate) struct Event(CUevent);

// SAFETY: a handle of the driver, which may be used from every thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event that has happened; the context is current.
    pub(crate) fn new() -> Answer<Self> {
        let mut event = ptr::null_mut();
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: `event` is writable.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) }).map(|()| Self(event))
    }

    /// Happens when all that was given to `stream` so far is done.
    pub(crate) fn record(&self, stream: Stream) -> Answer<()> {
        // SAFETY: a live event and a live stream of the current context.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.0, stream.raw()) })
    }

    /// Whether it has happened.
    pub(crate) fn has_happened(&self) -> Answer<bool> {
        // SAFETY: a live event of the current context.
        match unsafe { sys::cuEventQuery(self.0) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }

    /// Has the host wait.
    pub(crate) fn wait(&self) -> Answer<()> {
        // SAFETY: a live event of the current context.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.0) })
    }

    /// Has later work of `stream` wait.
    pub(crate) fn hold(&self, stream: Stream) -> Answer<()> {
        // SAFETY: as in `record`.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream.raw(), self.0, 0) })
    }

    pub(crate) fn held(&self) -> Held {
        Held::Event(self.0)
    }
}

/// Pinned memory, and when the last copy from it is done.
#[derive(Debug)]
pub(crate) struct Staging {
    memory: *mut u8,
    bytes: usize,
    copied: Event,
}

// SAFETY: memory that nobody else refers to, and an event.
unsafe impl Send for Staging {}

impl Staging {
    /// Pins `bytes`; the context is current.
    pub(crate) fn new(device: &'static Device, bytes: usize) -> Result<Self, Error> {
        let copied = device.told(Event::new())?;
        let mut memory = ptr::null_mut();
        // SAFETY: `memory` is writable, the context is current.
        let result = unsafe { sys::cuMemHostAlloc(&raw mut memory, bytes, 0) };
        let pinned = device.told_of_memory(check("cuMemHostAlloc", result), "pinned host memory", bytes);
        pinned.inspect_err(|_| device.release(vec![copied.held()]))?;
        Ok(Self { memory: memory.cast(), bytes, copied })
    }

    /// Waits until the last copy is done, takes `write`'s bytes, and has `stream` copy the `runs` of them, (first, length), to
    /// the same places from `address` on.
    pub(crate) fn copy(
        &mut self,
        stream: Stream,
        address: u64,
        runs: &[(usize, usize)],
        write: impl FnOnce(&mut [u8]),
    ) -> Answer<()> {
        self.copied.wait()?;
        // SAFETY: pinned memory of that size that no copy reads any more; the borrow ends before the next begins.
        write(unsafe { std::slice::from_raw_parts_mut(self.memory, self.bytes) });
        for &(first, length) in runs {
            assert!(first + length <= self.bytes, "copy within the staging memory");
            // SAFETY: `length` bytes lie at both addresses; this memory is left alone until the event.
            let result = unsafe {
                let from = self.memory.add(first).cast_const().cast();
                sys::cuMemcpyHtoDAsync_v2(address + first as u64, from, length, stream.raw())
            };
            check("cuMemcpyHtoDAsync", result)?;
        }
        self.copied.record(stream)
    }

    pub(crate) fn held(&self) -> [Held; 2] {
        [Held::Pinned(self.memory), self.copied.held()]
    }
}
