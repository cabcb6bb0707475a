//! Published tiles, by the letters on the way to them: each with the tokens it must hold, and when it was used.

use std::cmp::Reverse;

use super::check::state;
use super::model::{Model, Token};
use super::world::{LOSSY, World};
use crate::tables::{PrefixKey, SequenceView, TableError};

#[derive(Debug, Clone)]
pub(super) struct PublishedTile {
    page: Option<usize>,
    pub(super) slot: Option<usize>,
    /// What was encoded, and what the slot holds.
    values: Vec<u64>,
    used: u64,
}

impl World {
    pub(super) fn publish(&mut self, pick: usize, letters: &[u8]) {
        if self.models.is_empty() {
            return;
        }
        let model = self.models[pick % self.models.len()].clone();
        let before = state(&self.tables);
        if model.open {
            let result = self.tables.publish(model.id, &keys(letters));
            assert!(matches!(result, Err(TableError::SequenceInStep { .. })));
            assert_eq!(state(&self.tables), before);
            return;
        }
        let most = self.whole_tiles(&model);
        let letters = if letters.len() > most {
            let error = TableError::TooManyKeys { sequence: model.id, keys: letters.len(), tiles: most };
            assert_eq!(self.tables.publish(model.id, &keys(letters)), Err(error));
            assert_eq!(state(&self.tables), before);
            &letters[..most]
        } else {
            letters
        };

        let view = self.tables.view(model.id).unwrap().clone();
        let known = self.published_of(letters);
        let elsewhere = (known..letters.len()).find(|&tile| self.way_to_tile(&view, tile).is_some());
        let result = self.tables.publish(model.id, &keys(letters));
        if let Some(tile) = elsewhere {
            assert_eq!(result, Err(TableError::PublishedTile { sequence: model.id, tile }));
            assert_eq!(state(&self.tables), before);
            return;
        }
        assert_eq!(result, Ok(letters.len() - known));
        assert_eq!(self.tables.view(model.id).unwrap(), &view);
        for tile in known..letters.len() {
            let (page, slot) = ids(&view, tile);
            let tokens = tile * self.rule.group()..(tile + 1) * self.rule.group();
            let values = model.tokens[tokens].iter().map(|token| token.value).collect();
            let tile_published = PublishedTile { page, slot, values, used: 0 };
            self.published.insert(letters[..=tile].to_vec(), tile_published);
        }
        self.use_way(letters);
    }

    pub(super) fn start(&mut self, letters: &[u8]) {
        let found = self.published_of(letters);
        assert_eq!(self.tables.match_prefix(&keys(letters)), found);
        let counts = self.tables.stats().prefixes;
        let id = self.tables.create_from(&keys(letters));
        let after = self.tables.stats().prefixes;
        assert_eq!((after.hits - counts.hits) as usize, found);
        assert_eq!((after.misses - counts.misses) as usize, letters.len() - found);
        let mut tokens = Vec::new();
        for tile in 0..found {
            let sealed = self.rule.has_page(tile);
            let values = &self.published[&letters[..=tile]].values;
            tokens.extend(values.iter().map(|&value| Token { value, sealed }));
        }
        let (sinks, committed) = (self.rule.sink_tokens(), tokens.len());
        self.models.push(Model { id, sinks, committed, tokens, largest_hold: 0, open: false });
        self.use_way(&letters[..found]);
    }

    pub(super) fn unpublish(&mut self) {
        self.tables.unpublish();
        self.published.clear();
    }

    /// Pages and slots that no sequence and no open step holds.
    pub(super) fn available(&self) -> (usize, usize) {
        let (pages, slots) = self.references();
        let free = |references: &[u32]| references.iter().filter(|&&count| count == 0).count();
        (free(&pages), free(&slots))
    }

    /// Gives up what is longest unused, until there is room for a step. Returns whether anything was.
    pub(super) fn make_room(&mut self, pages: usize, slots: usize) -> bool {
        let before = self.published.len();
        let references = self.references();
        let free = |world: &Self, which: fn(&PublishedTile) -> Option<usize>, references: &[u32]| {
            let published =
                world.published.values().filter_map(which).filter(|&id| references[id] == 0).count();
            references.iter().filter(|&&count| count == 0).count() - published
        };
        while free(self, |tile| tile.slot, &references.1) < slots {
            self.give_up(|tile| tile.slot, &references.1);
        }
        while free(self, |tile| tile.page, &references.0) < pages {
            self.give_up(|tile| tile.page, &references.0);
        }
        self.published.len() < before
    }

