//! Small integer arrays of a step, from the host to a fixed place on the device.

use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;

use crate::capture::{Capture, Relaxed, capture};
use crate::driver::check;
use crate::memory::Held;
use crate::staging::{Event, Staging};
use crate::{Device, DeviceMemory, Error, Stream};

/// Arrays begin at multiples of this, so that kernels can read them 16 bytes at a time.
const ALIGNMENT: usize = 16;

/// Pinned buffers of a step buffer: as many uploads can be on their way before the host waits.
const STAGES: usize = 4;

/// An array to send: int32.
#[derive(Clone, Copy, Debug)]
pub struct Array<'a> {
    name: &'static str,
    words: &'a [i32],
    room: usize,
}

impl<'a> Array<'a> {
    /// An array with just the room that it needs; the name is for errors.
    pub const fn new(name: &'static str, words: &'a [i32]) -> Self {
        Self { name, words, room: words.len() }
    }

    /// With room for `words` words: later arrays stay where they are whatever is sent here, up to that length.
    ///
    /// # Panics
    /// If the array has more words.
    #[must_use]
    pub fn with_room(self, words: usize) -> Self {
        assert!(self.words.len() <= words, "words within the room");
        Self { room: words, ..self }
    }
}

/// An int32 array on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Words {
    /// Address of the first word, a multiple of 16.
    pub address: u64,
    /// Words.
    pub count: usize,
}

/// Buffers for steps of one pool, made when more steps are open than ever before and kept from then on.
#[derive(Debug)]
pub struct StepBuffers {
    device: &'static Device,
    /// Whether a copy of what is sent is kept, for [`StepBuffer::verify`].
    check: bool,
    free: Mutex<Vec<Buffer>>,
}

/// A buffer for the arrays of a step, lent until it is dropped. Its address stays the same.
#[derive(Debug)]
pub struct StepBuffer {
    lender: Arc<StepBuffers>,
    buffer: ManuallyDrop<Buffer>,
    sent: Vec<Sent>,
}

/// What was sent, to be compared.
#[derive(Debug)]
struct Sent {
    name: &'static str,
    address: u64,
    words: Vec<i32>,
}

#[derive(Debug)]
struct Buffer {
    memory: Arc<DeviceMemory>,
    stages: Vec<Staging>,
    next: usize,
    readers: Vec<Reader>,
}

/// A stream with work that reads the arrays.
#[derive(Debug)]
struct Reader {
    stream: Stream,
    /// When the work that was noted is done.
    through: Event,
    /// Whether there is work that was not noted yet.
    pending: bool,
}

impl Reader {
    /// Notes the work given to the stream so far.
    fn note(&mut self, device: &Device) -> Result<(), Error> {
        if self.pending {
            device.told(self.through.record(self.stream))?;
            self.pending = false;
        }
        Ok(())
    }
}

/// Bytes of a buffer that holds arrays of these lengths.
pub(crate) fn bytes_for(lengths: impl IntoIterator<Item = usize>) -> usize {
    lengths.into_iter().map(|length| (length * 4).next_multiple_of(ALIGNMENT)).sum()
}

impl StepBuffers {
    /// No buffers yet.
    pub fn new(device: &'static Device, check: bool) -> Arc<Self> {
        Arc::new(Self { device, check, free: Mutex::default() })
    }

    /// Lends a buffer for arrays of these lengths, in words. Allocates if no free one is large enough, so that all later
    /// steps as large find one.
    pub fn take(self: &Arc<Self>, lengths: &[usize]) -> Result<StepBuffer, Error> {
        let bytes = bytes_for(lengths.iter().copied()).max(ALIGNMENT);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let found = free.iter().position(|buffer| buffer.memory.bytes() >= bytes);
        let buffer = if let Some(index) = found {
            free.swap_remove(index)
        } else {
            // One that is too small is replaced: lengths grow, and then stay.
            if let Some(small) = free.pop() {
                self.device.release(small.into_held());
            }
            Buffer::new(self.device, bytes.next_power_of_two())?
        };
        Ok(StepBuffer { lender: Arc::clone(self), buffer: ManuallyDrop::new(buffer), sent: Vec::new() })
    }
}

