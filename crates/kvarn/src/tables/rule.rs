//! When a tile is sealed, and what a sequence of a given length needs: pure functions.

use super::TableError;

/// Longest sequence, and most rows of a step: lengths and row offsets are exported as int32.
pub const MAX_TOKENS: usize = i32::MAX as usize;

/// Tile size, sinks and recent window of a pool: when tiles are sealed and which keep a slot.
///
/// - Tile `i` is sealed once `committed ≥ (i + 1)·group + recent_tokens`.
/// - `sink_tokens = group`: tile 0 is never sealed; it has no page and stays in its slot.
/// - `0 < sink_tokens < group`: tile 0 is sealed like others and also keeps its slot. Positions
///   below `sink_tokens` are read from the slot, the rest of the tile from the page.
/// - `sink_tokens = 0`: tile 0 is like any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealRule {
    group: usize,
    sink_tokens: usize,
    recent_tokens: usize,
}

impl SealRule {
    /// Tokens per tile, tokens read from the sink slot for good (0 … `group`), and committed tokens
    /// that stay in 16 bit (0 … `4·group`). Which of these values a codec supports is for its
    /// configuration to say.
    pub fn new(group: usize, sink_tokens: usize, recent_tokens: usize) -> Result<Self, TableError> {
        if !(1..=MAX_TOKENS).contains(&group) {
            return Err(TableError::Group { group });
        }
        if sink_tokens > group {
            return Err(TableError::SinkTokens { sink_tokens, group });
        }
        let most = group.saturating_mul(4);
        if recent_tokens > most {
            return Err(TableError::RecentTokens { recent_tokens, most });
        }
        Ok(Self { group, sink_tokens, recent_tokens })
    }

    /// Tokens per tile.
    pub fn group(&self) -> usize {
        self.group
    }

    /// First positions of a sequence, read from its sink slot for good.
    pub fn sink_tokens(&self) -> usize {
        self.sink_tokens
    }

    /// Newest committed tokens that are not sealed.
    pub fn recent_tokens(&self) -> usize {
        self.recent_tokens
    }

    /// Tiles that `tokens` tokens occupy, the last one perhaps in part.
    pub fn tiles(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.group)
    }

    /// Whether the tile gets a page when it is sealed: all but a tile that is a sink as a whole.
    pub fn has_page(&self, tile: usize) -> bool {
        tile > 0 || self.sink_tokens < self.group
    }

    /// Whether the tile keeps its slot for good, as the sink slot.
    pub fn keeps_slot(&self, tile: usize) -> bool {
        tile == 0 && self.sink_tokens > 0
    }

    /// One past the last tile that has a page once `committed` tokens are committed; 0 if none has.
    ///
    /// A tile stays sealed when tokens are taken away again: this is the count that committing
    /// brings about.
    pub fn sealed_tiles(&self, committed: usize) -> usize {
        let due = committed.saturating_sub(self.recent_tokens) / self.group;
        if due == 1 && !self.has_page(0) { 0 } else { due }
    }

    /// Pages of the sealed tiles `[0, sealed)`.
    pub fn pages(&self, sealed: usize) -> usize {
        if self.has_page(0) { sealed } else { sealed.saturating_sub(1) }
    }

    /// Most slots that one sequence ever holds, during a step too, where no step holds back more
    /// than `hold` tokens:
    /// `[sink_tokens > 0] + 2·ceil((recent_tokens + group + hold - 1) / group)`.
    ///
    /// At most `recent_tokens + group - 1` committed tokens are unsealed, plus those held back; the
    /// factor 2 stands for a step, in which the slots of tiles being sealed and those of the new
    /// tail exist together.
    pub fn slot_bound(&self, hold: usize) -> usize {
        let tail = self.recent_tokens.saturating_add(self.group - 1).saturating_add(hold);
        tail.div_ceil(self.group).saturating_mul(2).saturating_add(usize::from(self.sink_tokens > 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(group: usize, sink_tokens: usize, recent_tokens: usize) -> SealRule {
        SealRule::new(group, sink_tokens, recent_tokens).unwrap()
    }

    #[test]
    fn a_tile_is_sealed_at_its_end_plus_the_recent_window() {
        for (recent, moments) in [(0, [128, 256]), (100, [228, 356]), (512, [640, 768])] {
            let rule = rule(128, 0, recent);
            for (tile, at) in moments.into_iter().enumerate() {
                assert_eq!(rule.sealed_tiles(at - 1), tile, "recent {recent}, tile {tile}");
                assert_eq!(rule.sealed_tiles(at), tile + 1, "recent {recent}, tile {tile}");
            }
        }
    }

    #[test]
    fn a_whole_sink_tile_never_gets_a_page() {
        let rule = rule(64, 64, 0);
        assert!(!rule.has_page(0) && rule.has_page(1));
        assert!(rule.keeps_slot(0) && !rule.keeps_slot(1));
        assert_eq!([127, 128, 192].map(|committed| rule.sealed_tiles(committed)), [0, 2, 3]);
        assert_eq!([0, 2, 3].map(|sealed| rule.pages(sealed)), [0, 1, 2]);
    }

    #[test]
    fn a_partial_sink_tile_has_a_page_and_keeps_its_slot() {
        let rule = rule(64, 16, 0);
        assert!(rule.has_page(0) && rule.keeps_slot(0));
        assert_eq!([63, 64, 128].map(|committed| rule.sealed_tiles(committed)), [0, 1, 2]);
        assert_eq!(rule.pages(2), 2);
    }

    #[test]
    fn slot_bound_follows_the_formula_and_does_not_overflow() {
        assert_eq!(rule(128, 128, 0).slot_bound(0), 3);
        assert_eq!(rule(128, 0, 0).slot_bound(0), 2);
        assert_eq!(rule(128, 0, 0).slot_bound(1), 2);
        assert_eq!(rule(128, 0, 0).slot_bound(2), 4);
        assert_eq!(rule(128, 16, 512).slot_bound(5), 1 + 2 * 6);
        assert!(rule(128, 16, 512).slot_bound(usize::MAX) > MAX_TOKENS / 128);
        assert_eq!(rule(1, 1, 0).slot_bound(usize::MAX), usize::MAX);
    }

    #[test]
    fn hostile_values_are_refused() {
        let text = |group, sink, recent| SealRule::new(group, sink, recent).unwrap_err().to_string();
        assert_eq!(text(0, 0, 0), "group 0: expected 1 to 2147483647 tokens per tile; 64 and 128 are usual");
        assert!(SealRule::new(usize::MAX, 0, 0).is_err());
        assert_eq!(
            text(64, 65, 0),
            "sink_tokens 65: expected 0 to 64 (the group); use fewer sinks or a larger group"
        );
        assert_eq!(
            text(64, 64, 257),
            "recent_tokens 257: expected 0 to 256 (four groups); use a shorter recent window or a larger group"
        );
        assert_eq!(rule(64, 64, 256).recent_tokens(), 256);
    }
}
