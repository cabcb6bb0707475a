//! When a tile is sealed and which tile keeps a slot, written down a second time, from the specification.

use crate::setup::Setup;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    pub(crate) group: usize,
    pub(crate) sinks: usize,
    pub(crate) recent: usize,
}

impl Rule {
    pub(crate) fn of(setup: &Setup) -> Self {
        let config = setup.config();
        Self { group: config.group(), sinks: setup.sink_tokens, recent: setup.recent_tokens }
    }

    /// Tile `i` is sealed once committed tokens ≥ (i+1)·G + R; a tile that is a sink as a whole never is.
    pub(crate) fn is_due(self, tile: usize, committed: usize) -> bool {
        let whole_sink = tile == 0 && self.sinks == self.group;
        !whole_sink && committed >= (tile + 1) * self.group + self.recent
    }

    pub(crate) fn keeps_slot(self, tile: usize) -> bool {
        tile == 0 && self.sinks > 0
    }

    /// Most slots of one sequence: `[S > 0] + 2·ceil((R + G + hold - 1) / G)`.
    pub(crate) fn slot_bound(self, hold: usize) -> usize {
        usize::from(self.sinks > 0) + 2 * (self.recent + self.group + hold - 1).div_ceil(self.group)
    }
}
