//! An open step: which layers were appended to, and whether it is closed.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{Layer, PoolCore, PoolError};
use crate::tables::{SequenceView, StepPlan};

/// How far one layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Before,
    Appending,
    /// The append was recorded into a graph, which has not run.
    Recorded,
    Appended,
}

/// One forward pass of a batch over every layer of a pool. Dropped without [`OpenStep::finish`], it is abandoned: the pool
/// is as before.
#[derive(Debug)]
pub struct OpenStep {
    core: Arc<PoolCore>,
    plan: Arc<StepPlan>,
    layers: Mutex<Vec<Progress>>,
    /// Whether the step is closed. Readers (append, attend) keep it open while they run.
    closed: RwLock<bool>,
}

impl OpenStep {
    pub(super) fn new(core: Arc<PoolCore>, plan: Arc<StepPlan>) -> Self {
        let layers = Mutex::new(vec![Progress::Before; core.layout().layers.len()]);
        Self { core, plan, layers, closed: RwLock::new(false) }
    }

    /// What the step does.
    pub fn plan(&self) -> &StepPlan {
        &self.plan
    }

    /// The pool it belongs to.
    pub const fn core(&self) -> &Arc<PoolCore> {
        &self.core
    }

    /// Runs `append` on a layer, once per layer: after `check`, which may refuse without consequence.
    pub fn append<R, E: From<PoolError>>(
        &self,
        layer: usize,
        check: impl FnOnce(&Layer) -> Result<(), E>,
        append: impl FnOnce(&Layer) -> Result<R, E>,
    ) -> Result<R, E> {
        self.append_as(Progress::Appended, layer, check, append)
    }

    /// As [`append`](Self::append), where the work is recorded into a graph instead of being done: the step can be read in
    /// the same recording, and finished once it was [`replayed`](Self::replayed).
    pub fn record_append<R, E: From<PoolError>>(
        &self,
        layer: usize,
        check: impl FnOnce(&Layer) -> Result<(), E>,
        append: impl FnOnce(&Layer) -> Result<R, E>,
    ) -> Result<R, E> {
        self.append_as(Progress::Recorded, layer, check, append)
    }

    fn append_as<R, E: From<PoolError>>(
        &self,
        done: Progress,
        layer: usize,
        check: impl FnOnce(&Layer) -> Result<(), E>,
        append: impl FnOnce(&Layer) -> Result<R, E>,
    ) -> Result<R, E> {
        self.while_open(|| {
            let at = self.core.layout().layer(layer)?;
            check(at)?;
            self.advance(layer, Progress::Before, Progress::Appending)?;
            let result = append(at);
            // A layer whose append failed has not been appended to: it may be tried again, or the step abandoned.
            let reached = if result.is_ok() { done } else { Progress::Before };
            self.advance(layer, Progress::Appending, reached)?;
            result
        })
    }

    /// Runs `read` on a layer; it is told whether the layer was appended to.
    pub fn read<R, E: From<PoolError>>(
        &self,
        layer: usize,
        read: impl FnOnce(&Layer, bool) -> Result<R, E>,
    ) -> Result<R, E> {
        self.read_as(Progress::Appended, layer, read)
    }

    /// As [`read`](Self::read), where the work is recorded into a graph: behind an append that was recorded too.
    pub fn record_read<R, E: From<PoolError>>(
        &self,
        layer: usize,
        read: impl FnOnce(&Layer, bool) -> Result<R, E>,
    ) -> Result<R, E> {
        self.read_as(Progress::Recorded, layer, read)
    }

    fn read_as<R, E: From<PoolError>>(
        &self,
        done: Progress,
        layer: usize,
        read: impl FnOnce(&Layer, bool) -> Result<R, E>,
    ) -> Result<R, E> {
        self.while_open(|| {
            let at = self.core.layout().layer(layer)?;
            let appended = match self.layers.lock().unwrap_or_else(PoisonError::into_inner)[layer] {
                Progress::Before => false,
                Progress::Appended => true,
                Progress::Recorded if done == Progress::Recorded => true,
                Progress::Recorded => return Err(recorded_error(layer, "a read").into()),
                Progress::Appending => {
                    return Err(PoolError::Order(format!(
                        "layer {layer} is being appended to: expected a read before or after it; wait for the other thread"
                    ))
                    .into());
                }
            };
            read(at, appended)
        })
    }

