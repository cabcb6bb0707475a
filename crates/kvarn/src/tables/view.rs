//! What is stored of a sequence at one moment, and where each token is read.

use std::ops::Range;
use std::sync::Arc;

use super::SealRule;

/// An immutable snapshot of one sequence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SequenceView {
    /// Tokens stored, held ones included.
    pub length: usize,
    /// Tokens committed; the newest `length - committed` are held and not sealed yet.
    pub committed: usize,
    /// One past the last tile that has a page; 0 if none has. Tiles from here on are in slots, and
    /// may be rewritten.
    pub sealed: usize,
    /// Page of each tile, -1 where it has none: int32 `[tiles]`.
    pub block_table: Arc<Vec<i32>>,
    /// Slot of each tile, -1 where it has none: int32 `[tiles]`.
    pub slot_table: Arc<Vec<i32>>,
}

/// Where stored tokens lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In 16 bit, in the slot with this id.
    Slot(usize),
    /// Encoded, in the page with this id.
    Page(usize),
}

/// Consecutive tokens of one tile that are read from one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Position of the first token in the sequence.
    pub position: usize,
    /// Index of the first token in its slot or page.
    pub offset: usize,
    /// Tokens.
    pub count: usize,
    /// Slot or page.
    pub place: Place,
}

impl Span {
    /// The part of it whose positions are among `tokens`, if any.
    pub fn within(&self, tokens: &Range<usize>) -> Option<Self> {
        let position = self.position.max(tokens.start);
        let end = (self.position + self.count).min(tokens.end);
        let offset = self.offset + position - self.position;
        (position < end).then(|| Self { position, offset, count: end - position, place: self.place })
    }
}

impl SequenceView {
    /// Every stored token, by ascending position, each in exactly one span.
    ///
    /// A sealed tile 0 that holds some sinks gives two spans: the sinks from its slot, the rest
    /// from its page.
    pub fn spans(&self, rule: &SealRule) -> impl Iterator<Item = Span> + '_ {
        let rule = *rule;
        (0..self.block_table.len()).flat_map(move |tile| self.tile_spans(rule, tile).into_iter().flatten())
    }

    fn tile_spans(&self, rule: SealRule, tile: usize) -> [Option<Span>; 2] {
        let first = tile * rule.group();
        let stored = rule.group().min(self.length - first);
        let in_slot = if tile >= self.sealed {
            stored
        } else if rule.keeps_slot(tile) {
            rule.sink_tokens()
        } else {
            0
        };
        let span = |offset: usize, count: usize, place: Place| {
            (count > 0).then_some(Span { position: first + offset, offset, count, place })
        };
        [
            span(0, in_slot, Place::Slot(self.slot_table[tile] as usize)),
            span(in_slot, stored - in_slot, Place::Page(self.block_table[tile] as usize)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(sink_tokens: usize, length: usize, sealed: usize, blocks: &[i32], slots: &[i32]) -> Vec<Span> {
        let rule = SealRule::new(8, sink_tokens, 0).unwrap();
        let view = SequenceView {
            length,
            committed: length,
            sealed,
            block_table: Arc::new(blocks.to_vec()),
            slot_table: Arc::new(slots.to_vec()),
        };
        view.spans(&rule).collect()
    }

    fn span(position: usize, offset: usize, count: usize, place: Place) -> Span {
        Span { position, offset, count, place }
    }

    #[test]
    fn no_token_no_span() {
        assert_eq!(spans(8, 0, 0, &[], &[]), []);
    }

    #[test]
    fn without_sinks_sealed_tiles_come_from_pages() {
        assert_eq!(
            spans(0, 13, 1, &[4, -1], &[-1, 2]),
            [span(0, 0, 8, Place::Page(4)), span(8, 0, 5, Place::Slot(2))]
        );
    }

    #[test]
    fn a_partial_sink_tile_is_read_from_its_slot_until_it_is_sealed_then_from_both() {
        assert_eq!(spans(3, 7, 0, &[-1], &[6]), [span(0, 0, 7, Place::Slot(6))]);
        assert_eq!(
            spans(3, 8, 1, &[4], &[6]),
            [span(0, 0, 3, Place::Slot(6)), span(3, 3, 5, Place::Page(4))]
        );
    }

    #[test]
    fn a_part_of_a_span_keeps_its_place() {
        let whole = span(10, 2, 6, Place::Page(4));
        assert_eq!(whole.within(&(0..100)), Some(whole));
        assert_eq!(whole.within(&(12..13)), Some(span(12, 4, 1, Place::Page(4))));
        assert_eq!(whole.within(&(0..11)), Some(span(10, 2, 1, Place::Page(4))));
        assert_eq!(whole.within(&(15..99)), Some(span(15, 7, 1, Place::Page(4))));
        assert_eq!([whole.within(&(0..10)), whole.within(&(16..20)), whole.within(&(12..12))], [None; 3]);
    }

    #[test]
    fn a_whole_sink_tile_stays_in_its_slot() {
        assert_eq!(
            spans(8, 16, 2, &[-1, 4], &[6, -1]),
            [span(0, 0, 8, Place::Slot(6)), span(8, 0, 8, Place::Page(4))]
        );
    }
}
