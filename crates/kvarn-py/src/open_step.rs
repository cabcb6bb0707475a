//! What steps of every backend do alike: progress, closing, tables.

use kvarn::pool::{OpenStep, PoolError};
use pyo3::prelude::*;

use crate::arguments::natural;
use crate::error::{Class, detached};
use crate::memory::Memory;

/// Shape of k and v of a step, for messages.
pub(crate) const KEYS: &str = "[sum of counts, kv_heads, head_dim]";
/// Shape of q and out of a step, for messages.
pub(crate) const QUERIES: &str = "[sum of counts, heads, head_dim]";

/// Shape of k and v of an expansion, for messages.
pub(crate) const EXPANDED: &str = "[count, kv_heads, head_dim]";

/// Tokens stored of the sequence at `index` of the batch in one layer, at this moment.
pub(crate) fn stored(py: Python<'_>, open: &OpenStep, layer: i64, index: i64) -> PyResult<usize> {
    let layer = natural(py, Class::Shape, "layer", layer)?;
    let index = natural(py, Class::Shape, "index", index)?;
    detached(py, || open.stored(layer, index))
}

/// Makes the step the state of its sequences.
pub(crate) fn finish(py: Python<'_>, open: &OpenStep) -> PyResult<()> {
    detached(py, || open.finish())
}

/// Takes the step back.
pub(crate) fn abandon(py: Python<'_>, open: &OpenStep) -> PyResult<()> {
    detached(py, || {
        open.abandon();
        Ok::<_, PoolError>(())
    })
}

/// First row of each sequence, then the rows of the step: `[sequences + 1]`.
pub(crate) fn first_rows(open: &OpenStep) -> Memory {
    let rows = &open.plan().first_rows;
    Memory::of_table(rows, &[rows.len()])
}

/// Page of each tile after append: `[sequences, tiles]`.
pub(crate) fn block_table(open: &OpenStep) -> Memory {
    let batch = open.plan().batch_after();
    Memory::of_table(&batch.block_table, &[batch.lengths.len(), batch.tiles])
}

/// Slot of each tile after append: `[sequences, tiles]`.
pub(crate) fn slot_table(open: &OpenStep) -> Memory {
    let batch = open.plan().batch_after();
    Memory::of_table(&batch.slot_table, &[batch.lengths.len(), batch.tiles])
}

/// Tokens of each sequence after the step: `[sequences]`.
pub(crate) fn lengths(open: &OpenStep) -> Memory {
    let batch = open.plan().batch_after();
    Memory::of_table(&batch.lengths, &[batch.lengths.len()])
}
