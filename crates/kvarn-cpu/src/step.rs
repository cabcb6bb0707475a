//! A step: one forward pass of a batch over every layer of a pool.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use kvarn::codec::EncodeCounts;
use kvarn::tables::{SequenceView, StepPlan};

use crate::append::append_head;
use crate::attend::{AttendOptions, attend};
use crate::error::shape;
use crate::pool::{Layer, LayerShape, Pool};
use crate::threads::install;
use crate::{Error, TensorMut, TensorRef};

/// How far one layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Before,
    Appending,
    Appended,
}

/// An open step. Dropped without [`Step::finish`], it is abandoned: the pool is as before.
#[derive(Debug)]
pub struct Step {
    pool: Arc<Pool>,
    plan: Arc<StepPlan>,
    layers: Mutex<Vec<Progress>>,
    /// Whether the step is closed. Readers (append, attend) keep it open while they run.
    closed: RwLock<bool>,
}

impl Step {
    pub(crate) fn new(pool: Arc<Pool>, plan: Arc<StepPlan>) -> Self {
        let layers = Mutex::new(vec![Progress::Before; pool.layers.len()]);
        Self { pool, plan, layers, closed: RwLock::new(false) }
    }

    /// What the step does.
    pub fn plan(&self) -> &StepPlan {
        &self.plan
    }

    /// The pool it belongs to.
    pub const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Stores the step's keys and values of one layer, `[tokens, kv_heads, head_dim]`, and seals the tiles that this
    /// step seals. Once per layer.
    pub fn append(
        &self,
        layer: usize,
        k: &TensorRef<'_>,
        v: &TensorRef<'_>,
        rotated: bool,
    ) -> Result<EncodeCounts, Error> {
        self.while_open(|| {
            let at = self.pool.layer(layer)?;
            self.check_rows("k", k, at)?;
            self.check_rows("v", v, at)?;
            if k.dtype() != v.dtype() {
                let (expected, fix) = (k.dtype().name(), "cast v to the type of k");
                return Err(Error::DType { what: "v", got: v.dtype(), expected, fix });
            }
            self.advance(layer, Progress::Before, Progress::Appending)?;
            let heads = at.shape.kv_heads;
            let counts = install(|| {
                use rayon::prelude::*;
                (0..self.plan.sequences.len() * heads)
                    .into_par_iter()
                    .map(|index| {
                        let sequence = &self.plan.sequences[index / heads];
                        append_head(&self.pool, at, sequence, index % heads, k, v, rotated)
                    })
                    .reduce(EncodeCounts::default, |mut a, b| {
                        a += b;
                        a
                    })
            });
            self.pool.count(counts);
            self.advance(layer, Progress::Appending, Progress::Appended)?;
            Ok(counts)
        })
    }

    /// Attention of `q` `[tokens, heads, head_dim]` over what is stored, to `out` of the same shape; `lse`
    /// `[tokens, heads]` receives the natural logarithm of the softmax denominator.
    ///
    /// Before this layer's append it sees what was stored before the step, afterwards everything; a query sees the keys
    /// up to its own position.
    pub fn attend(
        &self,
        layer: usize,
        q: &TensorRef<'_>,
        options: &AttendOptions<'_>,
        out: &TensorMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        self.while_open(|| {
            let at = self.pool.layer(layer)?;
            attend(&self.pool, at, &self.plan, self.appended(layer)?, q, options, out, lse)
        })
    }

    /// Decodes the sequence at `index` of the batch in one layer to `k` and `v`, `[stored, kv_heads, head_dim]`; what is
    /// stored is what [`Step::attend`] sees, [`Step::stored`] tokens.
    pub fn expand(
        &self,
        layer: usize,
        index: usize,
        rotated: bool,
        k: &TensorMut<'_>,
        v: &TensorMut<'_>,
    ) -> Result<(), Error> {
        self.while_open(|| {
            let at = self.pool.layer(layer)?;
            self.pool.expand_view(at, self.view(layer, index)?, rotated, k, v)
        })
    }

