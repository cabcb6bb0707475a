//! How far a sequence is: with the rule of sealing this says which of its tiles are records and which are in slots.

use super::rule::MAX_TOKENS;
use super::{SealRule, SequenceView};

/// Lengths of a sequence, whatever pages and slots hold it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lengths {
    /// Tokens stored, held ones included.
    pub length: usize,
    /// Tokens committed.
    pub committed: usize,
    /// One past the last tile that has a page; 0 if none has.
    pub sealed: usize,
}

impl Lengths {
    /// Whether a sequence can be so: sealed tiles are whole and committed, and what is due is sealed.
    pub fn are_possible(&self, rule: &SealRule) -> bool {
        let sealed_tokens = self.sealed.checked_mul(rule.group());
        self.length <= MAX_TOKENS
            && self.committed <= self.length
            && sealed_tokens.is_some_and(|tokens| tokens <= self.committed)
            && self.sealed >= rule.sealed_tiles(self.committed)
    }

    /// Whether the tile has a page.
    pub fn has_page(&self, rule: &SealRule, tile: usize) -> bool {
        tile < self.sealed && rule.has_page(tile)
    }

    /// Whether the tile has a slot.
    pub fn has_slot(&self, rule: &SealRule, tile: usize) -> bool {
        tile >= self.sealed || rule.keeps_slot(tile)
    }

    /// Tiles with a page.
    pub fn pages(&self, rule: &SealRule) -> usize {
        rule.pages(self.sealed)
    }

    /// Tiles with a slot.
    pub fn slots(&self, rule: &SealRule) -> usize {
        rule.tiles(self.length) - self.sealed + usize::from(self.sealed > 0 && rule.keeps_slot(0))
    }
}

impl From<&SequenceView> for Lengths {
    fn from(view: &SequenceView) -> Self {
        Self { length: view.length, committed: view.committed, sealed: view.sealed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_those_of_the_tiles() {
        for (sink_tokens, recent_tokens) in [(0, 0), (3, 0), (8, 0), (8, 9), (3, 32)] {
            let rule = SealRule::new(8, sink_tokens, recent_tokens).unwrap();
            for committed in 0..80 {
                for held in 0..12 {
                    let length = committed + held;
                    let lengths = Lengths { length, committed, sealed: rule.sealed_tiles(committed) };
                    assert!(lengths.are_possible(&rule));
                    let tiles = 0..rule.tiles(length);
                    let pages = tiles.clone().filter(|&tile| lengths.has_page(&rule, tile)).count();
                    let slots = tiles.filter(|&tile| lengths.has_slot(&rule, tile)).count();
                    assert_eq!((lengths.pages(&rule), lengths.slots(&rule)), (pages, slots), "{lengths:?}");
                }
            }
        }
    }

    #[test]
    fn what_no_sequence_can_be_is_recognised() {
        let rule = SealRule::new(8, 0, 4).unwrap();
        let possible = |length, committed, sealed| Lengths { length, committed, sealed }.are_possible(&rule);
        assert!(possible(20, 20, 2) && possible(16, 16, 2) && possible(16, 11, 0) && possible(0, 0, 0));
        for (length, committed, sealed) in [
            (20, 21, 2),
            (20, 20, 1),
            (20, 15, 2),
            (20, 20, 3),
            (MAX_TOKENS + 1, 0, 0),
            (20, 20, usize::MAX),
            (usize::MAX, usize::MAX, usize::MAX),
        ] {
            assert!(!possible(length, committed, sealed), "{length} {committed} {sealed}");
        }
    }
}
