//! `kvarn._kvarn.Step`.

use kvarn::pool::AttendOptions;
use pyo3::prelude::*;

use crate::arguments::natural;
use crate::codec::refuse_non_finite;
use crate::error::{Class, detached};
use crate::memory::Memory;
use crate::open_step::{self, EXPANDED, KEYS, QUERIES};
use crate::tensor::Lent;

/// One forward pass of a batch; see `kvarn.Step`. Dropped without `finish`, it is abandoned.
#[pyclass(module = "kvarn._kvarn", frozen)]
pub(crate) struct Step(pub(crate) kvarn_cpu::Step);

#[pymethods]
impl Step {
    /// Stores K and V of one layer; returns how many elements were not finite, and saturated.
    fn append(
        &self,
        py: Python<'_>,
        layer: i64,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        rotated: bool,
        check: bool,
    ) -> PyResult<(u64, u64)> {
        let layer = natural(py, Class::Shape, "layer", layer)?;
        let (k, v) = (Lent::new("k", k)?, Lent::new("v", v)?);
        let (k, v) = (k.tensor(KEYS)?, v.tensor(KEYS)?);
        if check {
            for (name, tensor) in [("k", k), ("v", v)] {
                refuse_non_finite(py, name, tensor, |[token, head, channel]| {
                    format!("layer {layer}, token {token}, head {head}, channel {channel}")
                })?;
            }
        }
        let counts = detached(py, || self.0.append(layer, &k, &v, rotated))?;
        Ok((counts.non_finite, counts.saturated))
    }

    /// Attention of `q` over what is stored, to `out`, and `lse` if given.
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
    ) -> PyResult<()> {
        let layer = natural(py, Class::Shape, "layer", layer)?;
        let window = window.map(|window| natural(py, Class::Shape, "window", window)).transpose()?;
        let (q, out) = (Lent::new("q", q)?, Lent::new("out", out)?);
        q.check_apart(&out)?;
        let (q, out) = (q.tensor(QUERIES)?, out.tensor_mut(QUERIES)?);
        let mut lse = lse.map(|lse| Lent::new("lse", lse)).transpose()?;
        let lse = lse.as_mut().map(|lse| lse.floats_mut(&q.shape()[..2])).transpose()?;
        let sink_logits =
            sink_logits.map(|logits| Lent::new("sink_logits", logits)?.vector("[heads]")).transpose()?;
        let options = AttendOptions { scale, window, softcap, rotated };
        detached(py, || self.0.attend(layer, &q, &options, sink_logits.as_deref(), &out, lse))
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
        let (k, v) = (Lent::new("k", k)?, Lent::new("v", v)?);
        let (k, v) = (k.tensor_mut(EXPANDED)?, v.tensor_mut(EXPANDED)?);
        detached(py, || self.0.expand(layer, index, first, rotated, &k, &v))
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

    /// First row of each sequence, then `tokens`: int32 `[sequences + 1]`.
    #[getter]
    fn first_rows(&self) -> Memory {
        open_step::first_rows(self.0.open())
    }

    /// Page of each tile after append: int32 `[sequences, tiles]`.
    #[getter]
    fn block_table(&self) -> Memory {
        open_step::block_table(self.0.open())
    }

    /// Slot of each tile after append: int32 `[sequences, tiles]`.
    #[getter]
    fn slot_table(&self) -> Memory {
        open_step::slot_table(self.0.open())
    }

    /// Tokens of each sequence after the step: int32 `[sequences]`.
    #[getter]
    fn lengths(&self) -> Memory {
        open_step::lengths(self.0.open())
    }
}
