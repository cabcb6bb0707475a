//! Small integer arrays of a step, from the host to a fixed place on the device.

use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, PoisonError};

use crate::capture::{Relaxed, capturing};
use crate::memory::Held;
use crate::staging::{Event, Staging};
use crate::{Device, DeviceMemory, Error, Stream};

/// Arrays begin at multiples of this, so that kernels can read them 16 bytes at a time.
const ALIGNMENT: usize = 16;

/// Pinned buffers of a step buffer: as many uploads can be on their way before the host waits.
const STAGES: usize = 4;

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
    free: Mutex<Vec<Buffer>>,
}

/// A buffer for the arrays of a step, lent until it is dropped.
///
/// Its address stays the same: a graph that was captured with it finds the arrays of the last
/// [`send`](Self::send), as long as this lives.
#[derive(Debug)]
pub struct StepBuffer {
    lender: Arc<StepBuffers>,
    buffer: ManuallyDrop<Buffer>,
}

#[derive(Debug)]
struct Buffer {
    memory: Arc<DeviceMemory>,
    stages: Vec<Staging>,
    next: usize,
    /// Streams that read the arrays, and when they were through.
    readers: Vec<(Stream, Event)>,
}

/// Bytes of a buffer that holds arrays of these lengths.
pub(crate) fn bytes_for(lengths: impl IntoIterator<Item = usize>) -> usize {
    lengths.into_iter().map(|length| (length * 4).next_multiple_of(ALIGNMENT)).sum()
}

impl StepBuffers {
    /// No buffers yet.
    pub fn new(device: &'static Device) -> Arc<Self> {
        Arc::new(Self { device, free: Mutex::default() })
    }

    /// Lends a buffer for arrays of these lengths, in words. Allocates if no free one is large enough, so that all later
    /// steps as large find one: take the largest before a graph is captured.
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
        Ok(StepBuffer { lender: Arc::clone(self), buffer: ManuallyDrop::new(buffer) })
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
    /// Has `stream` copy `arrays` to the device; they lie where the result says, for work given to `stream` afterwards.
    ///
    /// What other streams read before, up to their [`done`](Self::done), is not disturbed. Not while `stream` is being
    /// captured: a graph would send the arrays of its capture for ever.
    pub fn send<const ARRAYS: usize>(
        &mut self,
        stream: Stream,
        arrays: [&[i32]; ARRAYS],
    ) -> Result<[Words; ARRAYS], Error> {
        let device = self.lender.device;
        let buffer = &mut *self.buffer;
        let bytes = bytes_for(arrays.iter().map(|array| array.len()));
        if bytes > buffer.memory.bytes() {
            return Err(Error::TooLarge {
                what: "step arrays",
                got: bytes,
                most: buffer.memory.bytes(),
                fix: "take a buffer for the largest step",
            });
        }
        let _current = device.enter()?;
        if device.told(capturing(stream))? {
            return Err(Error::Capturing {
                what: "a step's arrays",
                fix: "plan the step before, and capture its append and attend",
            });
        }
        let _relaxed = device.told(Relaxed::enter())?;
        for (_, through) in &buffer.readers {
            device.told(through.hold(stream))?;
        }
        let address = buffer.memory.address();
        let stage = &mut buffer.stages[buffer.next];
        buffer.next = (buffer.next + 1) % STAGES;
        let sent = stage.copy(stream, address, bytes, |staging| {
            let mut rest = staging;
            for array in arrays {
                let (part, after) = rest.split_at_mut(bytes_for([array.len()]));
                for (bytes, word) in part.chunks_exact_mut(4).zip(array) {
                    bytes.copy_from_slice(&word.to_ne_bytes());
                }
                rest = after;
            }
        });
        device.told(sent)?;
        let mut at = address;
        Ok(arrays.map(|array| {
            let words = Words { address: at, count: array.len() };
            at += bytes_for([array.len()]) as u64;
            words
        }))
    }

    /// All work on `stream` that reads the arrays has been given to it: the next `send` comes after.
    ///
    /// Does nothing while `stream` is being captured: then the buffer must be kept as long as the graph.
    pub fn done(&mut self, stream: Stream) -> Result<(), Error> {
        let device = self.lender.device;
        let buffer = &mut *self.buffer;
        let _current = device.enter()?;
        if device.told(capturing(stream))? {
            return Ok(());
        }
        if let Some((_, through)) = buffer.readers.iter().find(|(reader, _)| *reader == stream) {
            return device.told(through.record(stream));
        }
        let through = device.told(Event::new())?;
        let recorded = device.told(through.record(stream));
        buffer.readers.push((stream, through));
        recorded
    }
}

impl Drop for StepBuffer {
    fn drop(&mut self) {
        let mut free = self.lender.free.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: taken once, here; the step buffer is gone afterwards.
        free.push(unsafe { ManuallyDrop::take(&mut self.buffer) });
    }
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
        stages.chain(self.readers.iter().map(|(_, event)| event.held())).collect()
    }
}
