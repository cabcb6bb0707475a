//! `kvarn._kvarn.CudaPool` and `CudaStep`: like `Pool` and `Step`, on a device and a stream.

use std::sync::Arc;

use kvarn::codec::SlotType;
use kvarn::pool::{AttendOptions, PoolError};
use kvarn::tables::SealRule;
use kvarn_cuda::{PoolOptions, Stream};
use kvarn_dlpack::ElementType;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::arguments::{natural, naturals};
use crate::config::Config;
use crate::error::{Class, ToPython, detached};
use crate::memory::Memory;
use crate::open_step::{self, EXPANDED, KEYS, QUERIES};
use crate::pool::{Sequence, Stats};
use crate::pool_core;
use crate::prefix;
use crate::saved::{self, Saved, Source};
use crate::tensor::Lent;

/// The cache memory of one model on a CUDA device; see `kvarn.Pool`.
#[pyclass(module = "kvarn._kvarn", frozen)]
pub(crate) struct CudaPool(Arc<kvarn_cuda::Pool>);

#[pymethods]
impl CudaPool {
    /// Reserves memory for layers of `(kv_heads, head_dim)` on the device with index `device`, or uses `memory`.
    #[new]
    #[expect(clippy::too_many_arguments, reason = "arguments of a Python method")]
    fn new(
        py: Python<'_>,
        config: &Config,
        layers: Vec<(i64, i64)>,
        pages: i64,
        slots: i64,
        float32: bool,
        device: i64,
        memory: Option<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
        check: bool,
    ) -> PyResult<Self> {
        let config = config.0;
        let layers = pool_core::layer_shapes(py, layers)?;
        let number = |what, value| natural(py, Class::Shape, what, value);
        let (pages, slots, device) =
            (number("pages", pages)?, number("slots", slots)?, number("device", device)?);
        let slot_type = if float32 { SlotType::Float32 } else { SlotType::Float16 };
        let memory = memory
            .map(|(pages, slots)| {
                let pages = Lent::on_device("memory for pages", &pages, device)?;
                let slots = Lent::on_device("memory for slots", &slots, device)?;
                Ok::<_, PyErr>((
                    pages.device_memory(ElementType::UInt8)?,
                    slots.device_memory(ElementType::Float16)?,
                ))
            })
            .transpose()?;
        let options = PoolOptions { memory, check };
        // SAFETY: the lender's promise, kept as long as the owners live, which the pool keeps; writing to memory that was lent
        // is documented as the caller's race.
        let make =
            || unsafe { kvarn_cuda::Pool::new(config, &layers, pages, slots, slot_type, device, options) };
        detached(py, make).map(Self)
    }

