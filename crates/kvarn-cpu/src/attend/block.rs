//! A block of queries that share a KV head, and what becomes of their partial results.

use std::ops::Range;

use kvarn::Aligned;
use kvarn::pool::AttendSettings;
use kvarn::tables::SequencePlan;

use super::Source;
use super::partial::Partial;
use super::softmax::LOG2_E;
use crate::TensorRef;

/// Rotated, scaled queries: `columns = tokens × group`, token by token.
pub(super) struct QueryBlock {
    /// `[columns, head_dim]`. Without softcap the logits come out in base 2.
    pub q: Aligned<f32>,
    pub softcap: Option<f32>,
    /// Row of the step's q of the first token.
    first_row: usize,
    /// Position of the first token.
    first_position: usize,
    tokens: usize,
    /// Query heads per KV head, and the first of them.
    group: usize,
    first_head: usize,
    window: usize,
}

/// Attention output and log-sum-exp of a block.
pub(super) struct BlockResult {
    /// `[columns, head_dim]`.
    pub out: Aligned<f32>,
    /// `[columns]`, natural logarithm.
    pub lse: Vec<f32>,
}

impl QueryBlock {
    pub(super) fn load(
        source: &Source<'_>,
        sequence: &SequencePlan,
        tokens: Range<usize>,
        q: &TensorRef<'_>,
        options: &AttendSettings,
    ) -> Self {
        let group = options.group;
        let head_dim = source.layer.shape.head_dim;
        let mut block = Self {
            q: Aligned::zeros(tokens.len() * group * head_dim),
            softcap: options.softcap,
            first_row: sequence.first_row + tokens.start,
            first_position: sequence.start() + tokens.start,
            tokens: tokens.len(),
            group,
            first_head: source.head * group,
            window: options.window,
        };
        let factor = if options.softcap.is_some() { options.scale } else { options.scale * LOG2_E };
        let mut values = std::mem::take(&mut block.q);
        for ((row, head), values) in block.targets().zip(values.chunks_exact_mut(head_dim)) {
            q.load_row(row, head, values);
            if !options.rotated {
                source.layer.rotation.apply(values);
            }
            for value in values {
                *value *= factor;
            }
        }
        block.q = values;
        block
    }

    /// Columns of the block.
    pub(super) fn columns(&self) -> usize {
        self.tokens * self.group
    }

    /// `(row, query head)` of each column.
    pub(super) fn targets(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (first_row, first_head, group) = (self.first_row, self.first_head, self.group);
        (0..self.columns()).map(move |column| (first_row + column / group, first_head + column % group))
    }

    /// Positions that the query of `column` may see.
    pub(super) fn visible_to(&self, column: usize) -> Range<usize> {
        let position = self.first_position + column / self.group;
        (position + 1).saturating_sub(self.window)..position + 1
    }

    /// Positions that some query of the block may see.
    pub(super) fn visible(&self) -> Range<usize> {
        self.visible_to(0).start..self.visible_to(self.columns() - 1).end
    }

    /// Adds the attention-sink logits, divides, rotates back.
    pub(super) fn finish(
        &self,
        partial: Option<Partial>,
        source: &Source<'_>,
        options: &AttendSettings,
        sink_logits: Option<&[f32]>,
    ) -> BlockResult {
        let head_dim = source.layer.shape.head_dim;
        let mut partial = partial.unwrap_or_else(|| Partial::empty(self.columns(), head_dim));
        if let Some(logits) = sink_logits {
            for (column, (_, head)) in self.targets().enumerate() {
                partial.add_logit(column, logits[head] * LOG2_E);
            }
        }
        let lse = partial.log_sum_exp();
        let mut out = partial.into_output();
        if !options.rotated {
            for row in out.chunks_exact_mut(head_dim) {
                source.layer.rotation.apply(row);
            }
        }
        BlockResult { out, lse }
    }
}
