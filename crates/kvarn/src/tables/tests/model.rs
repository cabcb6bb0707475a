//! One sequence as a list of tokens, with the rules of sealing written out tile by tile.

use super::world::LOSSY;
use crate::tables::{SealRule, SequenceId};

#[derive(Debug, Clone)]
pub(super) struct Token {
    pub(super) value: u64,
    pub(super) sealed: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Model {
    pub(super) id: SequenceId,
    /// First positions, which are read from their slot whether they are sealed or not.
    pub(super) sinks: usize,
    pub(super) tokens: Vec<Token>,
    pub(super) committed: usize,
    pub(super) largest_hold: usize,
    /// Whether it is in an open step.
    pub(super) open: bool,
}

impl Model {
    /// What is read of each token.
    pub(super) fn values(&self) -> Vec<u64> {
        let read = |(position, token): (usize, &Token)| {
            if token.sealed && position >= self.sinks { token.value | LOSSY } else { token.value }
        };
        self.tokens.iter().enumerate().map(read).collect()
    }

    /// Appends tokens, the newest `hold` of which are not committed.
    pub(super) fn extend(&mut self, values: &[u64], hold: usize, rule: &SealRule) {
        self.tokens.extend(values.iter().map(|&value| Token { value, sealed: false }));
        self.committed = self.tokens.len() - hold;
        self.seal(rule);
    }

    /// The tile of which a cut keeps a part that is stored in a record only.
    pub(super) fn unsealed_by(&self, keep: usize, rule: &SealRule) -> Option<usize> {
        let tile = keep / rule.group();
        let raw = tile == 0 && self.sinks > 0;
        let sealed = self.tokens.get(keep).is_some_and(|token| token.sealed);
        (!keep.is_multiple_of(rule.group()) && sealed && !raw).then_some(tile)
    }

    /// Keeps the first `keep` tokens: those of a tile that is cut are no longer sealed, and are what its record says, but in
    /// the first tile, if there are sinks, what was appended.
    pub(super) fn truncate(&mut self, keep: usize, rule: &SealRule) {
        let lossy = self.unsealed_by(keep, rule).is_some();
        self.tokens.truncate(keep);
        self.committed = self.committed.min(keep);
        for token in &mut self.tokens[keep / rule.group() * rule.group()..] {
            if token.sealed && lossy {
                token.value |= LOSSY;
            }
            token.sealed = false;
        }
    }

    /// Seals what is due, tile by tile.
    fn seal(&mut self, rule: &SealRule) {
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
