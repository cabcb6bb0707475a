//! The bookkeeping of one pool, usable from every thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::fingerprint::fingerprint;
use super::{Offloaded, OpenStep, PoolError, PoolLayout};
use crate::codec::EncodeCounts;
use crate::tables::{self, SequenceId, SequenceView, StepId, Tables, Unseal};

/// How full a pool is, and what its encoders met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Pages, slots, sequences, tokens.
    pub tables: tables::Stats,
    /// Bytes of the pages in use, all layers.
    pub page_bytes: usize,
    /// Bytes of the slots in use, all layers.
    pub slot_bytes: usize,
    /// Bytes that a backend holds for partial results of attention beside the pool's memory.
    pub workspace_bytes: usize,
    /// Sequences whose bytes are on the host.
    pub offloaded: Offloaded,
    /// Non-finite and saturated values since the pool was made.
    pub counts: EncodeCounts,
}

/// Layout and tables of one pool.
#[derive(Debug)]
pub struct PoolCore {
    layout: PoolLayout,
    fingerprint: [u8; 16],
    tables: Mutex<Tables>,
    counts: Mutex<EncodeCounts>,
}

impl PoolCore {
    /// An empty pool.
    pub fn new(layout: PoolLayout) -> Result<Arc<Self>, PoolError> {
        let tables = Tables::new(layout.rule, layout.pages, layout.slots)?;
        let fingerprint = fingerprint(&layout);
        Ok(Arc::new(Self { layout, fingerprint, tables: Mutex::new(tables), counts: Mutex::default() }))
    }

    /// Layers and where their bytes lie.
    pub const fn layout(&self) -> &PoolLayout {
        &self.layout
    }

    /// What the bytes of the pool's tiles depend on besides the tokens: equal for pools whose tiles are interchangeable.
    pub const fn fingerprint(&self) -> [u8; 16] {
        self.fingerprint
    }

    /// A new, empty sequence.
    pub fn create(&self) -> SequenceId {
        self.tables().create()
    }

    /// A new sequence that holds what another one holds; see [`Tables::fork`].
    pub fn fork(&self, sequence: SequenceId) -> Result<SequenceId, PoolError> {
        Ok(self.tables().fork(sequence)?)
    }

    /// Makes each sequence hold what another one held; see [`Tables::reorder`].
    pub fn reorder(&self, sequences: &[SequenceId], order: &[usize]) -> Result<(), PoolError> {
        Ok(self.tables().reorder(sequences, order)?)
    }

    /// Forgets a sequence and gives back its pages and slots.
    pub fn free(&self, sequence: SequenceId) -> Result<(), PoolError> {
        Ok(self.tables().free(sequence)?)
    }

    /// Keeps the first `keep` tokens; see [`Tables::plan_truncation`]. Where the cut lies in a record, `unseal` decodes it
    /// first, from what the view says is stored; nobody changes a sequence meanwhile. If it fails, nothing has changed.
    pub fn truncate<E: From<PoolError>>(
        &self,
        sequence: SequenceId,
        keep: usize,
        unseal: impl FnOnce(&SequenceView, Unseal) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut tables = self.tables();
        let truncation = tables.plan_truncation(sequence, keep).map_err(PoolError::from)?;
        if let Some(tile) = truncation.unseal() {
            unseal(truncation.before(), tile)?;
        }
        truncation.commit();
        Ok(())
    }

    /// What is stored of a sequence.
    pub fn view(&self, sequence: SequenceId) -> Result<SequenceView, PoolError> {
        Ok(self.tables().view(sequence)?.clone())
    }

    /// Runs `read` on what is stored of a sequence in the pool; nobody changes the sequence, nor overwrites what it
    /// stores, meanwhile.
    pub fn while_stored<R, E: From<PoolError>>(
        &self,
        sequence: SequenceId,
        read: impl FnOnce(&SequenceView) -> Result<R, E>,
    ) -> Result<R, E> {
        let tables = self.tables();
        read(tables.resident_view(sequence).map_err(PoolError::from)?)
    }

    /// Plans a step: one forward pass that appends `counts[i]` tokens to `sequences[i]`, of which the newest `hold[i]`
    /// stay uncommitted. All or nothing; see [`Tables::plan_step`].
    pub fn step(
        self: &Arc<Self>,
        sequences: &[SequenceId],
        counts: &[usize],
        hold: &[usize],
    ) -> Result<OpenStep, PoolError> {
        let plan = self.tables().plan_step(sequences, counts, hold)?;
        Ok(OpenStep::new(Arc::clone(self), plan))
    }

    /// Whether a step was planned and is neither finished nor abandoned.
    pub fn is_open(&self, step: StepId) -> bool {
        self.tables().is_open(step)
    }

    /// Usage.
    pub fn stats(&self) -> Stats {
        let tables = self.tables();
        let mut offloaded = Offloaded::default();
        for lengths in tables.offloaded_lengths() {
            offloaded.sequences += 1;
            offloaded.bytes += self.layout.image_size(&lengths).map_or(0, |size| size.bytes());
        }
        let tables = tables.stats();
        let layers = &self.layout.layers;
        Stats {
            tables,
            page_bytes: tables.pages.used * layers.iter().map(|layer| layer.page_bytes).sum::<usize>(),
            slot_bytes: tables.slots.used * layers.iter().map(|layer| layer.slot_bytes).sum::<usize>(),
            workspace_bytes: 0,
            offloaded,
            counts: *self.counts.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Adds what an encoder met.
    pub fn count(&self, counts: EncodeCounts) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner) += counts;
    }

    pub(super) fn tables(&self) -> MutexGuard<'_, Tables> {
        // The tables change nothing before they have checked everything: a panic cannot leave them half changed.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