    fn give_up(&mut self, which: fn(&PublishedTile) -> Option<usize>, references: &[u32]) {
        let idle =
            self.published.iter().filter(|(_, tile)| which(tile).is_some_and(|id| references[id] == 0));
        let (first, _) = idle.min_by_key(|(way, tile)| (tile.used, Reverse(way.len()))).unwrap();
        let first = first.clone();
        self.published.retain(|way, _| !way.starts_with(&first));
    }

    /// The way to what is published of a sequence, as far as it goes.
    pub(super) fn last_published(&self, index: usize) -> Vec<u8> {
        let view = self.tables.view(self.models[index].id).unwrap();
        let mut tiles = (0..view.block_table.len()).rev();
        tiles.find_map(|tile| self.way_to_tile(view, tile)).unwrap_or_default()
    }

    pub(super) fn use_way(&mut self, letters: &[u8]) {
        self.clock += 1;
        for end in 1..=letters.len() {
            self.published.get_mut(&letters[..end]).unwrap().used = self.clock;
        }
    }

    /// Checks what is published against the tables and the memory, and counts its references.
    pub(super) fn check_published(&self, pages: &mut [u32], slots: &mut [u32]) {
        let stats = self.tables.stats();
        for (which, references, usage) in [
            ((|tile| tile.page) as fn(&PublishedTile) -> Option<usize>, &*pages, stats.pages),
            (|tile| tile.slot, &*slots, stats.slots),
        ] {
            let ids = || self.published.values().filter_map(which);
            let cached = ids().filter(|&id| references[id] == 0).count();
            assert_eq!((usage.published, usage.cached), (ids().count(), cached));
            let used = references.iter().filter(|&&count| count > 0).count();
            assert_eq!((usage.used, usage.free), (used, references.len() - used));
        }
        for (way, tile) in &self.published {
            assert_eq!(self.tables.match_prefix(&keys(way)), way.len(), "{way:?}");
            for (id, references, memory, mark) in
                [(tile.page, &mut *pages, &self.pages, LOSSY), (tile.slot, &mut *slots, &self.slots, 0)]
            {
                if let Some(id) = id {
                    references[id] += 1;
                    let expected: Vec<u64> = tile.values.iter().map(|value| value | mark).collect();
                    assert_eq!(memory[id], expected, "{way:?}");
                }
            }
        }
    }

    /// Leading tiles that never change again.
    fn whole_tiles(&self, model: &Model) -> usize {
        let tiles = model.tokens.chunks(self.rule.group());
        let whole = |(tile, tokens): (usize, &[Token])| {
            tokens.iter().all(|token| token.sealed)
                || (!self.rule.has_page(tile) && model.committed >= self.rule.group())
        };
        tiles.enumerate().take_while(|&tile| whole(tile)).count()
    }

    /// How far the way goes along published tiles.
    fn published_of(&self, letters: &[u8]) -> usize {
        (0..letters.len()).take_while(|&tile| self.published.contains_key(&letters[..=tile])).count()
    }

    /// Where a tile of a sequence is published.
    fn way_to_tile(&self, view: &SequenceView, tile: usize) -> Option<Vec<u8>> {
        let (page, slot) = ids(view, tile);
        let same = |published: &PublishedTile| {
            (page.is_some() && published.page == page) || (slot.is_some() && published.slot == slot)
        };
        self.published.iter().find(|(_, published)| same(published)).map(|(way, _)| way.clone())
    }
}

fn ids(view: &SequenceView, tile: usize) -> (Option<usize>, Option<usize>) {
    let id = |table: &[i32]| usize::try_from(table[tile]).ok();
    (id(&view.block_table), id(&view.slot_table))
}

/// Keys of tiles; the same letter means the same key.
fn keys(letters: &[u8]) -> Vec<PrefixKey> {
    let key = |(tile, &letter): (usize, &u8)| {
        let mut key = [0; 16];
        (key[0], key[15]) = (letter, tile as u8);
        PrefixKey::new([9; 16], key)
    };
    letters.iter().enumerate().map(key).collect()
}