impl Drop for StepBuffers {
    fn drop(&mut self) {
        let free = self.free.get_mut().unwrap_or_else(PoisonError::into_inner);
        let held: Vec<Held> = free.drain(..).flat_map(Buffer::into_held).collect();
        if !held.is_empty() {
            self.device.release(held);
        }
    }
}

impl StepBuffer {
    /// Has `stream` copy `arrays` to the device, one behind the other; they lie where the result says, for work given to
    /// `stream` afterwards.
    ///
    /// Work that reads what was sent before, on streams named by [`read_by`](Self::read_by), is not disturbed. Not while
    /// `stream` is being captured: a graph would send the arrays of its capture for ever.
    pub fn send<const ARRAYS: usize>(
        &mut self,
        stream: Stream,
        arrays: [Array<'_>; ARRAYS],
    ) -> Result<[Words; ARRAYS], Error> {
        let device = self.lender.device;
        let buffer = &mut *self.buffer;
        let bytes = bytes_for(arrays.iter().map(|array| array.room));
        if bytes > buffer.memory.bytes() {
            return Err(Error::TooLarge {
                what: "step arrays",
                got: bytes,
                most: buffer.memory.bytes(),
                fix: "take a buffer for the largest step",
            });
        }
        let _current = device.enter()?;
        if device.told(capture(stream))? != Capture::Off {
            return Err(Error::Capturing {
                what: "sending a step's arrays",
                expected: "it before the capture",
                fix: "do this on a stream that is not captured",
            });
        }
        let _relaxed = device.told(Relaxed::enter())?;
        for reader in buffer.readers.iter_mut().filter(|reader| reader.stream != stream) {
            reader.note(device)?;
            device.told(reader.through.hold(stream))?;
        }
        let address = buffer.memory.address();
        let stage = &mut buffer.stages[buffer.next];
        buffer.next = (buffer.next + 1) % STAGES;
        let sent = stage.copy(stream, address, &runs(&arrays), |staging| {
            let mut rest = staging;
            for array in arrays {
                let (part, after) = rest.split_at_mut(bytes_for([array.room]));
                for (bytes, word) in part.chunks_exact_mut(4).zip(array.words) {
                    bytes.copy_from_slice(&word.to_ne_bytes());
                }
                rest = after;
            }
        });
        device.told(sent)?;
        let mut at = address;
        let words = arrays.map(|array| {
            let words = Words { address: at, count: array.words.len() };
            at += bytes_for([array.room]) as u64;
            words
        });
        if self.lender.check {
            let of = |(array, words): (&Array<'_>, &Words)| Sent {
                name: array.name,
                address: words.address,
                words: array.words.to_vec(),
            };
            self.sent = arrays.iter().zip(&words).map(of).collect();
        }
        Ok(words)
    }

    /// Work on `stream` reads the arrays from now on: the next `send`, of this step or of a later one, comes after what was
    /// given to the stream by then.
    pub fn read_by(&mut self, stream: Stream) -> Result<(), Error> {
        let device = self.lender.device;
        let readers = &mut self.buffer.readers;
        if let Some(reader) = readers.iter_mut().find(|reader| reader.stream == stream) {
            reader.pending = true;
            return Ok(());
        }
        let _current = device.enter()?;
        let through = device.told(Event::new())?;
        readers.push(Reader { stream, through, pending: true });
        Ok(())
    }

    /// Waits for `stream` and compares the arrays on the device with what was sent; does nothing unless the lender keeps
    /// copies.
    pub fn verify(&self, stream: Stream) -> Result<(), Error> {
        if self.sent.is_empty() {
            return Ok(());
        }
        let device = self.lender.device;
        let _current = device.enter()?;
        // SAFETY: a live stream of the current context.
        device.told(check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream.raw()) }))?;
        for Sent { name, address, words } in &self.sent {
            let mut found = vec![0i32; words.len()];
            if found.is_empty() {
                continue;
            }
            let bytes = size_of_val(found.as_slice());
            // SAFETY: as many bytes lie at both places.
            let read = unsafe { sys::cuMemcpyDtoH_v2(found.as_mut_ptr().cast(), *address, bytes) };
            device.told(check("cuMemcpyDtoH", read))?;
            if let Some(index) = (0..words.len()).find(|&index| found[index] != words[index]) {
                let (value, sent) = (found[index], words[index]);
                return Err(Error::Overwritten { array: name, index, value, sent, device: device.index() });
            }
        }
        Ok(())
    }

    /// Notes what reads the arrays, so that whoever is lent the buffer next sends after it.
    fn settle(&mut self) -> Result<(), Error> {
        let device = self.lender.device;
        let _current = device.enter()?;
        for reader in self.buffer.readers.iter_mut().filter(|reader| reader.pending) {
            // In a stream that records by now, the event would only ever happen in the graph.
            if device.told(capture(reader.stream))? == Capture::Off {
                reader.note(device)?;
            }
        }
        Ok(())
    }
}

