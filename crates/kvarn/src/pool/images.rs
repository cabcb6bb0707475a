//! Copying sequences out of a pool and into it: for saving, loading, offloading and restoring.

use std::sync::Arc;

use super::{PoolCore, PoolError};
use crate::tables::{HostImage, Lengths, SequenceId, SequenceView};

/// What a sequence stored at one moment. Its pages and slots stay as they are until this is dropped.
#[derive(Debug)]
pub struct Snapshot {
    core: Arc<PoolCore>,
    view: SequenceView,
}

impl Snapshot {
    /// Which pages and slots.
    pub const fn view(&self) -> &SequenceView {
        &self.view
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        self.core.tables().release(&self.view);
    }
}

/// Where the bytes of a sequence are.
#[derive(Debug)]
pub enum Whereabouts {
    /// In the pool.
    Pool(Snapshot),
    /// On the host.
    Host(Lengths, HostImage),
}

/// Sequences that are offloaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloaded {
    /// How many.
    pub sequences: usize,
    /// Bytes of their images, on the host.
    pub bytes: usize,
}

impl PoolCore {
    /// Where to read a sequence that is to be saved. Refused in an open step.
    pub fn whereabouts(self: &Arc<Self>, sequence: SequenceId) -> Result<Whereabouts, PoolError> {
        let mut tables = self.tables();
        if tables.is_offloaded(sequence)? {
            let (lengths, image) = tables.offloaded(sequence)?;
            return Ok(Whereabouts::Host(lengths, image.clone()));
        }
        let view = tables.hold(sequence)?;
        Ok(Whereabouts::Pool(Snapshot { core: Arc::clone(self), view }))
    }

    /// Whether a sequence is offloaded.
    pub fn is_offloaded(&self, sequence: SequenceId) -> Result<bool, PoolError> {
        Ok(self.tables().is_offloaded(sequence)?)
    }

    /// Has `copy` make an image of a sequence, which is then offloaded. Its pages and slots are given back when the
    /// snapshot is dropped: once they are copied. Refused in an open step.
    pub fn offload<E: From<PoolError>>(
        self: &Arc<Self>,
        sequence: SequenceId,
        copy: impl FnOnce(&SequenceView) -> Result<HostImage, E>,
    ) -> Result<Snapshot, E> {
        let mut tables = self.tables();
        let image = copy(tables.idle_view(sequence).map_err(PoolError::from)?)?;
        let view = tables.offload(sequence, image).map_err(PoolError::from)?;
        Ok(Snapshot { core: Arc::clone(self), view })
    }

    /// A new sequence of these lengths, whose pages and slots `fill` writes. All or nothing.
    pub fn load<E: From<PoolError>>(
        &self,
        lengths: &Lengths,
        fill: impl FnOnce(&SequenceView) -> Result<(), E>,
    ) -> Result<SequenceId, E> {
        let mut tables = self.tables();
        let view = tables.allocate(lengths).map_err(PoolError::from)?;
        match fill(&view) {
            Ok(()) => Ok(tables.adopt(view)),
            Err(error) => {
                tables.release(&view);
                Err(error)
            }
        }
    }

    /// Brings an offloaded sequence back, whose pages and slots `fill` writes from its image, which is returned. All or
    /// nothing.
    pub fn restore<E: From<PoolError>>(
        &self,
        sequence: SequenceId,
        fill: impl FnOnce(&SequenceView, &HostImage) -> Result<(), E>,
    ) -> Result<HostImage, E> {
        let mut tables = self.tables();
        let (lengths, image) = tables.offloaded(sequence).map_err(PoolError::from)?;
        let image = image.clone();
        let view = tables.allocate(&lengths).map_err(PoolError::from)?;
        match fill(&view, &image) {
            Ok(()) => Ok(tables.restore(sequence, view).map_err(PoolError::from)?),
            Err(error) => {
                tables.release(&view);
                Err(error)
            }
        }
    }
}
