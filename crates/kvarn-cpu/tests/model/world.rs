//! A pool and its model, moved together.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use fastrand::Rng;
use kvarn::codec::{EncodeCounts, SlotType};
use kvarn::tables::SequenceId;
use kvarn_cpu::{Pool, SavedSequence};

use crate::codec::Codec;
use crate::open_step::OpenStep;
use crate::prefix::Prefixes;
use crate::rule::Rule;
use crate::sequence::{Names, Piece, Sequence, State, Stored};
use crate::setup::Setup;

/// Sequences that exist at once: enough to share and to crowd each other out.
const MOST_SEQUENCES: usize = 9;

pub(crate) struct World {
    pub(crate) setup: &'static Setup,
    pub(crate) rule: Rule,
    pub(crate) pool: Arc<Pool>,
    pub(crate) codec: Codec,
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) open_steps: Vec<OpenStep>,
    pub(crate) names: Names,
    /// What the pool's encoders must have met.
    pub(crate) counts: EncodeCounts,
    /// Sequences whose stored tokens the present operation may have changed.
    pub(crate) touched: Vec<SequenceId>,
    /// The newest handles of freed sequences.
    pub(crate) freed: VecDeque<SequenceId>,
    /// How often the pool was made to do what.
    pub(crate) effects: BTreeMap<&'static str, u64>,
    /// Sequences as they were saved, and what they held.
    pub(crate) saved: Vec<(SavedSequence, Stored)>,
    /// What is published.
    pub(crate) prefixes: Prefixes,
    /// Records that truncations decoded.
    pub(crate) unsealed: u64,
    /// A pool and a sequence that have nothing to do with the pool.
    pub(crate) stranger: (Arc<Pool>, SequenceId),
}

impl World {
    pub(crate) fn new(setup: &'static Setup, random: &mut Rng) -> Self {
        let other = Pool::new(
            setup.config(),
            &[kvarn::pool::LayerShape { kv_heads: 1, head_dim: 16 }],
            1,
            1,
            SlotType::Float32,
        );
        let other = other.unwrap();
        let stranger = other.core().create();
        Self {
            setup,
            rule: Rule::of(setup),
            pool: setup.pool(random),
            codec: Codec::new(setup),
            sequences: Vec::new(),
            open_steps: Vec::new(),
            names: Names::default(),
            counts: EncodeCounts::default(),
            touched: Vec::new(),
            freed: VecDeque::new(),
            effects: BTreeMap::new(),
            saved: Vec::new(),
            prefixes: Prefixes::default(),
            unsealed: 0,
            stranger: (other, stranger),
        }
    }

    pub(crate) fn note(&mut self, effect: &'static str, count: usize) {
        *self.effects.entry(effect).or_default() += count as u64;
    }

    pub(crate) fn is_crowded(&self) -> bool {
        self.sequences.len() >= MOST_SEQUENCES
    }

    /// Index of a random sequence, if there is one.
    pub(crate) fn any_sequence(&self, random: &mut Rng) -> Option<usize> {
        (!self.sequences.is_empty()).then(|| random.usize(..self.sequences.len()))
    }

    /// Indices of the sequences that steps can be planned for.
    pub(crate) fn idle_sequences(&self) -> Vec<usize> {
        (0..self.sequences.len()).filter(|&index| self.sequences[index].state == State::Idle).collect()
    }

    /// Sequences whose tokens are in the pool.
    pub(crate) fn resident(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.iter().filter(|sequence| sequence.state != State::Away)
    }

    pub(crate) fn sequence(&self, id: SequenceId) -> &Sequence {
        self.sequences.iter().find(|sequence| sequence.id == id).expect("a sequence of the model")
    }

    pub(crate) fn sequence_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.sequences.iter_mut().find(|sequence| sequence.id == id).expect("a sequence of the model")
    }

    /// A sequence that the pool has just made.
    pub(crate) fn add_sequence(&mut self, id: SequenceId, stored: Stored) {
        assert!(self.sequences.iter().all(|sequence| sequence.id != id) && !self.freed.contains(&id));
        self.sequences.push(Sequence { id, stored, state: State::Idle });
        self.touched.push(id);
    }

    /// Whether something that needs so many pages and slots fits, once what nobody holds has been given up.
    pub(crate) fn fits(&self, (pages, slots): (usize, usize)) -> bool {
        let free = self.free();
        pages <= free.0 && slots <= free.1
    }

    /// How often a slot is held: once for each sequence that has it, once for an open step that adds it, once if it
    /// is published.
    pub(crate) fn slot_references(&self, slot: Piece) -> usize {
        let held = |stored: &Stored| stored.tiles.iter().any(|tile| tile.slot == Some(slot));
        let stored = self.resident().filter(|sequence| held(&sequence.stored)).count();
        let members = self.open_steps.iter().flat_map(|step| &step.members);
        let added = members.filter(|member| held(&member.after) && !held(&self.sequence(member.id).stored));
        let published = self.prefixes.tiles.iter().filter(|published| published.tile.slot == Some(slot));
        stored + added.count() + published.count()
    }

    /// Closes what is open and frees every sequence: nothing must be left in use.
    pub(crate) fn empty(&mut self, random: &mut Rng) {
        while let Some(open) = self.open_steps.pop() {
            self.abandon(open, random);
            self.check_accounting();
        }
        while let Some(sequence) = self.sequences.pop() {
            self.pool.core().free(sequence.id).unwrap();
            if sequence.state != State::Away {
                self.prefixes.note_use(&sequence.stored);
            }
            self.check_accounting();
        }
        self.check_accounting();
        self.prefixes.tiles.clear();
        self.pool.core().unpublish();
        self.check_accounting();
        let stats = self.pool.core().stats();
        assert_eq!((stats.page_bytes, stats.slot_bytes), (0, 0), "in use after everything was freed");
    }
}
