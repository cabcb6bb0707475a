//! Images of sequences in pinned host memory, to which and from which a stream copies while the host goes on.

use std::mem::ManuallyDrop;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;

use crate::capture::{Capture, Relaxed, capture};
use crate::driver::{Answer, check};
use crate::memory::Held;
use crate::staging::Event;
use crate::{Device, Error, Stream};

/// Where bytes of an image lie on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) address: u64,
    /// First byte in the image.
    pub(crate) at: usize,
    pub(crate) bytes: usize,
}

/// Pinned memory of one pool. Pinning takes long, so what an image no longer needs is kept for the next.
#[derive(Debug)]
pub(crate) struct PinnedBuffers {
    device: &'static Device,
    spare: Mutex<Vec<Buffer>>,
}

#[derive(Debug)]
struct Buffer {
    memory: *mut u8,
    bytes: usize,
    /// Happens when the last copy to or from the memory is done.
    copied: Event,
}

// SAFETY: memory that nobody else refers to, and an event.
unsafe impl Send for Buffer {}

/// The image of a sequence. Its memory is lent until it is dropped, even if a copy is not done: whoever is lent the memory
/// next waits.
#[derive(Debug)]
pub struct PinnedImage {
    lender: Arc<PinnedBuffers>,
    buffer: ManuallyDrop<Buffer>,
    bytes: usize,
}

// SAFETY: the memory is written to by `&mut self` only, and read behind the event; the driver's calls may come from every
// thread.
unsafe impl Sync for PinnedImage {}

impl PinnedBuffers {
    pub(crate) fn new(device: &'static Device) -> Arc<Self> {
        Arc::new(Self { device, spare: Mutex::default() })
    }

    /// Refuses a stream that is being captured: before anything is allocated or waited for, which could spoil the capture.
    pub(crate) fn check(&self, stream: Stream) -> Result<(), Error> {
        let _current = self.device.enter()?;
        if self.device.told(capture(stream))? == Capture::Off {
            return Ok(());
        }
        Err(Error::Capturing {
            what: "copying a sequence",
            expected: "it outside of the capture, as a graph would copy the same pages for ever",
            fix: "save, load, offload and restore before or after",
        })
    }

    /// Memory for an image: spare memory of up to twice the size, or new, for which spare memory is given up.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Result<PinnedImage, Error> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |buffer: &Buffer| buffer.bytes >= bytes && buffer.bytes / 2 <= bytes;
        let found =
            (0..spare.len()).filter(|&index| fits(&spare[index])).min_by_key(|&index| spare[index].bytes);
        let buffer = if let Some(index) = found {
            spare.swap_remove(index)
        } else {
            let held: Vec<Held> = spare.drain(..).flat_map(Buffer::into_held).collect();
            drop(spare);
            if !held.is_empty() {
                self.device.release(held);
            }
            Buffer::new(self.device, bytes.max(1))?
        };
        let image = PinnedImage { lender: Arc::clone(self), buffer: ManuallyDrop::new(buffer), bytes };
        image.wait()?;
        Ok(image)
    }
}

impl Drop for PinnedBuffers {
    fn drop(&mut self) {
        let spare = self.spare.get_mut().unwrap_or_else(PoisonError::into_inner);
        let held: Vec<Held> = spare.drain(..).flat_map(Buffer::into_held).collect();
        if !held.is_empty() {
            self.device.release(held);
        }
    }
}

impl PinnedImage {
    /// Has `stream` copy the bytes at `places`, by ascending place in the image, from the device; all others become zero.
    ///
    /// The device's bytes stay as they are until that is done, which an event on the stream tells.
    pub(crate) fn gather(&mut self, stream: Stream, places: &[Place]) -> Result<(), Error> {
        let _current = self.lender.device.enter()?;
        let mut end = 0;
        for place in places {
            self.zero(end, place.at);
            end = place.at + place.bytes;
        }
        self.zero(end, self.bytes);
        self.copy(stream, places, |host, device, bytes| {
            // SAFETY: as many bytes lie at both places; nobody reads or writes the host's before the event, nor writes the
            // device's.
            check("cuMemcpyDtoHAsync", unsafe {
                sys::cuMemcpyDtoHAsync_v2(host.cast(), device, bytes, stream.raw())
            })
        })
    }

