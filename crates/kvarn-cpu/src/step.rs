//! A step: one forward pass of a batch over every layer of a pool.

use std::ops::Range;
use std::sync::Arc;

use kvarn::codec::EncodeCounts;
use kvarn::pool::{AttendOptions, OpenStep, check_attend, check_rows};
use rayon::prelude::*;

use crate::append::NewTokens;
use crate::attend::attend;
use crate::pool::Pool;
use crate::threads::{install, share};
use crate::{Error, TensorMut, TensorRef};

/// Rows of K and V, of all heads, that one thread stores without help.
const FEW_ROWS: usize = 256;

/// An open step. Dropped without a finish, it is abandoned: the pool is as before.
#[derive(Debug)]
pub struct Step {
    pool: Arc<Pool>,
    open: OpenStep,
}

impl Step {
    pub(crate) const fn new(pool: Arc<Pool>, open: OpenStep) -> Self {
        Self { pool, open }
    }

    /// Plan, progress, finish and abandon.
    pub const fn open(&self) -> &OpenStep {
        &self.open
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
        let plan = self.open.plan();
        let slot_type = self.pool.layout().slot_type;
        self.open.append(
            layer,
            |at| Ok(check_rows(at, slot_type, plan.tokens, k.description(), v.description())?),
            |at| {
                let heads = at.shape.kv_heads;
                let tokens = NewTokens { pool: &self.pool, layer: at, k, v, rotated };
                let sequences = &plan.sequences;
                let seals = sequences.iter().any(|sequence| !sequence.seals.is_empty());
                let counts = if seals {
                    let sum = |mut a: EncodeCounts, b| {
                        a += b;
                        a
                    };
                    let counts = |index: usize| tokens.append_head(&sequences[index / heads], index % heads);
                    let indices = 0..sequences.len() * heads;
                    install(|| indices.into_par_iter().map(counts).reduce(EncodeCounts::default, sum))
                } else {
                    let part = |part: Range<usize>| tokens.append_sequences(&sequences[part]);
                    // A row takes less time than handing it to another thread.
                    let few = plan.tokens * heads <= FEW_ROWS;
                    if few { part(0..sequences.len()) } else { share(sequences.len(), part) }
                };
                self.pool.core().count(counts);
                Ok(counts)
            },
        )
    }

    /// Attention of `q` `[tokens, heads, head_dim]` over what is stored, to `out` of the same shape; `sink_logits`
    /// `[heads]` take part in the softmax and have no value; `lse` `[tokens, heads]` receives the natural logarithm of
    /// the softmax denominator.
    ///
    /// Before this layer's append it sees what was stored before the step, afterwards everything; a query sees the keys
    /// up to its own position.
    pub fn attend(
        &self,
        layer: usize,
        q: &TensorRef<'_>,
        options: &AttendOptions,
        sink_logits: Option<&[f32]>,
        out: &TensorMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        let plan = self.open.plan();
        self.open.read(layer, |at, appended| {
            let lengths = (lse.as_ref().map(|lse| lse.len()), sink_logits.map(<[f32]>::len));
            let settings =
                check_attend(at, plan.tokens, q.shape(), out.shape(), lengths.0, lengths.1, options)?;
            attend(&self.pool, at, plan, appended, q, &settings, sink_logits, out, lse);
            Ok(())
        })
    }

    /// Decodes the tokens from `first` on, of the sequence at `index` of the batch in one layer, to `k` and `v`,
    /// `[count, kv_heads, head_dim]`; what is stored is what [`Step::attend`] sees, [`OpenStep::stored`] tokens.
    pub fn expand(
        &self,
        layer: usize,
        index: usize,
        first: usize,
        rotated: bool,
        k: &TensorMut<'_>,
        v: &TensorMut<'_>,
    ) -> Result<(), Error> {
        self.open.read(layer, |at, appended| {
            self.pool.expand_view(at, self.open.view(index, appended)?, first, rotated, k, v)
        })
    }
}