impl Drop for StepBuffer {
    fn drop(&mut self) {
        let pending = self.buffer.readers.iter().any(|reader| reader.pending);
        // A device that refuses is lost, which the next call reports.
        let _ = if pending { self.settle() } else { Ok(()) };
        let mut free = self.lender.free.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: taken once, here; the step buffer is gone afterwards.
        free.push(unsafe { ManuallyDrop::take(&mut self.buffer) });
    }
}

/// The bytes that are copied of arrays one behind the other, as (first, length): those of neighbours without unused room
/// between them at once.
fn runs(arrays: &[Array<'_>]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::with_capacity(arrays.len());
    let mut at = 0;
    for array in arrays {
        let (used, room) = (bytes_for([array.words.len()]), bytes_for([array.room]));
        match runs.last_mut() {
            Some((first, length)) if *first + *length == at => *length += used,
            _ => runs.push((at, used)),
        }
        at += room;
    }
    runs.retain(|&(_, length)| length > 0);
    runs
}

impl Buffer {
    fn new(device: &'static Device, bytes: usize) -> Result<Self, Error> {
        let memory = DeviceMemory::allocate(device, bytes, "step arrays")?;
        let _current = device.enter()?;
        let _relaxed = device.told(Relaxed::enter())?;
        let mut buffer = Self { memory, stages: Vec::with_capacity(STAGES), next: 0, readers: Vec::new() };
        for _ in 0..STAGES {
            match Staging::new(device, bytes) {
                Ok(stage) => buffer.stages.push(stage),
                Err(error) => {
                    device.release(buffer.into_held());
                    return Err(error);
                }
            }
        }
        Ok(buffer)
    }

    /// Everything but the device memory, which gives itself back.
    fn into_held(self) -> Vec<Held> {
        let stages = self.stages.iter().flat_map(Staging::held);
        stages.chain(self.readers.iter().map(|reader| reader.through.held())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unused_room_is_not_copied() {
        let array = |length: usize, room| Array::new("a", &[0; 8][..length]).with_room(room);
        assert_eq!(runs(&[array(5, 5), array(3, 3)]), [(0, 48)]);
        assert_eq!(
            runs(&[array(1, 1), array(4, 40), array(2, 8), array(1, 1)]),
            [(0, 32), (176, 16), (208, 16)]
        );
        assert_eq!(runs(&[array(0, 8), array(8, 8)]), [(32, 32)]);
        assert_eq!(runs(&[array(0, 0)]), []);
    }
}
