//! A pool: the core that all backends share, and host memory.

use std::sync::Arc;

use kvarn::Config;
use kvarn::codec::SlotType;
use kvarn::pool::{Layer, LayerShape, PoolCore, PoolLayout, check_expand};
use kvarn::tables::{SequenceId, SequenceView};

use crate::memory::{HostMemory, MemoryView};
use crate::read::expand_head;
use crate::threads::install;
use crate::{Error, Step, TensorMut};

/// The cache memory of one model on the CPU.
///
/// Every method may be called from any thread.
#[derive(Debug)]
pub struct Pool {
    core: Arc<PoolCore>,
    pages: Arc<HostMemory>,
    slots: Arc<HostMemory>,
}

impl Pool {
    /// Reserves a pool of `pages` pages and `slots` slots for `layers`. Memory is taken as it is used.
    pub fn new(
        config: Config,
        layers: &[LayerShape],
        pages: usize,
        slots: usize,
        slot_type: SlotType,
    ) -> Result<Arc<Self>, Error> {
        let core = PoolCore::new(PoolLayout::new(config, layers, pages, slots, slot_type)?)?;
        let pages = HostMemory::new(core.layout().page_memory, layers.len(), "pages")?;
        let slots = HostMemory::new(core.layout().slot_memory, layers.len(), "slots")?;
        Ok(Arc::new(Self { core, pages, slots }))
    }

    /// Sequences, tables, layout.
    pub const fn core(&self) -> &Arc<PoolCore> {
        &self.core
    }

    /// Plans a step; see [`PoolCore::step`].
    pub fn step(
        self: &Arc<Self>,
        sequences: &[SequenceId],
        counts: &[usize],
        hold: &[usize],
    ) -> Result<Step, Error> {
        Ok(Step::new(Arc::clone(self), self.core.step(sequences, counts, hold)?))
    }

    /// Decodes the tokens of a sequence from `first` on, in one layer, to `k` and `v`, `[count, kv_heads, head_dim]`.
    pub fn expand(
        &self,
        sequence: SequenceId,
        layer: usize,
        first: usize,
        rotated: bool,
        k: &TensorMut<'_>,
        v: &TensorMut<'_>,
    ) -> Result<(), Error> {
        let at = self.layout().layer(layer)?;
        self.core.while_stored(sequence, |view| self.expand_view(at, view, first, rotated, k, v))
    }

    /// Decodes the tokens from `first` on of what a view says is stored.
    pub(crate) fn expand_view(
        &self,
        at: &Layer,
        view: &SequenceView,
        first: usize,
        rotated: bool,
        k: &TensorMut<'_>,
        v: &TensorMut<'_>,
    ) -> Result<(), Error> {
        let tokens = check_expand(at, view.length, first, k.shape(), v.shape())?;
        let spans: Vec<_> = view.spans(&self.layout().rule).filter_map(|span| span.within(&tokens)).collect();
        install(|| {
            use rayon::prelude::*;
            (0..at.shape.kv_heads).into_par_iter().for_each(|head| {
                expand_head(self, at, &spans, head, first, rotated, k, v);
            });
        });
        Ok(())
    }

    /// Pages of one layer: uint8 `[pages, kv_heads, record_bytes]`.
    pub fn pages(&self, layer: usize) -> Result<MemoryView, Error> {
        let at = self.layout().layer(layer)?;
        let shape = self.layout().pages_shape(at);
        Ok(MemoryView { owner: Arc::clone(&self.pages), offset: at.pages_at, shape })
    }

    /// Slots of one layer: `[slots, kv_heads, 2, group, head_dim]` of the slot type.
    pub fn slots(&self, layer: usize) -> Result<MemoryView, Error> {
        let at = self.layout().layer(layer)?;
        let shape = self.layout().slots_shape(at);
        Ok(MemoryView { owner: Arc::clone(&self.slots), offset: at.slots_at, shape })
    }

    pub(crate) fn layout(&self) -> &PoolLayout {
        self.core.layout()
    }

    /// Memory of the pages.
    pub(crate) fn page_memory(&self) -> &HostMemory {
        &self.pages
    }

    /// Memory of the slots.
    pub(crate) fn slot_memory(&self) -> &HostMemory {
        &self.slots
    }

    /// The record of one KV head in a page.
    pub(crate) fn record(&self, layer: &Layer, page: usize, head: usize) -> *mut u8 {
        self.pages.at(self.layout().record_at(layer, page, head), layer.layout.record_bytes)
    }

    /// K (`side` 0) or V (1) of one KV head in a slot: `[group, head_dim]`.
    pub(crate) fn slot(&self, layer: &Layer, slot: usize, head: usize, side: usize) -> *mut u8 {
        let (at, bytes) = self.layout().slot_at(layer, slot, head, side);
        self.slots.at(at, bytes)
    }
}
