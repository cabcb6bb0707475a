//! The codec over arrays of tiles.

use std::fs::File;
use std::path::PathBuf;

use kvarn::record;
use kvarn_cpu::{TensorRef, decode_tiles, encode_tiles, find_non_finite};
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::config::Config;
use crate::error::{Class, ToPython, attached, detached};
use crate::memory::Memory;
use crate::tensor::Lent;

const TILES: &str = "[tiles, group, head_dim]";

/// Records `[tiles, record_bytes]` of `k` and `v`, and how many elements were not finite, and saturated.
#[pyfunction]
pub(crate) fn encode(
    py: Python<'_>,
    config: &Config,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    rotated: bool,
    check: bool,
) -> PyResult<(Memory, u64, u64)> {
    let config = config.0;
    let (k, v) = (Lent::new("k", k)?, Lent::new("v", v)?);
    let (k, v) = (k.tensor(TILES)?, v.tensor(TILES)?);
    if check {
        for (name, tensor) in [("k", k), ("v", v)] {
            refuse_non_finite(py, name, tensor, |[tile, token, channel]| {
                format!("tile {tile}, token {token}, channel {channel}")
            })?;
        }
    }
    let shape = [k.shape()[0], config.layout().record_bytes];
    let mut records = zeros(py, &shape)?;
    let (records, counts) = detached(py, move || {
        encode_tiles(&config, k, v, rotated, &mut records).map(|counts| (records, counts))
    })?;
    Ok((Memory::of_bytes(records, &shape), counts.non_finite, counts.saturated))
}

/// K and V, float32 `[tiles, group, head_dim]`, of `records`.
#[pyfunction]
pub(crate) fn decode(
    py: Python<'_>,
    config: &Config,
    records: &Bound<'_, PyAny>,
    rotated: bool,
) -> PyResult<(Memory, Memory)> {
    let config = config.0;
    let lent = Lent::new("records", records)?;
    let records = native(&config, &lent)?;
    let record_bytes = config.layout().record_bytes;
    let shape = [records.len() / record_bytes, config.group(), config.head_dim()];
    let (mut k, mut v) = (zeros(py, &shape)?, zeros(py, &shape)?);
    let (k, v) =
        detached(py, move || decode_tiles(&config, records, rotated, &mut k, &mut v).map(|()| (k, v)))?;
    Ok((Memory::of_floats(k, &shape), Memory::of_floats(v, &shape)))
}

/// Native records in published order, `[tiles, published_bytes]`.
#[pyfunction]
pub(crate) fn to_published(py: Python<'_>, config: &Config, records: &Bound<'_, PyAny>) -> PyResult<Memory> {
    let config = config.0;
    let lent = Lent::new("records", records)?;
    let records = native(&config, &lent)?;
    let record_bytes = config.layout().record_bytes;
    let bytes = record::published_bytes(&config).map_err(|error| error.to_python(py))?;
    let shape = [records.len() / record_bytes, bytes];
    let mut published = zeros(py, &shape)?;
    let published = detached(py, move || {
        let mut pairs = records.chunks_exact(record_bytes).zip(published.chunks_exact_mut(bytes));
        pairs.try_for_each(|(record, published)| record::to_published(&config, record, published))?;
        Ok::<_, kvarn::Error>(published)
    })?;
    Ok(Memory::of_bytes(published, &shape))
}

/// Records in published order as native ones, `[tiles, record_bytes]`, and how many parameters saturated.
#[pyfunction]
pub(crate) fn from_published(
    py: Python<'_>,
    config: &Config,
    published: &Bound<'_, PyAny>,
) -> PyResult<(Memory, u64)> {
    let config = config.0;
    let lent = Lent::new("published", published)?;
    let bytes = record::published_bytes(&config).map_err(|error| error.to_python(py))?;
    let published = lent.bytes(bytes, &origin(&config))?;
    let shape = [published.len() / bytes, config.layout().record_bytes];
    let mut records = zeros(py, &shape)?;
    let (records, saturated) = detached(py, move || {
        let mut saturated = 0;
        for (published, record) in published.chunks_exact(bytes).zip(records.chunks_exact_mut(shape[1])) {
            saturated += record::from_published(&config, published, record)?.0;
        }
        Ok::<_, kvarn::Error>((records, saturated))
    })?;
    Ok((Memory::of_bytes(records, &shape), saturated))
}

/// The header that stands before `records` in a file.
#[pyfunction]
pub(crate) fn records_header<'py>(
    py: Python<'py>,
    config: &Config,
    records: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyBytes>> {
    let config = config.0;
    let lent = Lent::new("records", records)?;
    let records = native(&config, &lent)?;
    let header = detached(py, move || record::Header::new(config, records))?;
    Ok(PyBytes::new(py, &header.to_bytes()))
}

/// Records `[tiles, record_bytes]` and configuration of a file.
#[pyfunction]
pub(crate) fn load_records(py: Python<'_>, path: PathBuf) -> PyResult<(Memory, Config)> {
    attached(py, || {
        let result = py.detach(|| File::open(&path).map(|mut file| record::read_records(&mut file)));
        let (header, records) = result
            // With these arguments Python makes the subclass for the number, and names the file.
            .map_err(|error| PyOSError::new_err((error.raw_os_error(), error.to_string(), path.clone())))?
            .map_err(|error| Class::Format.error(py, format!("{}: {error}", path.display())))?;
        let record_bytes = header.config.layout().record_bytes;
        let shape = [records.len() / record_bytes, record_bytes];
        Ok((Memory::of_bytes(records, &shape), Config(header.config)))
    })
}

/// Refuses a tensor with a NaN or an infinity; `place` says in words where an element is.
pub(crate) fn refuse_non_finite(
    py: Python<'_>,
    name: &str,
    tensor: TensorRef<'_>,
    place: impl Fn([usize; 3]) -> String,
) -> PyResult<()> {
    let found = attached(py, || Ok(py.detach(|| find_non_finite(tensor))))?;
    found.map_or(Ok(()), |index| {
        let text = format!(
            "{name}{index:?} ({}) is NaN or infinite: expected finite values; repair the input, or store such elements as 0 with check=False",
            place(index)
        );
        Err(Class::NonFinite.error(py, text))
    })
}

/// A zeroed array, or a `CapacityError` where the system has not as much memory.
fn zeros<T: Clone + Default>(py: Python<'_>, shape: &[usize]) -> PyResult<Vec<T>> {
    let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    let mut values = Vec::new();
    match elements {
        Some(elements) if values.try_reserve_exact(elements).is_ok() => {
            values.resize(elements, T::default());
            Ok(values)
        }
        _ => {
            let text =
                format!("a result of shape {shape:?}: the system has not as much memory; pass fewer tiles");
            Err(Class::Capacity.error(py, text))
        }
    }
}

fn native<'a>(config: &kvarn::Config, records: &'a Lent<'_>) -> PyResult<&'a [u8]> {
    records.bytes(config.layout().record_bytes, &origin(config))
}

fn origin(config: &kvarn::Config) -> String {
    format!(
        "records of {}, head_dim {}; use the configuration that made them",
        config.name(),
        config.head_dim()
    )
}
