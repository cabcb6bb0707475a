//! One sequence as a list of tokens, with the rules of sealing written out tile by tile.

use crate::tables::{SealRule, SequenceId};

#[derive(Debug, Clone)]
pub(super) struct Token {
    pub(super) value: u64,
    pub(super) sealed: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Model {
    pub(super) id: SequenceId,
    pub(super) tokens: Vec<Token>,
    pub(super) committed: usize,
    pub(super) largest_hold: usize,
    /// Whether it is in an open step.
    pub(super) open: bool,
}

impl Model {
    pub(super) fn values(&self) -> Vec<u64> {
        self.tokens.iter().map(|token| token.value).collect()
    }

    /// Seals what is due, tile by tile.
    pub(super) fn seal(&mut self, rule: &SealRule) {
        let group = rule.group();
        for (tile, tokens) in self.tokens.chunks_mut(group).enumerate() {
            let due = self.committed >= (tile + 1) * group + rule.recent_tokens();
            if due && !(tile == 0 && rule.sink_tokens() == group) {
                for token in tokens {
                    token.sealed = true;
                }
            }
        }
    }
}

/// Pages and slots that a step of one sequence takes, tile by tile.
///
/// `shares_its_tail`: other sequences have the slot of its last tile too.
pub(super) fn needs(
    rule: &SealRule,
    model: &Model,
    count: usize,
    hold: usize,
    shares_its_tail: bool,
) -> (usize, usize) {
    let group = rule.group();
    let (start, end) = (model.tokens.len(), model.tokens.len() + count);
    let (mut pages, mut slots) = (0, 0);
    for tile in 0..end.div_ceil(group) {
        let was_sealed = model.tokens.get(tile * group).is_some_and(|token| token.sealed);
        let due = end - hold >= (tile + 1) * group + rule.recent_tokens();
        let whole_sink = tile == 0 && rule.sink_tokens() == group;
        let seals = due && !was_sealed && !whole_sink;
        let new = start <= tile * group;
        let sink = tile == 0 && rule.sink_tokens() > 0;
        pages += usize::from(seals);
        let grows = start > tile * group && start < end.min((tile + 1) * group);
        let copied = grows && shares_its_tail;
        slots += usize::from((new || copied) && (!seals || sink));
    }
    (pages, slots)
}
