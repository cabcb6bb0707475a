//! `kvarn.Pool` and `kvarn.Sequence`.

use std::sync::Arc;

use kvarn::codec::SlotType;
use kvarn::pool::{PoolCore, PoolError};
use kvarn::tables::{SequenceId, SequenceView};
use kvarn_dlpack::ElementType;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::arguments::natural;
use crate::config::Config;
use crate::error::{Class, detached};
use crate::memory::Memory;
use crate::open_step::EXPANDED;
use crate::pool_core;
use crate::prefix;
use crate::saved::{self, Saved, Source};
use crate::step::Step;
use crate::tensor::Lent;

/// The cache memory of one model; see `kvarn.Pool`.
#[pyclass(module = "kvarn._kvarn", frozen)]
pub(crate) struct Pool(Arc<kvarn_cpu::Pool>);

#[pymethods]
impl Pool {
    /// Reserves memory for layers of `(kv_heads, head_dim)`.
    #[new]
    fn new(
        py: Python<'_>,
        config: &Config,
        layers: Vec<(i64, i64)>,
        pages: i64,
        slots: i64,
        float32: bool,
    ) -> PyResult<Self> {
        let config = config.0;
        let layers = pool_core::layer_shapes(py, layers)?;
        let number = |what, value| natural(py, Class::Shape, what, value);
        let (pages, slots) = (number("pages", pages)?, number("slots", slots)?);
        let slot_type = if float32 { SlotType::Float32 } else { SlotType::Float16 };
        let pool = detached(py, || kvarn_cpu::Pool::new(config, &layers, pages, slots, slot_type))?;
        Ok(Self(pool))
    }

    /// A new sequence that starts with the tiles published under the first of `prefix`, if any.
    fn create(&self, py: Python<'_>, prefix: Vec<Bound<'_, PyAny>>) -> PyResult<Sequence> {
        prefix::create(py, self.0.core(), &prefix)
    }

    /// Publishes the first tiles of a sequence, one key each; returns how many were not published before.
    fn publish(
        &self,
        py: Python<'_>,
        sequence: &Bound<'_, Sequence>,
        keys: Vec<Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        prefix::publish(py, self.0.core(), sequence, &keys)
    }

    /// How many tiles a sequence would start with.
    fn match_prefix(&self, py: Python<'_>, keys: Vec<Bound<'_, PyAny>>) -> PyResult<usize> {
        prefix::match_prefix(py, self.0.core(), &keys)
    }

    /// Publishes nothing any more.
    fn unpublish(&self, py: Python<'_>) -> PyResult<()> {
        prefix::unpublish(py, self.0.core())
    }