    /// Arrays whose addresses stay, for steps of these counts and sequences of at most `tokens` tokens.
    fn static_arrays(&self, py: Python<'_>, counts: Vec<i64>, tokens: i64) -> PyResult<StaticArrays> {
        let (counts, tokens) =
            (naturals(py, "count", &counts)?, natural(py, Class::Shape, "tokens", tokens)?);
        detached(py, || kvarn_cuda::StaticArrays::new(&self.0, &counts, tokens)).map(StaticArrays)
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

    /// Keeps the first `length` tokens; a record that is cut is decoded on `stream`.
    fn truncate(
        &self,
        py: Python<'_>,
        sequence: &Bound<'_, Sequence>,
        length: i64,
        stream: usize,
    ) -> PyResult<()> {
        let id = sequence.get().id;
        let length = natural(py, Class::Shape, "length", length)?;
        detached(py, || self.0.truncate(id, length, Stream::from_address(stream)))
    }

    /// A sequence as it is saved: header and image. Waits for the copy, which comes after what `stream` was given.
    fn save<'py>(
        &self,
        py: Python<'py>,
        sequence: &Bound<'_, Sequence>,
        stream: usize,
    ) -> PyResult<Saved<'py>> {
        saved::of_cuda(py, &self.0, sequence, stream)
    }

    /// A new sequence from what was saved, for work given to `stream` afterwards.
    fn load(&self, py: Python<'_>, source: Source, stream: usize) -> PyResult<Sequence> {
        let stream = Stream::from_address(stream);
        saved::load(py, self.0.core(), source, |mut input| self.0.load(&mut input, stream))
    }

    /// Has `stream` move a sequence out of the pool.
    fn offload(&self, py: Python<'_>, sequence: &Bound<'_, Sequence>, stream: usize) -> PyResult<()> {
        let id = sequence.get().id;
        detached(py, || self.0.offload(id, Stream::from_address(stream)))
    }

    /// Has `stream` bring an offloaded sequence back.
    fn restore(&self, py: Python<'_>, sequence: &Bound<'_, Sequence>, stream: usize) -> PyResult<()> {
        let id = sequence.get().id;
        detached(py, || self.0.restore(id, Stream::from_address(stream)))
    }

    /// Plans a step; `counts` and `hold` have one entry per sequence.
    fn step(
        &self,
        py: Python<'_>,
        sequences: Vec<Bound<'_, Sequence>>,
        counts: Vec<i64>,
        hold: Vec<i64>,
        arrays: Option<&Bound<'_, StaticArrays>>,
    ) -> PyResult<CudaStep> {
        let (ids, counts, hold) = pool_core::batch(py, &sequences, &counts, &hold)?;
        let arrays = arrays.map(|arrays| &*arrays.get().0);
        detached(py, || self.0.step(&ids, &counts, &hold, arrays)).map(CudaStep)
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
        let device = self.0.device().index();
        let (k, v) = (Lent::on_device("k", k, device)?, Lent::on_device("v", v, device)?);
        let stream = k.stream()?;
        let (k, v) = (k.device_tensor(EXPANDED, true)?, v.device_tensor(EXPANDED, true)?);
        detached(py, || self.0.expand(id, layer, first, rotated, &k, &v, stream))
    }

    /// Usage. Waits for the device.
    fn stats(&self, py: Python<'_>) -> PyResult<Stats> {
        let stats = detached(py, || {
            let (counts, workspace_bytes) = (self.0.counts()?, self.0.workspace_bytes());
            self.0.settle()?;
            Ok::<_, kvarn_cuda::Error>(kvarn::pool::Stats {
                counts,
                workspace_bytes,
                ..self.0.core().stats()
            })
        })?;
        Ok(stats.into())
    }

    /// `(kv_heads, head_dim)` of each layer.
    #[getter]
    fn layers(&self) -> Vec<(usize, usize)> {
        pool_core::layers(self.0.core())
    }

    /// Bytes of device memory that pages and slots take now.
    #[getter]
    fn provided_bytes(&self) -> usize {
        self.0.provided_bytes()
    }

    /// Pages of one layer.
    fn pages(&self, py: Python<'_>, layer: i64) -> PyResult<Memory> {
        let layer = natural(py, Class::Shape, "layer", layer)?;
        let view = detached(py, || self.0.pages(layer))?;
        Ok(Memory::of_device_pool(&view, ElementType::UInt8))
    }

    /// Slots of one layer.
    fn slots(&self, py: Python<'_>, layer: i64) -> PyResult<Memory> {
        let layer = natural(py, Class::Shape, "layer", layer)?;
        let view = detached(py, || self.0.slots(layer))?;
        Ok(Memory::of_device_pool(&view, ElementType::Float16))
    }
}

/// Arrays whose addresses stay; see `kvarn.StaticArrays`.
#[pyclass(module = "kvarn._kvarn", frozen)]
pub(crate) struct StaticArrays(Arc<kvarn_cuda::StaticArrays>);

/// One forward pass of a batch on a device; see `kvarn.Step`. Dropped without `finish`, it is abandoned.
#[pyclass(module = "kvarn._kvarn", frozen)]
pub(crate) struct CudaStep(kvarn_cuda::Step);

#[pymethods]
impl CudaStep {
    /// Stores K and V of one layer.
    fn append(
        &self,
        py: Python<'_>,
        layer: i64,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        rotated: bool,
    ) -> PyResult<()> {
        let layer = natural(py, Class::Shape, "layer", layer)?;
        let device = self.device();
        let (k, v) = (Lent::on_device("k", k, device)?, Lent::on_device("v", v, device)?);
        let stream = k.stream()?;
        let (k, v) = (k.device_tensor(KEYS, false)?, v.device_tensor(KEYS, false)?);
        detached(py, || self.0.append(layer, &k, &v, rotated, stream))
    }

