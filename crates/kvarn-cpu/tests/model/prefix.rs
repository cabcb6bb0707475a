//! The model of prefix sharing: a plain list of published tiles, each with the keys that lead to it.

use kvarn::pool::TileKey;
use kvarn::tables::PrefixCounts;

use crate::sequence::{Piece, Stored, Tile, Token};
use crate::world::World;

/// A published tile.
pub(crate) struct PublishedTile {
    /// Its key, behind those of the tiles before it.
    pub(crate) way: Vec<TileKey>,
    pub(crate) tile: Tile,
    /// What its tokens read as.
    pub(crate) tokens: Vec<Token>,
    /// What was appended to it, where it keeps a slot.
    pub(crate) sink_tile: Vec<Token>,
    /// The higher, the later it is given up.
    rank: u64,
}

/// The published tiles of a pool.
#[derive(Default)]
pub(crate) struct Prefixes {
    pub(crate) tiles: Vec<PublishedTile>,
    clock: u64,
    pub(crate) counts: PrefixCounts,
}

impl Prefixes {
    pub(crate) fn find(&self, way: &[TileKey]) -> Option<usize> {
        self.tiles.iter().position(|published| published.way == way)
    }

    /// How many of the keys lead to published tiles, from the first on.
    pub(crate) fn matching(&self, keys: &[TileKey]) -> usize {
        (1..=keys.len()).take_while(|&tiles| self.find(&keys[..tiles]).is_some()).count()
    }

    /// The tile of which this is the page, or else the slot.
    fn holder(&self, tile: Tile) -> Option<usize> {
        let page = |published: &PublishedTile| tile.page.is_some() && published.tile.page == tile.page;
        let slot = |published: &PublishedTile| tile.slot.is_some() && published.tile.slot == tile.slot;
        self.tiles.iter().position(page).or_else(|| self.tiles.iter().position(slot))
    }

    /// Index of the first tile behind those already published that is published elsewhere.
    pub(crate) fn published_elsewhere(&self, stored: &Stored, keys: &[TileKey]) -> Option<usize> {
        (self.matching(keys)..keys.len()).find(|&index| self.holder(stored.tiles[index]).is_some())
    }

    /// Publishes the first tiles of a sequence; returns how many were not published before.
    pub(crate) fn publish(&mut self, stored: &Stored, keys: &[TileKey], group: usize) -> usize {
        let mut new = 0;
        for (index, &tile) in stored.tiles.iter().take(keys.len()).enumerate() {
            let way = &keys[..=index];
            if let Some(first) = self.find(way) {
                self.counts.duplicates += u64::from(self.tiles[first].tile != tile);
                continue;
            }
            new += 1;
            self.tiles.push(PublishedTile {
                way: way.to_vec(),
                tile,
                tokens: stored.tokens[index * group..(index + 1) * group].to_vec(),
                sink_tile: if index == 0 { stored.sink_tile.clone() } else { Vec::new() },
                rank: 0,
            });
        }
        self.use_way(keys);
        new
    }

    /// All tiles of a way are used now, the first one last.
    fn use_way(&mut self, keys: &[TileKey]) {
        for tiles in (1..=keys.len()).rev() {
            self.clock += 1;
            let index = self.find(&keys[..tiles]).expect("a published tile");
            self.tiles[index].rank = self.clock;
        }
    }

    /// A sequence that begins with the tiles published under the first of `keys`.
    pub(crate) fn start(&mut self, keys: &[TileKey]) -> Stored {
        let tiles = self.matching(keys);
        self.counts.hits += tiles as u64;
        self.counts.misses += (keys.len() - tiles) as u64;
        self.use_way(&keys[..tiles]);
        let mut stored = Stored::default();
        for tiles in 1..=tiles {
            let published = &self.tiles[self.find(&keys[..tiles]).expect("a published tile")];
            stored.tokens.extend_from_slice(&published.tokens);
            stored.sink_tile.extend_from_slice(&published.sink_tile);
            stored.tiles.push(published.tile);
        }
        stored.committed = stored.tokens.len();
        stored
    }

    /// What is published of a sequence was in use until now.
    pub(crate) fn note_use(&mut self, stored: &Stored) {
        if let Some(last) = stored.tiles.iter().rev().find_map(|&tile| self.holder(tile)) {
            let way = self.tiles[last].way.clone();
            self.use_way(&way);
        }
    }

    /// Publishes a tile, and those behind it, no longer.
    fn evict(&mut self, index: usize) {
        let way = self.tiles[index].way.clone();
        let before = self.tiles.len();
        self.tiles.retain(|published| !published.way.starts_with(&way));
        self.counts.evictions += (before - self.tiles.len()) as u64;
    }
}

impl World {
    /// Gives up published tiles that nobody holds, as the pool does for what it takes next: for slots, then for pages, the
    /// least recently used tile first.
    pub(crate) fn make_room(&mut self, pages: usize, slots: usize) {
        while self.unused().1 < slots {
            self.evict_first(|tile| tile.slot);
        }
        while self.unused().0 < pages {
            self.evict_first(|tile| tile.page);
        }
    }

    fn evict_first(&mut self, pick: fn(&Tile) -> Option<Piece>) {
        let held = self.held(pick);
        let idle = |&index: &usize| {
            pick(&self.prefixes.tiles[index].tile).is_some_and(|piece| !held.contains(&piece))
        };
        let candidates = (0..self.prefixes.tiles.len()).filter(idle);
        let first = candidates.min_by_key(|&index| self.prefixes.tiles[index].rank);
        let before = self.prefixes.tiles.len();
        self.prefixes.evict(first.expect("what was available"));
        self.note("published tiles given up", before - self.prefixes.tiles.len());
    }
}