    /// What the bytes of tiles depend on besides the tokens.
    #[getter]
    fn fingerprint<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        prefix::fingerprint(py, self.0.core())
    }

    /// A new sequence that holds what another one holds.
    fn fork(&self, py: Python<'_>, sequence: &Bound<'_, Sequence>) -> PyResult<Sequence> {
        pool_core::fork(py, self.0.core(), sequence)
    }

    /// Makes `sequences[i]` hold what `sequences[order[i]]` held.
    fn reorder(&self, py: Python<'_>, sequences: Vec<Bound<'_, Sequence>>, order: Vec<i64>) -> PyResult<()> {
        pool_core::reorder(py, self.0.core(), &sequences, &order)
    }

    /// Forgets a sequence.
    fn free(&self, py: Python<'_>, sequence: &Bound<'_, Sequence>) -> PyResult<()> {
        pool_core::free(py, self.0.core(), sequence)
    }

    /// Keeps the first `length` tokens.
    fn truncate(&self, py: Python<'_>, sequence: &Bound<'_, Sequence>, length: i64) -> PyResult<()> {
        let id = sequence.get().id;
        let length = natural(py, Class::Shape, "length", length)?;
        detached(py, || self.0.truncate(id, length))
    }

    /// A sequence as it is saved: header and image.
    fn save<'py>(&self, py: Python<'py>, sequence: &Bound<'_, Sequence>) -> PyResult<Saved<'py>> {
        saved::of_cpu(py, &self.0, sequence)
    }

    /// A new sequence from what was saved.
    fn load(&self, py: Python<'_>, source: Source) -> PyResult<Sequence> {
        saved::load(py, self.0.core(), source, |mut input| self.0.load(&mut input))
    }

    /// Moves a sequence out of the pool.
    fn offload(&self, py: Python<'_>, sequence: &Bound<'_, Sequence>) -> PyResult<()> {
        let id = sequence.get().id;
        detached(py, || self.0.offload(id))
    }

    /// Brings an offloaded sequence back.
    fn restore(&self, py: Python<'_>, sequence: &Bound<'_, Sequence>) -> PyResult<()> {
        let id = sequence.get().id;
        detached(py, || self.0.restore(id))
    }

    /// Plans a step; `counts` and `hold` have one entry per sequence.
    fn step(
        &self,
        py: Python<'_>,
        sequences: Vec<Bound<'_, Sequence>>,
        counts: Vec<i64>,
        hold: Vec<i64>,
    ) -> PyResult<Step> {
        let (ids, counts, hold) = pool_core::batch(py, &sequences, &counts, &hold)?;
        detached(py, || self.0.step(&ids, &counts, &hold)).map(Step)
    }

    /// Decodes the tokens of a sequence from `first` on, in one layer, to `k` and `v`, `[count, kv_heads, head_dim]`.
    #[expect(clippy::too_many_arguments, reason = "arguments of a Python method")]
    fn expand(
        &self,
        py: Python<'_>,
        sequence: &Bound<'_, Sequence>,
        layer: i64,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        first: i64,
        rotated: bool,
    ) -> PyResult<()> {
        let id = sequence.get().id;
        let layer = natural(py, Class::Shape, "layer", layer)?;
        let first = natural(py, Class::Shape, "first", first)?;
        let (k, v) = (Lent::new("k", k)?, Lent::new("v", v)?);
        let (k, v) = (k.tensor_mut(EXPANDED)?, v.tensor_mut(EXPANDED)?);
        detached(py, || self.0.expand(id, layer, first, rotated, &k, &v))
    }

    /// Usage.
    fn stats(&self, py: Python<'_>) -> PyResult<Stats> {
        let stats = detached(py, || Ok::<_, PoolError>(self.0.core().stats()))?;
        Ok(stats.into())
    }

    /// `(kv_heads, head_dim)` of each layer.
    #[getter]
    fn layers(&self) -> Vec<(usize, usize)> {
        pool_core::layers(self.0.core())
    }

    /// Pages of one layer.
    fn pages(&self, py: Python<'_>, layer: i64) -> PyResult<Memory> {
        let layer = natural(py, Class::Shape, "layer", layer)?;
        let view = detached(py, || self.0.pages(layer))?;
        Ok(Memory::of_pool(&view, ElementType::UInt8))
    }

    /// Slots of one layer.
    fn slots(&self, py: Python<'_>, layer: i64) -> PyResult<Memory> {
        let layer = natural(py, Class::Shape, "layer", layer)?;
        let view = detached(py, || self.0.slots(layer))?;
        let element = match self.0.core().layout().slot_type {
            SlotType::Float16 => ElementType::Float16,
            SlotType::Float32 => ElementType::Float32,
        };
        Ok(Memory::of_pool(&view, element))
    }
}

/// A sequence of a pool: the tokens of one request, in order.
///
/// Made by ``Pool.create``, forgotten by ``Pool.free``; dropping the object does not free the sequence. Every attribute
/// raises StateError once the sequence is freed.
#[pyclass(module = "kvarn", frozen)]
pub(crate) struct Sequence {
    pub(crate) core: Arc<PoolCore>,
    pub(crate) id: SequenceId,
}

#[pymethods]
impl Sequence {
    /// Tokens stored, held ones included.
    #[getter]
    fn length(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.view(py)?.length)
    }

    /// Tokens committed: all but those held back by the last step.
    #[getter]
    fn committed(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.view(py)?.committed)
    }

    /// First tiles that never change again, which ``Pool.publish`` takes: sealed, or a sink as a whole and full.
    #[getter]
    fn sealed(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.view(py)?.publishable(&self.core.layout().rule))
    }

    /// Page of each tile, -1 where it has none: int32 [tiles], a read-only snapshot.
    #[getter]
    fn block_table(&self, py: Python<'_>) -> PyResult<Memory> {
        let view = self.view(py)?;
        Ok(Memory::of_table(&view.block_table, &[view.block_table.len()]))
    }

    /// Slot of each tile, -1 where it has none: int32 [tiles], a read-only snapshot.
    #[getter]
    fn slot_table(&self, py: Python<'_>) -> PyResult<Memory> {
        let view = self.view(py)?;
        Ok(Memory::of_table(&view.slot_table, &[view.slot_table.len()]))
    }

    /// Whether it was moved out of the pool, by ``Pool.offload``; its tables are then -1.
    #[getter]
    fn offloaded(&self, py: Python<'_>) -> PyResult<bool> {
        detached(py, || self.core.is_offloaded(self.id))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        match self.view(py) {
            Ok(view) => format!("<kvarn {} of {} tokens>", self.id, view.length),
            Err(_) => format!("<kvarn {}, freed>", self.id),
        }
    }
}

impl Sequence {
    fn view(&self, py: Python<'_>) -> PyResult<SequenceView> {
        detached(py, || self.core.view(self.id))
    }
}

