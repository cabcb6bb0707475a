//! Which ids of one kind published tiles hold, and which of these nobody else does.

use std::collections::BTreeMap;

/// The published ids, each with a rank that is its own. An id is idle while the publication has its only reference; the
/// idle id with the lowest rank is given up first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Published {
    ranks: BTreeMap<usize, u64>,
    idle: BTreeMap<u64, usize>,
}

impl Published {
    pub(super) fn len(&self) -> usize {
        self.ranks.len()
    }

    pub(super) fn idle(&self) -> usize {
        self.idle.len()
    }

    pub(super) fn first_idle(&self) -> Option<usize> {
        self.idle.first_key_value().map(|(_, &id)| id)
    }

    /// Adds an id that is in use, or moves one that is published.
    pub(super) fn rank(&mut self, id: usize, rank: u64) {
        let before = self.ranks.insert(id, rank);
        if before.is_some_and(|before| self.idle.remove(&before).is_some()) {
            self.idle.insert(rank, id);
        }
    }

    pub(super) fn remove(&mut self, id: usize) {
        let rank = self.ranks.remove(&id).expect("only what is published is given up");
        self.idle.remove(&rank);
    }

    /// The id, published or not, has one reference left.
    pub(super) fn left(&mut self, id: usize) {
        if let Some(&rank) = self.ranks.get(&id) {
            self.idle.insert(rank, id);
        }
    }

    /// The id, published or not, has a second reference.
    pub(super) fn taken(&mut self, id: usize) {
        if let Some(rank) = self.ranks.get(&id) {
            self.idle.remove(rank);
        }
    }
}
