//! Prefix sharing: sealed tiles and full sink slots under keys, for sequences that begin alike.
//!
//! A published tile holds one reference to its page and its sink slot, so both outlive the sequence that made them. While
//! nothing else refers to them they are *cached*: available to whoever needs room, and given up then, the least recently used
//! first.
//!
//! Uses are a publication, a sequence that starts from the tile, and the end of one that holds it. Each use counts for the
//! whole way from the first tile on, later tiles as used a little earlier. A tile can only be found through those before it,
//! so they must be the last to go: by this order they are, though pages are compared one by one and no tree is searched.
//! Where a tile is given up nevertheless while later ones are in use (they belong to a sequence that has other pages for
//! the beginning), these are published no longer; the sequences that hold them keep them.

mod tree;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use tree::PrefixKey;
use tree::{ROOT, Tile, Tree};

use super::{SealRule, SequenceId, SequenceView, TableError, Tables};

/// What became of published tiles, and of requests for them, since the tables were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixCounts {
    /// Tiles that new sequences started with.
    pub hits: u64,
    /// Tiles that new sequences asked for, and which were not published.
    pub misses: u64,
    /// Tiles offered under a key that another page has: the first one stays.
    pub duplicates: u64,
    /// Tiles that are published no longer, as room was needed.
    pub evictions: u64,
}

/// The published tiles of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Prefixes {
    tree: Tree,
    /// Rises by one for each tile that is used.
    clock: u64,
    counts: PrefixCounts,
}

impl Prefixes {
    pub(super) fn counts(&self) -> PrefixCounts {
        self.counts
    }

    /// The ranks of a way of `tiles` tiles that is used now, from the first on: falling, and above all before.
    fn ranks(&mut self, tiles: usize) -> impl Iterator<Item = u64> + use<> {
        let before = self.clock;
        self.clock += tiles as u64;
        (before + 1..=self.clock).rev()
    }
}

impl SequenceView {
    /// First tiles that never change again, and can be published: sealed ones, and tile 0 where it is a sink as a whole, once
    /// all its tokens are committed.
    pub fn publishable(&self, rule: &SealRule) -> usize {
        let full_sink = !rule.has_page(0) && self.committed >= rule.group();
        self.sealed.max(usize::from(full_sink))
    }
}

impl Tables {
    /// Publishes the first `keys.len()` tiles of a sequence, `keys[i]` standing for tile `i` behind those before it, and
    /// returns how many were not published before. What the sequence reads stays the same.
    ///
    /// At most as many as are [`publishable`](SequenceView::publishable), tile 0 with its sink slot. A key that another page
    /// has keeps it, as it may be in use; the sequence's own is counted as a duplicate, and later tiles go behind the one
    /// published first. A page is published under one key.
    pub fn publish(&mut self, id: SequenceId, keys: &[PrefixKey]) -> Result<usize, TableError> {
        let view = self.idle(id)?.view.clone();
        self.check_publication(id, &view, keys)?;
        let (mut parent, mut published) = (ROOT, 0);
        let ranks = self.prefixes.ranks(keys.len());
        for ((index, &key), rank) in keys.iter().enumerate().zip(ranks) {
            let tile = Tile::of(&view, index);
            parent = if let Some(node) = self.prefixes.tree.child(parent, key) {
                let first = self.prefixes.tree.tile(node);
                self.prefixes.counts.duplicates += u64::from(first != tile);
                self.rank(first, rank);
                node
            } else {
                published += 1;
                if let Some(page) = tile.page {
                    self.pages.publish(page, rank);
                }
                if let Some(slot) = tile.slot {
                    self.slots.publish(slot, rank);
                }
                self.prefixes.tree.insert(parent, key, tile)
            };
        }
        Ok(published)
    }

    /// How many tiles a sequence would start with that is created from `keys` now. Not a use.
    pub fn match_prefix(&self, keys: &[PrefixKey]) -> usize {
        self.prefixes.tree.find(keys).len()
    }