    /// Attention of `q` over what is stored, to `out`, and `lse` if given; without the rows of sequences that have more than
    /// `most_columns` query columns: returns whether there are such.
    #[expect(clippy::too_many_arguments, reason = "arguments of a Python method")]
    fn attend(
        &self,
        py: Python<'_>,
        layer: i64,
        q: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        lse: Option<&Bound<'_, PyAny>>,
        scale: Option<f32>,
        window: Option<i64>,
        softcap: Option<f32>,
        sink_logits: Option<&Bound<'_, PyAny>>,
        rotated: bool,
        most_columns: usize,
    ) -> PyResult<bool> {
        let layer = natural(py, Class::Shape, "layer", layer)?;
        let window = window.map(|window| natural(py, Class::Shape, "window", window)).transpose()?;
        let device = self.device();
        let (q, out) = (Lent::on_device("q", q, device)?, Lent::on_device("out", out, device)?);
        let stream = q.stream()?;
        q.check_apart(&out)?;
        let (q, out) = (q.device_tensor(QUERIES, false)?, out.device_tensor(QUERIES, true)?);
        let floats = |name, object: Option<&Bound<'_, PyAny>>| {
            object.map(|object| Lent::on_device(name, object, device)?.device_floats()).transpose()
        };
        let (lse, sink_logits) = (floats("lse", lse)?, floats("sink_logits", sink_logits)?);
        let options = AttendOptions { scale, window, softcap, rotated };
        // SAFETY: torch keeps the memory of a tensor until work given to its stream has run.
        detached(py, || unsafe {
            self.0.attend(layer, &q, &options, sink_logits, &out, lse, most_columns, stream)
        })
    }

    /// Tokens stored of the sequence at `index` of the batch in one layer, at this moment.
    fn stored(&self, py: Python<'_>, layer: i64, index: i64) -> PyResult<usize> {
        open_step::stored(py, self.0.open(), layer, index)
    }

    /// Decodes the tokens from `first` on, of the sequence at `index` of the batch in one layer, to `k` and `v`,
    /// `[count, kv_heads, head_dim]`.
    #[expect(clippy::too_many_arguments, reason = "arguments of a Python method")]
    fn expand(
        &self,
        py: Python<'_>,
        layer: i64,
        index: i64,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        first: i64,
        rotated: bool,
    ) -> PyResult<()> {
        let layer = natural(py, Class::Shape, "layer", layer)?;
        let index = natural(py, Class::Shape, "index", index)?;
        let first = natural(py, Class::Shape, "first", first)?;
        let device = self.device();
        let (k, v) = (Lent::on_device("k", k, device)?, Lent::on_device("v", v, device)?);
        let stream = k.stream()?;
        let (k, v) = (k.device_tensor(EXPANDED, true)?, v.device_tensor(EXPANDED, true)?);
        detached(py, || self.0.expand(layer, index, first, rotated, &k, &v, stream))
    }

    /// Sends the step's arrays to where a captured graph reads them, for work given to `stream` next.
    fn send(&self, py: Python<'_>, stream: usize) -> PyResult<()> {
        detached(py, || self.0.send(Stream::from_address(stream)))
    }

    /// The graph was given to the stream: every layer counts as appended to.
    fn replayed(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || {
            self.0.replayed();
            Ok::<_, kvarn_cuda::Error>(())
        })
    }

    /// Makes the step the state of its sequences.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        open_step::finish(py, self.0.open())
    }

    /// Takes the step back.
    fn abandon(&self, py: Python<'_>) -> PyResult<()> {
        open_step::abandon(py, self.0.open())
    }

    /// New tokens of all sequences.
    #[getter]
    fn tokens(&self) -> usize {
        self.0.open().plan().tokens
    }

    /// First row of each sequence, then `tokens`: int32 `[sequences + 1]`, on the host.
    #[getter]
    fn first_rows(&self) -> Memory {
        open_step::first_rows(self.0.open())
    }

    /// Page of each tile after append: int32 `[sequences, tiles]`, on the host.
    #[getter]
    fn block_table(&self) -> Memory {
        open_step::block_table(self.0.open())
    }

    /// Slot of each tile after append: int32 `[sequences, tiles]`, on the host.
    #[getter]
    fn slot_table(&self) -> Memory {
        open_step::slot_table(self.0.open())
    }

    /// Tokens of each sequence after the step: int32 `[sequences]`, on the host.
    #[getter]
    fn lengths(&self) -> Memory {
        open_step::lengths(self.0.open())
    }
}

impl CudaStep {
    fn device(&self) -> usize {
        self.0.pool().device().index()
    }
}

/// Most bytes of device memory that partial results of attention take on one stream, in layers of `(kv_heads, head_dim)`, where
/// sequences have up to `tokens` tokens and steps hold back up to `hold`.
#[pyfunction]
pub(crate) fn most_workspace_bytes(
    py: Python<'_>,
    config: &Config,
    layers: Vec<(i64, i64)>,
    tokens: i64,
    hold: i64,
) -> PyResult<usize> {
    let natural = |what: &str, value: i64| natural(py, Class::Shape, what, value);
    let (tokens, hold) = (natural("tokens", tokens)?, natural("hold", hold)?);
    let rule = SealRule::new(config.0.group(), config.0.sink_tokens(), config.0.recent_tokens())
        .map_err(|error| PoolError::from(error).to_python(py))?;
    let mut most = 0;
    for (kv_heads, head_dim) in layers {
        let (kv_heads, head_dim) = (natural("kv_heads", kv_heads)?, natural("head_dim", head_dim)?);
        most = most.max(kvarn_cuda::most_workspace_bytes(kv_heads, head_dim, &rule, tokens, hold));
    }
    Ok(most)
}

/// Makes a device ready: context, kernels. Before a graph capture, or to have the time it takes early.
#[pyfunction]
pub(crate) fn warmup(py: Python<'_>, device: i64) -> PyResult<()> {
    let device = natural(py, Class::Shape, "device", device)?;
    detached(py, || kvarn_cuda::warmup(device))
}
