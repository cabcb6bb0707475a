//! `kvarn.Config`.

use kvarn::{ConfigOptions, PRESETS};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};

use crate::arguments::natural;
use crate::error::{Class, ToPython};

/// What a cache stores: bit widths, tile length, head dim, encoder options, 16-bit tokens.
///
/// Made from a name of the grammar ``kvarn_k{K}v{V}_g{G}`` (``kvarn`` alone means ``kvarn_k4v2_g128``) or from
/// ``key_bits``, ``value_bits`` and ``group`` (default 128). Immutable, hashable, comparable, picklable. Two caches with
/// equal configurations hold interchangeable records.
///
/// Args:
///     name: Bit widths and tile length in one word, as in ``"kvarn_k4v2_g128"``. K and V bits are 2, 3, 4 or 8; the
///         group is 64 or 128 tokens.
///     head_dim: Channels of a head, a multiple of 16 from 16 to 256.
///     key_bits: Bits of a K code, instead of the name.
///     value_bits: Bits of a V code, instead of the name.
///     group: Tokens of a tile, instead of the name.
///     refit: True: scales are refitted after rounding (same bytes, same decoder, better). False: KVarN as published.
///     iterations: Iterations of the variance normalisation, 0 to 64 (arXiv 2606.03458, Algorithm 1: 8).
///     sink_tokens: Leading positions that stay in 16 bit for good: 0 or a multiple of 16 up to the group. None: the
///         group.
///     recent_tokens: Newest committed positions that stay in 16 bit, 0 to four groups.
///
/// Raises:
///     ConfigError: A value is not supported, or the name is unknown.
#[pyclass(module = "kvarn", frozen, eq, hash)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Config(pub(crate) kvarn::Config);