    /// A new sequence that starts with the tiles published under the first of `keys`, as many as there are in a row: in the
    /// same pages and sink slot, all sealed and committed. Its tail is empty.
    pub fn create_from(&mut self, keys: &[PrefixKey]) -> SequenceId {
        let way = self.prefixes.tree.find(keys);
        let tiles = way.len();
        self.prefixes.counts.hits += tiles as u64;
        self.prefixes.counts.misses += (keys.len() - tiles) as u64;
        self.use_way(&way);

        let found: Vec<Tile> = way.iter().map(|&node| self.prefixes.tree.tile(node)).collect();
        let entry = |id: Option<usize>| id.map_or(-1, |id| id as i32);
        let length = tiles * self.rule.group();
        let view = SequenceView {
            length,
            committed: length,
            sealed: if self.rule.pages(tiles) == 0 { 0 } else { tiles },
            block_table: Arc::new(found.iter().map(|tile| entry(tile.page)).collect()),
            slot_table: Arc::new(found.iter().map(|tile| entry(tile.slot)).collect()),
        };
        self.retain(&view);
        let id = self.create();
        self.existing(id).view = view;
        id
    }

    /// Publishes nothing any more. Sequences keep what they hold.
    pub fn unpublish(&mut self) {
        for node in self.prefixes.tree.first_tiles() {
            self.take_back(node);
        }
    }

    /// Gives up cached tiles until this many pages and slots are free. The caller has checked that as many are available.
    pub(super) fn make_room(&mut self, pages: usize, slots: usize) {
        // A slot is given up with its tile and all behind it, which frees pages too: slots first.
        while self.slots.unused() < slots {
            let slot = self.slots.first_cached().expect("the caller has checked what is available");
            self.evict(self.prefixes.tree.holder_of_slot(slot));
        }
        while self.pages.unused() < pages {
            let page = self.pages.first_cached().expect("the caller has checked what is available");
            self.evict(self.prefixes.tree.holder_of_page(page));
        }
    }

    /// Notes that what is published of a sequence was in use until now.
    pub(super) fn note_use(&mut self, view: &SequenceView) {
        let tree = &self.prefixes.tree;
        if tree.is_empty() {
            return;
        }
        let last = (0..view.block_table.len()).rev().find_map(|tile| tree.holder(Tile::of(view, tile)));
        if let Some(last) = last {
            let way = tree.way_to(last);
            self.use_way(&way);
        }
    }

    fn check_publication(
        &self,
        id: SequenceId,
        view: &SequenceView,
        keys: &[PrefixKey],
    ) -> Result<(), TableError> {
        let tiles = view.publishable(&self.rule);
        if keys.len() > tiles {
            return Err(TableError::TooManyKeys { sequence: id, keys: keys.len(), tiles });
        }
        let mut seen = BTreeMap::new();
        for (second, &key) in keys.iter().enumerate() {
            if let Some(first) = seen.insert(key, second) {
                return Err(TableError::RepeatedKey { key, first, second });
            }
        }
        // Otherwise two nodes would hold one page, and a page with two holders beside no sequence would not count as cached.
        let tree = &self.prefixes.tree;
        let new = tree.find(keys).len()..keys.len();
        match new.into_iter().find(|&tile| tree.holder(Tile::of(view, tile)).is_some()) {
            Some(tile) => Err(TableError::PublishedTile { sequence: id, tile }),
            None => Ok(()),
        }
    }

    fn use_way(&mut self, way: &[u64]) {
        let ranks = self.prefixes.ranks(way.len());
        for (&node, rank) in way.iter().zip(ranks) {
            self.rank(self.prefixes.tree.tile(node), rank);
        }
    }

    fn rank(&mut self, tile: Tile, rank: u64) {
        if let Some(page) = tile.page {
            self.pages.rank(page, rank);
        }
        if let Some(slot) = tile.slot {
            self.slots.rank(slot, rank);
        }
    }

    fn evict(&mut self, node: u64) {
        self.prefixes.counts.evictions += self.take_back(node);
    }

    /// Publishes a tile and all behind it no longer; returns how many these are.
    fn take_back(&mut self, node: u64) -> u64 {
        let removed = self.prefixes.tree.remove(node);
        for tile in &removed {
            if let Some(page) = tile.page {
                self.pages.unpublish(page);
            }
            if let Some(slot) = tile.slot {
                self.slots.unpublish(slot);
            }
        }
        removed.len() as u64
    }
}

#[cfg(test)]
mod tests;
