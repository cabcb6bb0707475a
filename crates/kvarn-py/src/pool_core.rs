//! What pools of every backend do alike: sequences and layers.

use std::sync::Arc;

use kvarn::pool::{LayerShape, PoolCore};
use kvarn::tables::SequenceId;
use pyo3::prelude::*;

use crate::arguments::{natural, naturals};
use crate::error::{Class, detached};
use crate::pool::Sequence;

/// A new sequence that holds what another one holds.
pub(crate) fn fork(
    py: Python<'_>,
    core: &Arc<PoolCore>,
    sequence: &Bound<'_, Sequence>,
) -> PyResult<Sequence> {
    let id = sequence.get().id;
    let id = detached(py, || core.fork(id))?;
    Ok(Sequence { core: Arc::clone(core), id })
}

/// Makes `sequences[i]` hold what `sequences[order[i]]` held.
pub(crate) fn reorder(
    py: Python<'_>,
    core: &PoolCore,
    sequences: &[Bound<'_, Sequence>],
    order: &[i64],
) -> PyResult<()> {
    let ids: Vec<_> = sequences.iter().map(|sequence| sequence.get().id).collect();
    let order = naturals(py, "order", order)?;
    detached(py, || core.reorder(&ids, &order))
}

/// Forgets a sequence.
pub(crate) fn free(py: Python<'_>, core: &PoolCore, sequence: &Bound<'_, Sequence>) -> PyResult<()> {
    let id = sequence.get().id;
    detached(py, || core.free(id))
}

/// Keeps the first `length` tokens.
pub(crate) fn truncate(
    py: Python<'_>,
    core: &PoolCore,
    sequence: &Bound<'_, Sequence>,
    length: i64,
) -> PyResult<()> {
    let id = sequence.get().id;
    let length = natural(py, Class::Shape, "length", length)?;
    detached(py, || core.truncate(id, length))
}

/// A batch as a step takes it: ids, counts, hold.
pub(crate) type Batch = (Vec<SequenceId>, Vec<usize>, Vec<usize>);

/// Checks and converts the arguments of a step.
pub(crate) fn batch(
    py: Python<'_>,
    sequences: &[Bound<'_, Sequence>],
    counts: &[i64],
    hold: &[i64],
) -> PyResult<Batch> {
    let ids = sequences.iter().map(|sequence| sequence.get().id).collect();
    Ok((ids, naturals(py, "count", counts)?, naturals(py, "hold", hold)?))
}

/// `(kv_heads, head_dim)` of each layer.
pub(crate) fn layers(core: &PoolCore) -> Vec<(usize, usize)> {
    core.layout().layers.iter().map(|layer| (layer.shape.kv_heads, layer.shape.head_dim)).collect()
}

/// Layers of `(kv_heads, head_dim)`.
pub(crate) fn layer_shapes(py: Python<'_>, layers: Vec<(i64, i64)>) -> PyResult<Vec<LayerShape>> {
    let number = |what, value| natural(py, Class::Shape, what, value);
    let shape = |(kv_heads, head_dim)| {
        Ok(LayerShape { kv_heads: number("kv_heads", kv_heads)?, head_dim: number("head_dim", head_dim)? })
    };
    layers.into_iter().map(shape).collect()
}
