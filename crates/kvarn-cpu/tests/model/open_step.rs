//! A step: planned in the pool and in the model, appended layer by layer, closed.

use fastrand::Rng;
use kvarn::codec::EncodeCounts;
use kvarn::pool::PoolError;
use kvarn::tables::{Lack, SealSource, SequenceId, TableError};
use kvarn_cpu::{Error, Step};

use crate::sequence::{Growth, State, Stored};
use crate::values::Rows;
use crate::world::World;

/// What a step is to do with one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    /// Index of the sequence.
    pub(crate) sequence: usize,
    pub(crate) count: usize,
    pub(crate) hold: usize,
}

/// One sequence of an open step.
pub(crate) struct Member {
    pub(crate) id: SequenceId,
    pub(crate) hold: usize,
    /// Position of the first token appended, and its row.
    pub(crate) start: usize,
    pub(crate) first_row: usize,
    pub(crate) count: usize,
    /// What is stored once the step is finished.
    pub(crate) after: Stored,
}

/// A step that is planned and not closed.
pub(crate) struct OpenStep {
    pub(crate) step: Step,
    pub(crate) members: Vec<Member>,
    /// What to append, and what that must count, by layer.
    rows: Vec<Rows>,
    counts: Vec<EncodeCounts>,
    /// Layers that were appended to.
    pub(crate) appended: Vec<bool>,
}

impl World {
    /// Plans a step; `None`: the pool is too small or too full, and said so rightly.
    pub(crate) fn plan(&mut self, requests: &[Request], random: &mut Rng) -> Option<OpenStep> {
        let ids: Vec<SequenceId> =
            requests.iter().map(|request| self.sequences[request.sequence].id).collect();
        let counts: Vec<usize> = requests.iter().map(|request| request.count).collect();
        let hold: Vec<usize> = requests.iter().map(|request| request.hold).collect();

        let mut names = std::mem::take(&mut self.names);
        let mut growths = Vec::with_capacity(requests.len());
        for request in requests {
            let stored = &self.sequences[request.sequence].stored;
            let is_shared = |slot| self.slot_references(slot) > 1;
            growths.push(stored.grow(self.rule, (request.count, request.hold), is_shared, &mut names));
        }
        self.names = names;

        let (mut pages_free, mut slots_free) = self.free();
        let mut lacking = Vec::new();
        for (index, growth) in growths.iter().enumerate() {
            let (pages_needed, slots_needed) = (growth.new_pages, growth.new_slots);
            if pages_needed > pages_free || slots_needed > slots_free {
                let sequence = ids[index];
                lacking.push(Lack { sequence, index, pages_needed, pages_free, slots_needed, slots_free });
            } else {
                pages_free -= pages_needed;
                slots_free -= slots_needed;
            }
        }

        let step = match self.pool.step(&ids, &counts, &hold) {
            Ok(step) => step,
            Err(Error::Pool(PoolError::Table(TableError::Capacity { lacking: told, .. }))) => {
                assert_eq!(told, lacking, "what the pool says is lacking, and what is");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        assert!(lacking.is_empty(), "a step was planned that does not fit: {lacking:?}");
        let total = |needed: fn(&Growth) -> usize| growths.iter().map(needed).sum();
        self.make_room(total(|growth| growth.new_pages), total(|growth| growth.new_slots));

        let rows: Vec<Rows> = self
            .setup
            .layers
            .iter()
            .map(|&(heads, head_dim)| {
                Rows::random(self.setup.input, [counts.iter().sum(), heads, head_dim], random)
            })
            .collect();
        let mut met = vec![EncodeCounts::default(); self.codec.layers.len()];
        let new = self.codec.store(&rows, counts.iter().sum(), &mut met);
        let mut members = Vec::with_capacity(requests.len());
        let mut first_row = 0;
        for (request, growth) in requests.iter().zip(growths) {
            let sequence = &mut self.sequences[request.sequence];
            sequence.state = State::Open;
            let mut after = sequence.stored.clone();
            after.tokens.extend_from_slice(&new[first_row..first_row + request.count]);
            for tile in growth.seals {
                let tokens = tile * self.rule.group..(tile + 1) * self.rule.group;
                let decoded = self.codec.seal(&after.tokens[tokens.clone()], &mut met);
                let sinks = if tile == 0 { self.rule.sinks } else { 0 };
                if sinks > 0 {
                    after.sink_tile = after.tokens[tokens.clone()].to_vec();
                }
                after.tokens[tokens][sinks..].clone_from_slice(&decoded[sinks..]);
            }
            after.tiles = growth.tiles;
            after.committed = growth.committed;
            after.largest_hold = after.largest_hold.max(request.hold);
            let (id, start) = (sequence.id, sequence.stored.length());
            let &Request { count, hold, .. } = request;
            members.push(Member { id, hold, start, first_row, count, after });
            first_row += count;
        }
        let appended = vec![false; rows.len()];
        Some(OpenStep { step, members, rows, counts: met, appended })
    }

    /// Appends to one layer.
    pub(crate) fn append(&mut self, open: &mut OpenStep, layer: usize) {
        let Rows { k, v, rotated } = &open.rows[layer];
        let counts = open.step.append(layer, &k.tensor(), &v.tensor(), *rotated).unwrap();
        assert_eq!(counts, open.counts[layer], "what the append of layer {layer} counted");
        self.counts += counts;
        open.appended[layer] = true;
        if layer == 0 {
            self.note_append(open);
        }
    }

    fn note_append(&mut self, open: &OpenStep) {
        for planned in &open.step.open().plan().sequences {
            self.note("tokens appended", planned.count);
            self.note("slots copied before a write", usize::from(planned.copy.is_some()));
            for seal in &planned.seals {
                let effect = match seal.source {
                    SealSource::Slot(_) => "tiles sealed from a slot",
                    SealSource::Rows(_) => "tiles sealed from the rows of a step",
                    SealSource::SharedSlot { .. } => "tiles sealed from a shared slot and rows",
                };
                self.note(effect, 1);
            }
        }
    }

    /// Makes the step the state of its sequences; every layer has been appended to.
    pub(crate) fn finish(&mut self, open: OpenStep) {
        open.step.open().finish().unwrap();
        self.settle(open);
    }

    /// What a finished step planned is what its sequences hold.
    pub(crate) fn settle(&mut self, open: OpenStep) {
        for member in open.members {
            let sequence = self.sequence_mut(member.id);
            sequence.stored = member.after;
            sequence.state = State::Idle;
            self.touched.push(member.id);
        }
    }

    /// Takes the step back, by saying so or by dropping it.
    pub(crate) fn abandon(&mut self, open: OpenStep, random: &mut Rng) {
        if random.bool() {
            open.step.open().abandon();
        }
        drop(open.step);
        for member in open.members {
            self.sequence_mut(member.id).state = State::Idle;
            self.touched.push(member.id);
        }
    }
}
