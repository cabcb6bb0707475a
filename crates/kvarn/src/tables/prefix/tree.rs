//! The published tiles, found by the keys on the way from the first tile of a sequence to theirs.

use std::collections::BTreeMap;
use std::fmt;

use crate::tables::SequenceView;

/// Where the first tiles of sequences are children of.
pub(super) const ROOT: u64 = 0;

/// What one tile is known by: the caller's key, and a fingerprint of what the tile's bytes depend on besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrefixKey {
    fingerprint: [u8; 16],
    key: [u8; 16],
}

impl PrefixKey {
    /// Keys are equal if both parts are.
    pub const fn new(fingerprint: [u8; 16], key: [u8; 16]) -> Self {
        Self { fingerprint, key }
    }
}

impl fmt::Display for PrefixKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.key.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a published tile consists of: its page, its sink slot, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) page: Option<usize>,
    pub(super) slot: Option<usize>,
}

impl Tile {
    pub(super) fn of(view: &SequenceView, tile: usize) -> Self {
        let id = |table: &[i32]| usize::try_from(table[tile]).ok();
        Self { page: id(&view.block_table), slot: id(&view.slot_table) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    parent: u64,
    key: PrefixKey,
    tile: Tile,
}

/// A tree whose nodes are published tiles. A tile is a child of the one before it in its sequence, so it is found
/// behind the same tiles and at the same position only, whatever the keys are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tree {
    nodes: BTreeMap<u64, Node>,
    children: BTreeMap<(u64, PrefixKey), u64>,
    by_page: BTreeMap<usize, u64>,
    by_slot: BTreeMap<usize, u64>,
    last: u64,
}

impl Tree {
    pub(super) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Nodes of the longest way from the root along `keys`.
    pub(super) fn find(&self, keys: &[PrefixKey]) -> Vec<u64> {
        let mut parent = ROOT;
        keys.iter()
            .map_while(|&key| {
                parent = self.child(parent, key)?;
                Some(parent)
            })
            .collect()
    }

    pub(super) fn child(&self, parent: u64, key: PrefixKey) -> Option<u64> {
        self.children.get(&(parent, key)).copied()
    }

    pub(super) fn tile(&self, node: u64) -> Tile {
        self.nodes[&node].tile
    }

    /// The node whose page or slot the tile has.
    pub(super) fn holder(&self, tile: Tile) -> Option<u64> {
        let page = tile.page.and_then(|page| self.by_page.get(&page));
        page.or_else(|| tile.slot.and_then(|slot| self.by_slot.get(&slot))).copied()
    }

    pub(super) fn holder_of_page(&self, page: usize) -> u64 {
        self.by_page[&page]
    }

    pub(super) fn holder_of_slot(&self, slot: usize) -> u64 {
        self.by_slot[&slot]
    }

    /// Nodes from the first tile to this one.
    pub(super) fn way_to(&self, node: u64) -> Vec<u64> {
        let parent = |node: &u64| Some(self.nodes[node].parent).filter(|&parent| parent != ROOT);
        let mut way: Vec<u64> = std::iter::successors(Some(node), parent).collect();
        way.reverse();
        way
    }

    pub(super) fn insert(&mut self, parent: u64, key: PrefixKey, tile: Tile) -> u64 {
        self.last += 1;
        let node = self.last;
        self.nodes.insert(node, Node { parent, key, tile });
        self.children.insert((parent, key), node);
        if let Some(page) = tile.page {
            self.by_page.insert(page, node);
        }
        if let Some(slot) = tile.slot {
            self.by_slot.insert(slot, node);
        }
        node
    }

    /// Takes out a node and all behind it, and returns their tiles.
    pub(super) fn remove(&mut self, node: u64) -> Vec<Tile> {
        let (mut waiting, mut removed) = (vec![node], Vec::new());
        while let Some(node) = waiting.pop() {
            let Node { parent, key, tile } = self.nodes.remove(&node).expect("a node of the tree");
            self.children.remove(&(parent, key));
            if let Some(page) = tile.page {
                self.by_page.remove(&page);
            }
            if let Some(slot) = tile.slot {
                self.by_slot.remove(&slot);
            }
            waiting.extend(self.behind(node));
            removed.push(tile);
        }
        removed
    }

    /// Nodes of first tiles.
    pub(super) fn first_tiles(&self) -> Vec<u64> {
        self.behind(ROOT).collect()
    }

    fn behind(&self, node: u64) -> impl Iterator<Item = u64> + '_ {
        let least = PrefixKey::new([0; 16], [0; 16]);
        let children = self.children.range((node, least)..);
        children.take_while(move |((parent, _), _)| *parent == node).map(|(_, &child)| child)
    }
}
