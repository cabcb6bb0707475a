//! What holds after every operation: references, bytes, lengths, tables.

use std::collections::{BTreeMap, BTreeSet};

use kvarn::pool::Offloaded;
use kvarn::tables::{SequenceView, StepPlan, Usage};

use crate::sequence::{Piece, State, Stored, Tile};
use crate::world::World;

/// References to the pieces of one kind, and the physical id of each.
#[derive(Default)]
struct Pieces {
    references: BTreeMap<Piece, u32>,
    ids: BTreeMap<Piece, i32>,
}

impl Pieces {
    /// Notes that a table names a piece, which must be at the same id wherever it is named.
    fn place(&mut self, piece: Option<Piece>, id: i32) {
        match piece {
            None => assert_eq!(id, -1, "the model has no piece there"),
            Some(piece) => {
                assert!(id >= 0, "the model has {piece:?} there");
                assert_eq!(*self.ids.entry(piece).or_insert(id), id, "{piece:?} is at two ids");
            }
        }
    }

    fn hold(&mut self, piece: Option<Piece>) {
        if let Some(piece) = piece {
            *self.references.entry(piece).or_default() += 1;
        }
    }

    /// Holds the pool's counts against the model's, and returns how many ids sequences and open steps use.
    fn check(&self, what: &str, references: &[u32]) -> usize {
        let mut expected = vec![0; references.len()];
        for (piece, &id) in &self.ids {
            assert_eq!(expected[id as usize], 0, "two {what} of the model are at id {id}");
            expected[id as usize] = self.references[piece];
        }
        // What is published and nothing else is at an id that no table names.
        let unnamed = self.references.keys().filter(|piece| !self.ids.contains_key(piece)).count();
        let cached: Vec<usize> =
            (0..references.len()).filter(|&id| expected[id] == 0 && references[id] > 0).collect();
        assert!(cached.iter().all(|&id| references[id] == 1), "what is published only is held once");
        assert_eq!(cached.len(), unnamed, "{what} that are published only");
        for id in cached {
            expected[id] = 1;
        }
        assert_eq!(references, expected, "references to {what}");
        self.ids.len()
    }
}

impl World {
    /// Pages and slots that no sequence and no open step holds: a step may take them.
    pub(crate) fn free(&self) -> (usize, usize) {
        let layout = self.pool.core().layout();
        (layout.pages - self.held(|tile| tile.page).len(), layout.slots - self.held(|tile| tile.slot).len())
    }

    /// Pages and slots that nothing holds, no publication either.
    pub(crate) fn unused(&self) -> (usize, usize) {
        let layout = self.pool.core().layout();
        let taken = |pick: fn(&Tile) -> Option<Piece>| {
            let published = self.prefixes.tiles.iter().filter_map(|published| pick(&published.tile));
            self.held(pick).into_iter().chain(published).collect::<BTreeSet<Piece>>().len()
        };
        (layout.pages - taken(|tile| tile.page), layout.slots - taken(|tile| tile.slot))
    }

    /// What sequences and open steps hold.
    pub(crate) fn held(&self, pick: fn(&Tile) -> Option<Piece>) -> BTreeSet<Piece> {
        let stored = self.resident().map(|sequence| &sequence.stored);
        let planned = self.open_steps.iter().flat_map(|step| step.members.iter().map(|member| &member.after));
        stored.chain(planned).flat_map(|stored| &stored.tiles).filter_map(pick).collect()
    }

