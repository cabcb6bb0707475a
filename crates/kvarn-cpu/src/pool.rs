//! A pool: the tables of `kvarn` and the host memory they speak of.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvarn::codec::{EncodeCounts, Rotation, SlotType};
use kvarn::record::RecordLayout;
use kvarn::tables::{SealRule, SequenceId, SequenceView, Tables};
use kvarn::{Config, tables};

use crate::dtype::slot_dtype;
use crate::error::shape;
use crate::memory::{HostMemory, MemoryView};
use crate::read::expand_head;
use crate::threads::install;
use crate::{Error, Step, TensorMut};

/// What one layer caches per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// KV heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

/// How full a pool is, and what its encoders met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Pages, slots, sequences, tokens.
    pub tables: tables::Stats,
    /// Bytes of the pages in use, all layers.
    pub page_bytes: usize,
    /// Bytes of the slots in use, all layers.
    pub slot_bytes: usize,
    /// Non-finite and saturated values since the pool was made.
    pub counts: EncodeCounts,
}

/// One layer: its shape, and where its pages and slots begin.
#[derive(Debug)]
pub(crate) struct Layer {
    pub shape: LayerShape,
    pub config: Config,
    pub layout: RecordLayout,
    pub rotation: Rotation,
    pages_at: usize,
    slots_at: usize,
}