    /// Tokens stored of the sequence at `index` of the batch in one layer: with the step's own once they are appended.
    pub fn stored(&self, layer: usize, index: usize) -> Result<usize, Error> {
        self.while_open(|| {
            self.pool.layer(layer)?;
            Ok(self.view(layer, index)?.length)
        })
    }

    /// Makes the step the state of its sequences. Every layer must have been appended to.
    pub fn finish(&self) -> Result<(), Error> {
        let mut closed = self.closed.write().unwrap_or_else(PoisonError::into_inner);
        if *closed {
            return Err(closed_error());
        }
        let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layer) = layers.iter().position(|&progress| progress != Progress::Appended) {
            return Err(Error::Order(format!(
                "layer {layer} has not been appended to: expected every layer before finish; append it, or abandon the step"
            )));
        }
        self.pool.tables().finish(self.plan.id)?;
        *closed = true;
        Ok(())
    }

    /// Takes the step back: the pool is as before. Does nothing to a closed step.
    pub fn abandon(&self) {
        let mut closed = self.closed.write().unwrap_or_else(PoisonError::into_inner);
        if !*closed {
            *closed = true;
            // The tables know this step as open: nothing else closes it.
            let abandoned = self.pool.tables().abandon(self.plan.id);
            debug_assert!(abandoned.is_ok());
        }
    }

    /// Whether an existing layer was appended to.
    fn appended(&self, layer: usize) -> Result<bool, Error> {
        match self.layers.lock().unwrap_or_else(PoisonError::into_inner)[layer] {
            Progress::Before => Ok(false),
            Progress::Appended => Ok(true),
            Progress::Appending => Err(Error::Order(format!(
                "layer {layer} is being appended to: expected a read before or after it; wait for the other thread"
            ))),
        }
    }

    /// What is stored of one sequence of the batch in an existing layer.
    fn view(&self, layer: usize, index: usize) -> Result<&SequenceView, Error> {
        let sequences = &self.plan.sequences;
        let sequence = sequences.get(index).ok_or_else(|| Error::Value {
            what: "index",
            got: index.to_string(),
            expected: format!("0 to {}", sequences.len() - 1),
            fix: "pass the place of the sequence in the batch",
        })?;
        Ok(if self.appended(layer)? { &sequence.after } else { &sequence.before })
    }

    fn while_open<R>(&self, work: impl FnOnce() -> Result<R, Error>) -> Result<R, Error> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        if *closed { Err(closed_error()) } else { work() }
    }

    fn advance(&self, layer: usize, from: Progress, to: Progress) -> Result<(), Error> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if layers[layer] != from {
            return Err(Error::Order(format!(
                "layer {layer} was appended to in this step: expected one append a layer; plan a new step"
            )));
        }
        layers[layer] = to;
        Ok(())
    }

    fn check_rows(&self, what: &'static str, tensor: &TensorRef<'_>, layer: &Layer) -> Result<(), Error> {
        let LayerShape { kv_heads, head_dim } = layer.shape;
        let tokens = self.plan.tokens;
        if tensor.shape() != [tokens, kv_heads, head_dim] {
            let expected = format!("[{tokens}, {kv_heads}, {head_dim}] (sum of counts, kv_heads, head_dim)");
            return Err(shape(what, &tensor.shape(), expected, "pass the rows of all sequences of the step"));
        }
        if tensor.dtype().slot_type() != self.pool.slot_type {
            let (expected, fix) = match self.pool.slot_type {
                kvarn::codec::SlotType::Float16 => {
                    ("float16 or bfloat16", "make the pool with dtype=\"float32\"")
                }
                kvarn::codec::SlotType::Float32 => ("float32", "make the pool with dtype=\"float16\""),
            };
            return Err(Error::DType { what, got: tensor.dtype(), expected, fix });
        }
        Ok(())
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.abandon();
    }
}

fn closed_error() -> Error {
    Error::Order("the step is closed: expected an open step; plan a new one with Pool::step".into())
}