#[pymethods]
impl Config {
    #[new]
    #[pyo3(signature = (
        name=None, *, head_dim, key_bits=None, value_bits=None, group=None, refit=true, iterations=8,
        sink_tokens=None, recent_tokens=0
    ))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python constructor")]
    fn new(
        py: Python<'_>,
        name: Option<&str>,
        head_dim: i64,
        key_bits: Option<i64>,
        value_bits: Option<i64>,
        group: Option<i64>,
        refit: bool,
        iterations: i64,
        sink_tokens: Option<i64>,
        recent_tokens: i64,
    ) -> PyResult<Self> {
        let natural = |what: &str, value: i64| natural(py, Class::Config, what, value);
        let head_dim = natural("head_dim", head_dim)?;
        let mut options = match (name, key_bits, value_bits) {
            (Some(name), None, None) if group.is_none() => {
                ConfigOptions::from_name(name, head_dim).map_err(|error| error.to_python(py))?
            }
            (None, Some(key_bits), Some(value_bits)) => ConfigOptions {
                key_bits: natural("key_bits", key_bits)?,
                value_bits: natural("value_bits", value_bits)?,
                group: natural("group", group.unwrap_or(128))?,
                head_dim,
                refit,
                iterations: 0,
                sink_tokens: None,
                recent_tokens: 0,
            },
            _ => {
                let text = format!(
                    "name {}, key_bits {}, value_bits {}, group {}: expected a name alone, or both bit widths; as in Config(\"kvarn_k4v2_g128\", head_dim=128)",
                    name.map_or("None".to_owned(), |name| format!("{name:?}")),
                    optional(key_bits),
                    optional(value_bits),
                    optional(group)
                );
                return Err(Class::Config.error(py, text));
            }
        };
        options.refit = refit;
        options.iterations = natural("iterations", iterations)?;
        options.sink_tokens = sink_tokens.map(|value| natural("sink_tokens", value)).transpose()?;
        options.recent_tokens = natural("recent_tokens", recent_tokens)?;
        kvarn::Config::new(&options).map(Self).map_err(|error| error.to_python(py))
    }

    /// The name of bit widths and tile length; it leaves out head dim, encoder options and 16-bit tokens.
    #[getter]
    fn name(&self) -> String {
        self.0.name()
    }

    /// Channels of a head.
    #[getter]
    fn head_dim(&self) -> usize {
        self.0.head_dim()
    }

    /// Bits of a K code.
    #[getter]
    fn key_bits(&self) -> usize {
        self.0.key_bits().get()
    }

    /// Bits of a V code.
    #[getter]
    fn value_bits(&self) -> usize {
        self.0.value_bits().get()
    }

    /// Tokens of a tile.
    #[getter]
    fn group(&self) -> usize {
        self.0.group()
    }

    /// Whether scales are refitted after rounding.
    #[getter]
    fn refit(&self) -> bool {
        self.0.refit()
    }

    /// Iterations of the variance normalisation.
    #[getter]
    fn iterations(&self) -> usize {
        self.0.iterations()
    }

    /// Leading positions that stay in 16 bit for good.
    #[getter]
    fn sink_tokens(&self) -> usize {
        self.0.sink_tokens()
    }

    /// Newest committed positions that stay in 16 bit.
    #[getter]
    fn recent_tokens(&self) -> usize {
        self.0.recent_tokens()
    }

    /// Bytes of a record: one tile of one KV head, K and V, padding included.
    #[getter]
    fn record_bytes(&self) -> usize {
        self.0.layout().record_bytes
    }

    /// Bits of a record, padding and parameters included, per element of K and V.
    #[getter]
    fn bits_per_element(&self) -> f64 {
        self.0.layout().bits_per_element()
    }

    /// Bytes of a record in published order. Raises FormatError with 3-bit codes, which that order does not have.
    #[getter]
    fn published_bytes(&self, py: Python<'_>) -> PyResult<usize> {
        kvarn::record::published_bytes(&self.0).map_err(|error| error.to_python(py))
    }

    /// A copy with some values changed, checked anew.
    ///
    /// Takes the constructor's arguments. A new name replaces both bit widths and the group; sinks that cover a whole
    /// group go on doing so when the group changes.
    #[pyo3(signature = (**changes))]
    fn replace(slf: &Bound<'_, Self>, changes: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let py = slf.py();
        let this = slf.get();
        let arguments = this.options(py)?;
        let empty = PyDict::new(py);
        let changes = changes.unwrap_or(&empty);
        if !changes.contains("name")? {
            arguments.set_item("key_bits", this.key_bits())?;
            arguments.set_item("value_bits", this.value_bits())?;
            arguments.set_item("group", this.group())?;
        }
        if this.sink_tokens() == this.group() {
            arguments.set_item("sink_tokens", py.None())?;
        }
        arguments.update(changes.as_mapping())?;
        let class: Bound<'_, PyType> = slf.get_type();
        Ok(*class.call((), Some(&arguments))?.cast::<Self>()?.get())
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        Ok((PyTuple::new(py, [self.name()])?, self.options(py)?))
    }

    fn __repr__(&self) -> String {
        format!(
            "Config('{}', head_dim={}, refit={}, iterations={}, sink_tokens={}, recent_tokens={})",
            self.name(),
            self.head_dim(),
            if self.refit() { "True" } else { "False" },
            self.iterations(),
            self.sink_tokens(),
            self.recent_tokens()
        )
    }
}

impl Config {
    /// Keyword arguments that make an equal configuration, together with the name.
    fn options<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let options = PyDict::new(py);
        options.set_item("head_dim", self.head_dim())?;
        options.set_item("refit", self.refit())?;
        options.set_item("iterations", self.iterations())?;
        options.set_item("sink_tokens", self.sink_tokens())?;
        options.set_item("recent_tokens", self.recent_tokens())?;
        Ok(options)
    }
}

fn optional(value: Option<i64>) -> String {
    value.map_or("None".to_owned(), |value| value.to_string())
}

/// Names of the recommended configurations. Every pair of bit widths from {2, 3, 4, 8} has a name.
#[pyfunction]
pub(crate) fn presets() -> Vec<&'static str> {
    PRESETS.to_vec()
}