    /// Has `stream` copy the bytes to `places` on the device, once they are all here.
    pub(crate) fn scatter(&self, stream: Stream, places: &[Place]) -> Result<(), Error> {
        let device = self.lender.device;
        let _current = device.enter()?;
        device.told(self.buffer.copied.hold(stream))?;
        self.copy(stream, places, |host, device, bytes| {
            // SAFETY: as many bytes lie at both places; the host's are not written before the event, the device's are the
            // caller's alone.
            check("cuMemcpyHtoDAsync", unsafe {
                sys::cuMemcpyHtoDAsync_v2(device, host.cast_const().cast(), bytes, stream.raw())
            })
        })
    }

    /// Writes all bytes.
    pub(crate) fn fill(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.bytes, "an image of that size");
        // SAFETY: pinned memory of that size which no copy uses (`take` has waited), borrowed mutably.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.buffer.memory, self.bytes) };
    }

    /// The bytes. Waits for the copy.
    pub fn bytes(&self) -> Result<&[u8], Error> {
        self.wait()?;
        // SAFETY: that many bytes of pinned memory, which are only read while the image is borrowed.
        Ok(unsafe { std::slice::from_raw_parts(self.buffer.memory, self.bytes) })
    }

    fn wait(&self) -> Result<(), Error> {
        let device = self.lender.device;
        let _current = device.enter()?;
        let _relaxed = device.told(Relaxed::enter())?;
        device.told(self.buffer.copied.wait())
    }

    fn zero(&mut self, from: usize, to: usize) {
        assert!(from <= to && to <= self.bytes, "places within the image, by ascending place");
        // SAFETY: within the memory, which no copy uses: the copies of this image begin later.
        unsafe { ptr::write_bytes(self.buffer.memory.add(from), 0, to - from) };
    }

    /// The context is current.
    fn copy(
        &self,
        stream: Stream,
        places: &[Place],
        copy: impl Fn(*mut u8, u64, usize) -> Answer<()>,
    ) -> Result<(), Error> {
        let device = self.lender.device;
        let all = || {
            for place in places {
                assert!(place.at + place.bytes <= self.bytes, "places within the image");
                // SAFETY: within the memory.
                copy(unsafe { self.buffer.memory.add(place.at) }, place.address, place.bytes)?;
            }
            self.buffer.copied.record(stream)
        };
        device.told(all()).inspect_err(|_| {
            // What was given to the stream still uses both memories, and no event tells when it is done. A device that
            // refuses to be waited for is lost.
            // SAFETY: the caller's stream, of the current context.
            let _ = unsafe { sys::cuStreamSynchronize(stream.raw()) };
        })
    }
}

impl Drop for PinnedImage {
    fn drop(&mut self) {
        let mut spare = self.lender.spare.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: taken once, here; the image is gone afterwards.
        spare.push(unsafe { ManuallyDrop::take(&mut self.buffer) });
    }
}

impl Buffer {
    fn new(device: &'static Device, bytes: usize) -> Result<Self, Error> {
        let _current = device.enter()?;
        let _relaxed = device.told(Relaxed::enter())?;
        let copied = device.told(Event::new())?;
        let mut memory = ptr::null_mut();
        // SAFETY: `memory` is writable, the context is current.
        let result = unsafe { sys::cuMemHostAlloc(&raw mut memory, bytes, 0) };
        let pinned = device.told_of_memory(check("cuMemHostAlloc", result), "pinned host memory", bytes);
        pinned.inspect_err(|_| device.release(vec![copied.held()]))?;
        Ok(Self { memory: memory.cast(), bytes, copied })
    }

    fn into_held(self) -> [Held; 2] {
        [Held::Pinned(self.memory), self.copied.held()]
    }
}