    pub(crate) fn check_accounting(&self) {
        let core = self.pool.core();
        let (mut pages, mut slots) = (Pieces::default(), Pieces::default());
        let mut away = Offloaded::default();
        for sequence in &self.sequences {
            let view = core.view(sequence.id).unwrap();
            if sequence.state == State::Away {
                let (pages, slots) = sequence.stored.extent();
                away.sequences += 1;
                away.bytes += pages * self.page_bytes() + slots * self.slot_bytes();
                check_away(&sequence.stored, &view);
                continue;
            }
            check_view(&sequence.stored, &view, &mut pages, &mut slots);
            for tile in &sequence.stored.tiles {
                pages.hold(tile.page);
                slots.hold(tile.slot);
            }
            if sequence.state == State::Idle {
                self.check_bound(&sequence.stored.tiles, &[], sequence.stored.largest_hold);
            }
        }
        for open in &self.open_steps {
            let plan: &StepPlan = open.step.open().plan();
            assert!(core.is_open(plan.id));
            for (member, planned) in open.members.iter().zip(&plan.sequences) {
                assert_eq!((planned.id, planned.start()), (member.id, member.start));
                let before = &self.sequence(member.id).stored;
                check_view(before, &planned.before, &mut pages, &mut slots);
                check_view(&member.after, &planned.after, &mut pages, &mut slots);
                for (index, tile) in member.after.tiles.iter().enumerate() {
                    let old = before.tiles.get(index).copied().unwrap_or_default();
                    pages.hold(tile.page.filter(|_| tile.page != old.page));
                    slots.hold(tile.slot.filter(|_| tile.slot != old.slot));
                }
                self.check_bound(
                    &before.tiles,
                    &member.after.tiles,
                    member.after.largest_hold.max(member.hold),
                );
            }
        }
        for published in &self.prefixes.tiles {
            pages.hold(published.tile.page);
            slots.hold(published.tile.slot);
        }
        let references = core.references();
        let used_pages = pages.check("pages", &references.pages);
        let used_slots = slots.check("slots", &references.slots);

        let (stats, layout) = (core.stats(), core.layout());
        let counts = |usage: Usage| (usage.total, usage.used, usage.free);
        assert_eq!(
            counts(stats.tables.pages),
            (layout.pages, used_pages, layout.pages - used_pages),
            "pages"
        );
        assert_eq!(
            counts(stats.tables.slots),
            (layout.slots, used_slots, layout.slots - used_slots),
            "slots"
        );
        assert_eq!(stats.page_bytes, used_pages * self.page_bytes(), "bytes of pages");
        assert_eq!(stats.slot_bytes, used_slots * self.slot_bytes(), "bytes of slots");
        assert_eq!(stats.tables.sequences, self.sequences.len(), "sequences");
        let tokens: usize = self.sequences.iter().map(|sequence| sequence.stored.length()).sum();
        assert_eq!(stats.tables.tokens, tokens, "tokens");
        assert_eq!(stats.tables.open_steps, self.open_steps.len(), "open steps");
        assert_eq!(stats.counts, self.counts, "what encoders met");
        assert_eq!(stats.offloaded, away, "offloaded sequences");
        assert_eq!(stats.tables.prefixes, self.prefixes.counts, "what became of published tiles");
        let published = |pick: fn(&Tile) -> Option<Piece>| {
            self.prefixes.tiles.iter().filter_map(|published| pick(&published.tile)).count()
        };
        let told = (stats.tables.pages.published, stats.tables.slots.published);
        assert_eq!(
            told,
            (published(|tile| tile.page), published(|tile| tile.slot)),
            "published pages and slots"
        );
        let (free, unused) = (self.free(), self.unused());
        let told = (stats.tables.pages.cached, stats.tables.slots.cached);
        assert_eq!(told, (free.0 - unused.0, free.1 - unused.1), "pages and slots that are published only");
        assert_eq!(stats.tables.unsealed, self.unsealed, "tiles unsealed");
    }

    fn check_bound(&self, before: &[Tile], after: &[Tile], hold: usize) {
        let slots: BTreeSet<Piece> = before.iter().chain(after).filter_map(|tile| tile.slot).collect();
        let bound = self.rule.slot_bound(hold);
        assert!(
            slots.len() <= bound,
            "{} slots of one sequence, of at most {bound} at hold {hold}",
            slots.len()
        );
    }

    /// Bytes of a page in all layers: codes, a half for every scale and zero point, padded to 128 bytes a head.
    fn page_bytes(&self) -> usize {
        let config = self.setup.config();
        let (group, bits) = (config.group(), config.key_bits().get() + config.value_bits().get());
        let record = |head_dim: usize| {
            let parameters = 2 * (2 * head_dim + group) + 2 * (2 * group + head_dim);
            (group * head_dim * bits / 8 + parameters).next_multiple_of(128)
        };
        self.setup.layers.iter().map(|&(kv_heads, head_dim)| kv_heads * record(head_dim)).sum()
    }

    fn slot_bytes(&self) -> usize {
        let element = self.setup.input.bytes();
        let tokens = self.rule.group;
        self.setup.layers.iter().map(|&(kv_heads, head_dim)| 2 * kv_heads * tokens * head_dim * element).sum()
    }
}

/// Holds the view of an offloaded sequence against the model: lengths, and tables that name nothing.
fn check_away(stored: &Stored, view: &SequenceView) {
    assert_eq!((view.length, view.committed), (stored.length(), stored.committed), "length, committed");
    assert_eq!(view.sealed, stored.sealed(), "sealed tiles");
    let nothing = vec![-1; stored.tiles.len()];
    assert_eq!((&*view.block_table, &*view.slot_table), (&nothing, &nothing), "tables of what is offloaded");
}

/// Holds one view of the pool against the model, and notes where its pieces are.
fn check_view(stored: &Stored, view: &SequenceView, pages: &mut Pieces, slots: &mut Pieces) {
    assert_eq!((view.length, view.committed), (stored.length(), stored.committed), "length, committed");
    assert_eq!(view.sealed, stored.sealed(), "sealed tiles");
    let tiles = stored.tiles.len();
    assert_eq!((view.block_table.len(), view.slot_table.len()), (tiles, tiles), "tiles");
    for (index, tile) in stored.tiles.iter().enumerate() {
        pages.place(tile.page, view.block_table[index]);
        slots.place(tile.slot, view.slot_table[index]);
    }
}