/// The cache memory of one model on the CPU.
///
/// Every method may be called from any thread. Pages are `[pages, kv_heads, record_bytes]` bytes per layer, slots
/// `[slots, kv_heads, 2, group, head_dim]` elements, K before V.
#[derive(Debug)]
pub struct Pool {
    pub(crate) config: Config,
    pub(crate) rule: SealRule,
    pub(crate) slot_type: SlotType,
    pub(crate) layers: Vec<Layer>,
    tables: Mutex<Tables>,
    counts: Mutex<EncodeCounts>,
    pages: Arc<HostMemory>,
    slots: Arc<HostMemory>,
    page_count: usize,
    slot_count: usize,
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
        if layers.is_empty() {
            return Err(Error::Value {
                what: "layers",
                got: "0".into(),
                expected: "1 or more".into(),
                fix: "a pool serves at least one layer",
            });
        }
        let rule = SealRule::new(config.group(), config.sink_tokens(), config.recent_tokens())?;
        let tables = Tables::new(rule, pages, slots)?;
        let too_large =
            |what| Error::Memory { what, bytes: usize::MAX, reason: "beyond the address space".into() };
        let (mut page_bytes, mut slot_bytes) = (0usize, 0usize);
        let mut made = Vec::with_capacity(layers.len());
        for (index, &shape) in layers.iter().enumerate() {
            if !(1..=4096).contains(&shape.kv_heads) {
                return Err(Error::Value {
                    what: "kv_heads",
                    got: format!("{} of layer {index}", shape.kv_heads),
                    expected: "1 to 4096".into(),
                    fix: "pass the KV heads of the layer",
                });
            }
            let config = config.with_head_dim(shape.head_dim)?;
            let layout = config.layout();
            let layer = Layer {
                shape,
                config,
                rotation: Rotation::new(shape.head_dim),
                pages_at: page_bytes,
                slots_at: slot_bytes,
                layout,
            };
            let grow = |total: usize, count: usize, each: usize| count.checked_mul(each)?.checked_add(total);
            page_bytes = grow(page_bytes, pages, layer.page_bytes()).ok_or_else(|| too_large("pages"))?;
            slot_bytes =
                grow(slot_bytes, slots, layer.slot_bytes(slot_type)).ok_or_else(|| too_large("slots"))?;
            made.push(layer);
        }
        Ok(Arc::new(Self {
            config,
            rule,
            slot_type,
            layers: made,
            tables: Mutex::new(tables),
            counts: Mutex::default(),
            pages: HostMemory::new(page_bytes, "pages")?,
            slots: HostMemory::new(slot_bytes, "slots")?,
            page_count: pages,
            slot_count: slots,
        }))
    }

    /// Configuration; its head dim is that of the first layers' config, each layer has its own.
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Element type of the slots.
    pub const fn slot_type(&self) -> SlotType {
        self.slot_type
    }

    /// Shapes of the layers.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = LayerShape> + '_ {
        self.layers.iter().map(|layer| layer.shape)
    }

    /// A new, empty sequence.
    pub fn create(&self) -> SequenceId {
        self.tables().create()
    }

    /// Forgets a sequence and gives back its pages and slots.
    pub fn free(&self, sequence: SequenceId) -> Result<(), Error> {
        Ok(self.tables().free(sequence)?)
    }

    /// Keeps the first `keep` tokens; see [`Tables::truncate`].
    pub fn truncate(&self, sequence: SequenceId, keep: usize) -> Result<(), Error> {
        Ok(self.tables().truncate(sequence, keep)?)
    }

    /// What is stored of a sequence.
    pub fn view(&self, sequence: SequenceId) -> Result<SequenceView, Error> {
        Ok(self.tables().view(sequence)?.clone())
    }

    /// Usage.
    pub fn stats(&self) -> Stats {
        let tables = self.tables().stats();
        let each = |bytes: &dyn Fn(&Layer) -> usize| self.layers.iter().map(bytes).sum::<usize>();
        Stats {
            tables,
            page_bytes: tables.pages.used * each(&Layer::page_bytes),
            slot_bytes: tables.slots.used * each(&|layer| layer.slot_bytes(self.slot_type)),
            counts: *self.counts.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Plans a step: one forward pass that appends `counts[i]` tokens to `sequences[i]`, of which the newest `hold[i]`
    /// stay uncommitted. All or nothing; see [`Tables::plan_step`].
    pub fn step(
        self: &Arc<Self>,
        sequences: &[SequenceId],
        counts: &[usize],
        hold: &[usize],
    ) -> Result<Step, Error> {
        let plan = self.tables().plan_step(sequences, counts, hold)?;
        Ok(Step::new(Arc::clone(self), plan))
    }

    /// Decodes a sequence in one layer to `k` and `v`, `[length, kv_heads, head_dim]`.
    pub fn expand(
        &self,
        sequence: SequenceId,
        layer: usize,
        rotated: bool,
        k: &TensorMut<'_>,
        v: &TensorMut<'_>,
    ) -> Result<(), Error> {
        let at = self.layer(layer)?;
        // Held to the end: nobody truncates the sequence and overwrites its slots meanwhile.
        let tables = self.tables();
        self.expand_view(at, tables.view(sequence)?, rotated, k, v)
    }

    /// Decodes what a view says is stored.
    pub(crate) fn expand_view(
        &self,
        at: &Layer,
        view: &SequenceView,
        rotated: bool,
        k: &TensorMut<'_>,
        v: &TensorMut<'_>,
    ) -> Result<(), Error> {
        let LayerShape { kv_heads, head_dim } = at.shape;
        for (what, tensor) in [("k", k), ("v", v)] {
            if tensor.shape() != [view.length, kv_heads, head_dim] {
                let expected =
                    format!("[{}, {kv_heads}, {head_dim}] (length, kv_heads, head_dim)", view.length);
                return Err(shape(
                    what,
                    &tensor.shape(),
                    expected,
                    "allocate the output for the whole sequence",
                ));
            }
        }
        let spans: Vec<_> = view.spans(&self.rule).collect();
        install(|| {
            use rayon::prelude::*;
            (0..kv_heads).into_par_iter().for_each(|head| {
                expand_head(self, at, &spans, head, rotated, k, v);
            });
        });
        Ok(())
    }

    /// Pages of one layer: uint8 `[pages, kv_heads, record_bytes]`.
    pub fn pages(&self, layer: usize) -> Result<MemoryView, Error> {
        let at = self.layer(layer)?;
        let shape = vec![self.page_count, at.shape.kv_heads, at.layout.record_bytes];
        Ok(MemoryView { owner: Arc::clone(&self.pages), offset: at.pages_at, shape })
    }

    /// Slots of one layer: `[slots, kv_heads, 2, group, head_dim]` of the slot type.
    pub fn slots(&self, layer: usize) -> Result<MemoryView, Error> {
        let at = self.layer(layer)?;
        let shape = vec![self.slot_count, at.shape.kv_heads, 2, self.config.group(), at.shape.head_dim];
        Ok(MemoryView { owner: Arc::clone(&self.slots), offset: at.slots_at, shape })
    }

    pub(crate) fn layer(&self, layer: usize) -> Result<&Layer, Error> {
        self.layers.get(layer).ok_or_else(|| Error::Value {
            what: "layer",
            got: layer.to_string(),
            expected: format!("0 to {}", self.layers.len() - 1),
            fix: "the pool was made for that many layers",
        })
    }

    pub(crate) fn tables(&self) -> MutexGuard<'_, Tables> {
        // The tables change nothing before they have checked everything: a panic cannot leave them half changed.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn count(&self, counts: EncodeCounts) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner) += counts;
    }

    /// The record of one KV head in a page.
    pub(crate) fn record(&self, layer: &Layer, page: usize, head: usize) -> *mut u8 {
        let bytes = layer.layout.record_bytes;
        assert!(page < self.page_count && head < layer.shape.kv_heads);
        self.pages.at(layer.pages_at + (page * layer.shape.kv_heads + head) * bytes, bytes)
    }

    /// K (`side` 0) or V (1) of one KV head in a slot: `[group, head_dim]`.
    pub(crate) fn slot(&self, layer: &Layer, slot: usize, head: usize, side: usize) -> *mut u8 {
        let bytes = layer.slot_bytes(self.slot_type) / layer.shape.kv_heads / 2;
        assert!(slot < self.slot_count && head < layer.shape.kv_heads && side < 2);
        self.slots.at(layer.slots_at + ((slot * layer.shape.kv_heads + head) * 2 + side) * bytes, bytes)
    }
}

impl Layer {
    /// Bytes of one page in this layer.
    pub(crate) const fn page_bytes(&self) -> usize {
        self.shape.kv_heads * self.layout.record_bytes
    }

    /// Bytes of one slot in this layer.
    pub(crate) const fn slot_bytes(&self, slot_type: SlotType) -> usize {
        self.shape.kv_heads * 2 * self.config.group() * self.shape.head_dim * slot_dtype(slot_type).bytes()
    }
}
