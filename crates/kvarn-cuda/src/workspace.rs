//! Room for the partial results of attention.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvarn::tables::SealRule;

use crate::arrays::most_slots;
use crate::plan::{AttendKey, most_record_items};
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

/// Most bytes that partial results and counters of a stream take in a layer of `kv_heads` heads of `head_dim` channels, where
/// sequences have up to `tokens` tokens and no step holds back more than `hold`.
pub fn most_workspace_bytes(
    kv_heads: usize,
    head_dim: usize,
    rule: &SealRule,
    tokens: usize,
    hold: usize,
) -> usize {
    let most_columns = if head_dim == 256 { 8 } else { 16 };
    let block = |group| {
        let key = AttendKey::of_one_token(kv_heads, group);
        most_record_items(rule.tiles(tokens), rule.group(), key) + most_slots(rule, hold)
    };
    // Few columns make small partial results, hence many of them, each with a counter.
    let parts = |columns| most_parts(kv_heads, columns, head_dim).max(block(columns.min(8)));
    let results = (parts(most_columns) * part_bytes(kv_heads, most_columns, head_dim)).max(LAUNCH_BYTES);
    results.next_power_of_two() + 4 * counters(parts(1) * kv_heads)
}

/// Counters that a workspace has for at least so many.
fn counters(least: usize) -> usize {
    least.next_power_of_two().max(1_024)
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
        // Given back before, so that both exist only where an open step holds the old one.
        by_stream.remove(&stream);
        let made = Workspace::new(self.device, self::counters(counters), bytes.next_power_of_two())?;
        by_stream.insert(stream, made.clone());
        Ok(made)
    }

    /// Bytes that they take.
    pub(crate) fn bytes(&self) -> usize {
        let by_stream = self.by_stream.lock().unwrap_or_else(PoisonError::into_inner);
        by_stream.values().map(|workspace| workspace.memory.bytes()).sum()
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
