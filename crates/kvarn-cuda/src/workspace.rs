//! Room for the partial results of attention.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::{Device, DeviceMemory, Error, Stream};

/// Bytes of partial results up to which a launch attends to several query blocks: enough work for any device.
const LAUNCH_BYTES: usize = 32 << 20;

/// Bytes of one partial result: outputs, a base and a sum for each of `columns` query columns of each KV head.
pub(crate) const fn part_bytes(kv_heads: usize, columns: usize, head_dim: usize) -> usize {
    4 * kv_heads * columns * (head_dim + 2)
}

/// Partial results that a launch with several query blocks may leave.
pub(crate) const fn most_parts(kv_heads: usize, columns: usize, head_dim: usize) -> usize {
    LAUNCH_BYTES / part_bytes(kv_heads, columns, head_dim)
}

/// Workspaces of one pool, one per stream: launches on a stream run one after the other, so they may share.
#[derive(Debug)]
pub(crate) struct Workspaces {
    device: &'static Device,
    by_stream: Mutex<HashMap<Stream, Workspace>>,
}

/// Memory on the device: arrival counters, zero between launches, and partial results behind them.
#[derive(Clone, Debug)]
pub(crate) struct Workspace {
    memory: Arc<DeviceMemory>,
    counters: usize,
}

impl Workspaces {
    pub(crate) fn new(device: &'static Device) -> Self {
        Self { device, by_stream: Mutex::default() }
    }

    /// A workspace of a stream for so many counters and bytes of partial results. Allocates when more is needed than ever
    /// before.
    pub(crate) fn take(&self, stream: Stream, counters: usize, bytes: usize) -> Result<Workspace, Error> {
        let mut by_stream = self.by_stream.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = by_stream.get(&stream)
            && found.counters >= counters
            && found.memory.bytes() - found.counters * 4 >= bytes
        {
            return Ok(found.clone());
        }
        let counters = counters.next_power_of_two().max(1_024);
        let made = Workspace::new(self.device, counters, bytes.next_power_of_two())?;
        by_stream.insert(stream, made.clone());
        Ok(made)
    }
}

impl Workspace {
    /// A workspace that nobody else uses, for so many counters and bytes of partial results.
    pub(crate) fn own(device: &'static Device, counters: usize, bytes: usize) -> Result<Self, Error> {
        Self::new(device, counters, bytes)
    }

    /// `bytes` are those behind the counters.
    fn new(device: &'static Device, counters: usize, bytes: usize) -> Result<Self, Error> {
        // Results are read 16 bytes at a time.
        let counters = counters.next_multiple_of(4);
        let bytes = counters * 4 + bytes;
        Ok(Self { memory: DeviceMemory::allocate(device, bytes, "attention workspace")?, counters })
    }

    /// Address of the counters.
    pub(crate) fn counters(&self) -> u64 {
        self.memory.address()
    }

    /// Address of the partial results.
    pub(crate) fn results(&self) -> u64 {
        self.memory.address() + self.counters as u64 * 4
    }
}
