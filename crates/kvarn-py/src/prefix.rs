//! Prefix sharing of pools of every backend, and the keys of tiles as Python passes them.

use std::sync::Arc;

use kvarn::pool::{PoolCore, PoolError, TileKey};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyType};

use crate::error::{Class, detached};
use crate::pool::Sequence;

/// A new sequence that starts with published tiles.
pub(crate) fn create(py: Python<'_>, core: &Arc<PoolCore>, keys: &[Bound<'_, PyAny>]) -> PyResult<Sequence> {
    let keys = tile_keys(py, keys)?;
    let id = detached(py, || Ok::<_, PoolError>(core.create_from(&keys)))?;
    Ok(Sequence { core: Arc::clone(core), id })
}

/// Publishes the first tiles of a sequence.
pub(crate) fn publish(
    py: Python<'_>,
    core: &PoolCore,
    sequence: &Bound<'_, Sequence>,
    keys: &[Bound<'_, PyAny>],
) -> PyResult<usize> {
    let (id, keys) = (sequence.get().id, tile_keys(py, keys)?);
    detached(py, || core.publish(id, &keys))
}

/// Tiles that a sequence would start with.
pub(crate) fn match_prefix(py: Python<'_>, core: &PoolCore, keys: &[Bound<'_, PyAny>]) -> PyResult<usize> {
    let keys = tile_keys(py, keys)?;
    detached(py, || Ok::<_, PoolError>(core.match_prefix(&keys)))
}

/// Publishes nothing any more.
pub(crate) fn unpublish(py: Python<'_>, core: &PoolCore) -> PyResult<()> {
    detached(py, || {
        core.unpublish();
        Ok::<_, PoolError>(())
    })
}

/// What the bytes of the pool's tiles depend on besides the tokens.
pub(crate) fn fingerprint<'py>(py: Python<'py>, core: &PoolCore) -> Bound<'py, PyBytes> {
    PyBytes::new(py, &core.fingerprint())
}

fn tile_keys(py: Python<'_>, keys: &[Bound<'_, PyAny>]) -> PyResult<Vec<TileKey>> {
    let key = |(index, key): (usize, &Bound<'_, PyAny>)| {
        let Ok(bytes) = key.cast::<PyBytes>() else {
            let kind: Bound<'_, PyType> = key.get_type();
            let text = format!(
                "key {index} of type {}: expected bytes; pass a list of keys as kvarn.prefix_keys makes them",
                kind.name()?
            );
            return Err(Class::DType.error(py, text));
        };
        let bytes = bytes.as_bytes();
        bytes.try_into().map_err(|_| {
            let text = format!(
                "key {index} of {} bytes: expected 16; pass keys as kvarn.prefix_keys makes them",
                bytes.len()
            );
            Class::Shape.error(py, text)
        })
    };
    keys.iter().enumerate().map(key).collect()
}