    /// What is stored of the sequence at `index` of the batch, before or after a layer's append.
    pub fn view(&self, index: usize, appended: bool) -> Result<&SequenceView, PoolError> {
        let sequences = &self.plan.sequences;
        let sequence = sequences.get(index).ok_or_else(|| PoolError::Value {
            what: "index",
            got: index.to_string(),
            expected: format!("0 to {}", sequences.len() - 1),
            fix: "pass the place of the sequence in the batch",
        })?;
        Ok(if appended { &sequence.after } else { &sequence.before })
    }

    /// Tokens stored of the sequence at `index` of the batch in one layer: with the step's own once they are appended.
    pub fn stored(&self, layer: usize, index: usize) -> Result<usize, PoolError> {
        self.read(layer, |_, appended| Ok(self.view(index, appended)?.length))
    }

    /// Whether a graph that appends to every layer may run: the step is open and no layer was appended to.
    pub fn check_replay(&self) -> Result<(), PoolError> {
        self.while_open(|| {
            let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
            let appended = |progress| matches!(progress, Progress::Appending | Progress::Appended);
            match layers.iter().position(|&progress| appended(progress)) {
                Some(layer) => Err(PoolError::Order(format!(
                    "layer {layer} was appended to in this step: expected none before a replay, which appends to all; plan \
                     a new step"
                ))),
                None => Ok(()),
            }
        })
    }

    /// A graph that appends to every layer was given to the device, after [`check_replay`](Self::check_replay).
    pub fn replayed(&self) {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).fill(Progress::Appended);
    }

    /// Makes the step the state of its sequences. Every layer must have been appended to.
    pub fn finish(&self) -> Result<(), PoolError> {
        let mut closed = self.closed.write().unwrap_or_else(PoisonError::into_inner);
        if *closed {
            return Err(closed_error());
        }
        let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layer) = layers.iter().position(|&progress| progress != Progress::Appended) {
            if layers[layer] == Progress::Recorded {
                return Err(recorded_error(layer, "finish"));
            }
            return Err(PoolError::Order(format!(
                "layer {layer} has not been appended to: expected every layer before finish; append it, or abandon the step"
            )));
        }
        self.core.tables().finish(self.plan.id)?;
        *closed = true;
        Ok(())
    }

    /// Takes the step back: the pool is as before. Does nothing to a closed step.
    pub fn abandon(&self) {
        let mut closed = self.closed.write().unwrap_or_else(PoisonError::into_inner);
        if !*closed {
            *closed = true;
            // The tables know this step as open: nothing else closes it.
            let abandoned = self.core.tables().abandon(self.plan.id);
            debug_assert!(abandoned.is_ok());
        }
    }

    fn while_open<R, E: From<PoolError>>(&self, work: impl FnOnce() -> Result<R, E>) -> Result<R, E> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        if *closed { Err(closed_error().into()) } else { work() }
    }

    fn advance(&self, layer: usize, from: Progress, to: Progress) -> Result<(), PoolError> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if layers[layer] != from {
            return Err(PoolError::Order(format!(
                "layer {layer} was appended to in this step: expected one append a layer; plan a new step"
            )));
        }
        layers[layer] = to;
        Ok(())
    }
}

impl Drop for OpenStep {
    fn drop(&mut self) {
        self.abandon();
    }
}

fn recorded_error(layer: usize, before: &str) -> PoolError {
    PoolError::Order(format!(
        "the append of layer {layer} was recorded into a graph: expected the graph to run before {before}; call \
         step.replay(graph)"
    ))
}

fn closed_error() -> PoolError {
    PoolError::Order("the step is closed: expected an open step; plan a new one with Pool.step".into())
}