/// Use of a pool at one moment.
#[pyclass(module = "kvarn", frozen, get_all, eq)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stats {
    /// Pages of the pool, each the records of one sealed tile in every layer.
    pages: usize,
    /// Pages that sequences hold, and those reserved by open steps.
    pages_used: usize,
    /// Pages that the next step may take, cached ones included.
    pages_free: usize,
    /// Pages of published tiles, in use or cached.
    pages_published: usize,
    /// Pages of published tiles that no sequence holds: they stay until they are needed.
    pages_cached: usize,
    /// Slots of the pool, each one tile in 16 bit (32 with dtype="float32") in every layer.
    slots: usize,
    /// Slots that sequences hold, and those reserved by open steps.
    slots_used: usize,
    /// Slots that the next step may take, cached ones included.
    slots_free: usize,
    /// Sink slots of published tiles, in use or cached.
    slots_published: usize,
    /// Sink slots of published tiles that no sequence holds.
    slots_cached: usize,
    /// Sequences that exist.
    sequences: usize,
    /// Tokens of all sequences.
    tokens: usize,
    /// Steps planned and neither finished nor abandoned.
    open_steps: usize,
    /// Tiles of which a truncation kept a part as its record decodes, in 16 bit, since the pool was made.
    unsealed: u64,
    /// Published tiles that new sequences started with, since the pool was made.
    prefix_hits: u64,
    /// Tiles that new sequences asked for, and which were not published, since the pool was made.
    prefix_misses: u64,
    /// Tiles offered under a key that another page had, since the pool was made.
    prefix_duplicates: u64,
    /// Published tiles given up for room, since the pool was made.
    prefix_evictions: u64,
    /// Bytes of the pages in use, all layers.
    page_bytes: usize,
    /// Bytes of the slots in use, all layers.
    slot_bytes: usize,
    /// Bytes of device memory for partial results of attention, over all streams; those of static arrays are theirs.
    workspace_bytes: usize,
    /// Sequences that are offloaded.
    offloaded_sequences: usize,
    /// Bytes of host memory that they take.
    offloaded_bytes: usize,
    /// Elements that were NaN or infinite, stored as 0, since the pool was made.
    non_finite: u64,
    /// Values that were beyond the range of their stored type, since the pool was made.
    saturated: u64,
}

impl From<kvarn::pool::Stats> for Stats {
    fn from(stats: kvarn::pool::Stats) -> Self {
        let kvarn::tables::Stats { pages, slots, sequences, tokens, open_steps, unsealed, prefixes } =
            stats.tables;
        Self {
            pages: pages.total,
            pages_used: pages.used,
            pages_free: pages.free,
            pages_published: pages.published,
            pages_cached: pages.cached,
            slots: slots.total,
            slots_used: slots.used,
            slots_free: slots.free,
            slots_published: slots.published,
            slots_cached: slots.cached,
            sequences,
            tokens,
            open_steps,
            unsealed,
            prefix_hits: prefixes.hits,
            prefix_misses: prefixes.misses,
            prefix_duplicates: prefixes.duplicates,
            prefix_evictions: prefixes.evictions,
            page_bytes: stats.page_bytes,
            slot_bytes: stats.slot_bytes,
            workspace_bytes: stats.workspace_bytes,
            offloaded_sequences: stats.offloaded.sequences,
            offloaded_bytes: stats.offloaded.bytes,
            non_finite: stats.counts.non_finite,
            saturated: stats.counts.saturated,
        }
    }
}

#[pymethods]
impl Stats {
    fn __repr__(&self) -> String {
        format!(
            "Stats(pages={}, pages_used={}, pages_free={}, pages_published={}, pages_cached={}, slots={}, slots_used={}, slots_free={}, slots_published={}, slots_cached={}, sequences={}, tokens={}, open_steps={}, unsealed={}, prefix_hits={}, prefix_misses={}, prefix_duplicates={}, prefix_evictions={}, page_bytes={}, slot_bytes={}, workspace_bytes={}, offloaded_sequences={}, offloaded_bytes={}, non_finite={}, saturated={})",
            self.pages,
            self.pages_used,
            self.pages_free,
            self.pages_published,
            self.pages_cached,
            self.slots,
            self.slots_used,
            self.slots_free,
            self.slots_published,
            self.slots_cached,
            self.sequences,
            self.tokens,
            self.open_steps,
            self.unsealed,
            self.prefix_hits,
            self.prefix_misses,
            self.prefix_duplicates,
            self.prefix_evictions,
            self.page_bytes,
            self.slot_bytes,
            self.workspace_bytes,
            self.offloaded_sequences,
            self.offloaded_bytes,
            self.non_finite,
            self.saturated
        )
    }
}
