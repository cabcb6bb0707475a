//! A pool, its memory of token values and the model of each sequence, moved together.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Op;
use super::check::{deep_copy, deep_copy_view, state};
use super::model::{Model, needs};
use super::prefix::PublishedTile;
use crate::tables::{SealRule, SealSource, SequenceId, StepPlan, TableError, TableErrorKind, Tables, Unseal};

/// What a freed or fresh piece of memory holds: reading it is a failure.
pub(super) const GARBAGE: u64 = u64::MAX;
/// Set in a value that went through a record: what was read from one, even back in a slot, is not what was appended.
pub(super) const LOSSY: u64 = 1 << 62;

/// A step that is planned and appended, but not closed.
pub(super) struct OpenStep {
    pub(super) plan: Arc<StepPlan>,
    /// A deep copy, to see that the plan never changes.
    copy: StepPlan,
    values: Vec<u64>,
}

pub(super) struct World {
    pub(super) rule: SealRule,
    pub(super) tables: Tables,
    pub(super) models: Vec<Model>,
    pub(super) open: Vec<OpenStep>,
    pub(super) slots: Vec<Vec<u64>>,
    pub(super) pages: Vec<Vec<u64>>,
    /// Published tiles, by the letters on the way to them.
    pub(super) published: BTreeMap<Vec<u8>, PublishedTile>,
    pub(super) clock: u64,
    next_value: u64,
}

impl World {
    pub(super) fn new(rule: SealRule, pages: usize, slots: usize) -> Self {
        let tile = vec![GARBAGE; rule.group()];
        Self {
            rule,
            tables: Tables::new(rule, pages, slots).unwrap(),
            models: Vec::new(),
            open: Vec::new(),
            slots: vec![tile.clone(); slots],
            pages: vec![tile; pages],
            published: BTreeMap::new(),
            clock: 0,
            next_value: 0,
        }
    }

    pub(super) fn run(&mut self, op: &Op) {
        match op {
            Op::Create => {
                let id = self.tables.create();
                assert!(self.models.iter().all(|model| model.id != id));
                self.models.push(Model {
                    id,
                    sinks: self.rule.sink_tokens(),
                    tokens: Vec::new(),
                    committed: 0,
                    largest_hold: 0,
                    open: false,
                });
            }
            Op::Plan { picks, close } => {
                let planned = self.plan(picks);
                if let (true, Some(finish)) = (planned, close) {
                    self.close(self.open.len() - 1, *finish);
                }
            }
            Op::Close { pick, finish } => {
                if !self.open.is_empty() {
                    self.close(pick % self.open.len(), *finish);
                }
            }
            Op::Truncate { pick, drop } => self.truncate(*pick, *drop),
            Op::Free { pick } => self.free(*pick),
            Op::Fork { pick } => self.fork(*pick),
            Op::Reorder { picks } => self.reorder(picks),
            Op::Publish { pick, letters } => self.publish(*pick, letters),
            Op::Start { letters } => self.start(letters),
            Op::Unpublish => self.unpublish(),
        }
        self.check();
    }

    /// Whether a step was opened.
    pub(super) fn plan(&mut self, picks: &[(usize, usize, usize)]) -> bool {
        let mut batch: Vec<(usize, usize, usize)> = Vec::new();
        for &(pick, count, hold) in picks {
            if self.models.is_empty() {
                return false;
            }
            let index = pick % self.models.len();
            let model = &self.models[index];
            if !model.open && batch.iter().all(|(other, ..)| *other != index) {
                batch.push((index, count, hold.min(count)));
            }
        }
        if batch.is_empty() {
            return false;
        }
        let before = state(&self.tables);
        let available = self.available();
        let (pages, slots) = self.needs_of(&batch);

        match self.plan_batch(&batch) {
            Ok(plan) => {
                assert!(pages <= available.0 && slots <= available.1);
                self.make_room(pages, slots);
                assert_eq!(self.tables.pages.available(), available.0 - pages);
                assert_eq!(self.tables.slots.available(), available.1 - slots);
                self.append(&batch, plan);
                true
            }
            Err(error) => {
                assert_eq!(error.kind(), TableErrorKind::Capacity);
                assert!(pages > available.0 || slots > available.1, "refused a step that fits: {error}");
                assert_eq!(state(&self.tables), before);
                let TableError::Capacity { lacking, .. } = error else { unreachable!() };
                batch
                    .retain(|(index, ..)| lacking.iter().all(|lack| lack.sequence != self.models[*index].id));
                if !batch.is_empty() {
                    let (pages, slots) = self.needs_of(&batch);
                    let plan = self.plan_batch(&batch).expect("the step fits without those listed");
                    self.tables.abandon(plan.id).unwrap();
                    if !self.make_room(pages, slots) {
                        assert_eq!(state(&self.tables), before);
                    }
                }
                false
            }
        }
    }

    /// Pages and slots that a step takes.
    fn needs_of(&self, batch: &[(usize, usize, usize)]) -> (usize, usize) {
        batch
            .iter()
            .map(|&(index, count, hold)| {
                needs(&self.rule, &self.models[index], count, hold, self.shares_its_tail(index))
            })
            .fold((0, 0), |sum, need| (sum.0 + need.0, sum.1 + need.1))
    }

    fn plan_batch(&mut self, batch: &[(usize, usize, usize)]) -> Result<Arc<StepPlan>, TableError> {
        let ids: Vec<SequenceId> = batch.iter().map(|(index, ..)| self.models[*index].id).collect();
        let counts: Vec<usize> = batch.iter().map(|(_, count, _)| *count).collect();
        let hold: Vec<usize> = batch.iter().map(|(.., hold)| *hold).collect();
        self.tables.plan_step(&ids, &counts, &hold)
    }

    /// Carries the plan out, as a backend does in each layer.
    fn append(&mut self, batch: &[(usize, usize, usize)], plan: Arc<StepPlan>) {
        let values: Vec<u64> = (0..plan.tokens as u64).map(|row| self.next_value + row).collect();
        self.next_value += plan.tokens as u64;
        for (sequence, &(index, _, hold)) in plan.sequences.iter().zip(batch) {
            assert_eq!(self.read(&sequence.before), self.models[index].values(), "read before the append");
            self.models[index].open = true;
            self.models[index].largest_hold = self.models[index].largest_hold.max(hold);
        }
        for sequence in &plan.sequences {
            if let Some(copy) = sequence.copy {
                self.slots[copy.to] = self.slots[copy.from].clone();
            }
            for write in &sequence.writes {
                let rows = &values[write.row..write.row + write.count];
                self.slots[write.slot][write.offset..write.offset + write.count].copy_from_slice(rows);
            }
            for seal in &sequence.seals {
                let tile = match seal.source {
                    SealSource::Slot(slot) => self.slots[slot].clone(),
                    SealSource::Rows(row) => values[row..row + self.rule.group()].to_vec(),
                    SealSource::SharedSlot { slot, stored, row } => {
                        let rows = &values[row..row + self.rule.group() - stored];
                        [&self.slots[slot][..stored], rows].concat()
                    }
                };
                assert!(!tile.contains(&GARBAGE), "a tile is sealed whole");
                self.pages[seal.page] = tile.iter().map(|value| value | LOSSY).collect();
            }
        }
        for (sequence, &(index, count, hold)) in plan.sequences.iter().zip(batch) {
            let mut model = self.models[index].clone();
            model.extend(&values[sequence.first_row..sequence.first_row + count], hold, &self.rule);
            assert_eq!(self.read(&sequence.after), model.values(), "read after the append");
        }
        let copy = deep_copy(&plan);
        self.open.push(OpenStep { plan, copy, values });
    }

    pub(super) fn close(&mut self, index: usize, finish: bool) {
        let step = self.open.remove(index);
        assert_eq!(*step.plan, step.copy, "a plan never changes");
        if finish {
            self.tables.finish(step.plan.id).unwrap();
        } else {
            self.tables.abandon(step.plan.id).unwrap();
        }
        for sequence in &step.plan.sequences {
            let rule = self.rule;
            let model = self.models.iter_mut().find(|model| model.id == sequence.id).unwrap();
            model.open = false;
            if finish {
                let rows = sequence.first_row..sequence.first_row + sequence.count;
                model.extend(&step.values[rows], sequence.hold, &rule);
            }
            let expected = if finish { &sequence.after } else { &sequence.before };
            assert_eq!(self.tables.view(sequence.id).unwrap(), expected);
        }
    }

    /// Whether another sequence, as it is or as an open step makes it, or a published tile has the slot of this one's last
    /// tile.
    fn shares_its_tail(&self, index: usize) -> bool {
        let id = self.models[index].id;
        let Some(&slot) = self.tables.view(id).unwrap().slot_table.last() else { return false };
        let planned = self.open.iter().flat_map(|step| &step.plan.sequences);
        let others = self.models.iter().filter(|model| model.id != id);
        let mut views = others
            .map(|model| self.tables.view(model.id).unwrap())
            .chain(planned.filter(|plan| plan.id != id).map(|plan| &plan.after));
        let mut published = self.published.values().filter_map(|tile| tile.slot);
        slot >= 0
            && (views.any(|view| view.slot_table.contains(&slot)) || published.any(|id| id as i32 == slot))
    }

    fn fork(&mut self, pick: usize) {
        if self.models.is_empty() {
            return;
        }
        let index = pick % self.models.len();
        let before = state(&self.tables);
        let result = self.tables.fork(self.models[index].id);
        if self.models[index].open {
            assert!(matches!(result, Err(TableError::SequenceInStep { .. })));
            assert_eq!(state(&self.tables), before);
            return;
        }
        let id = result.unwrap();
        assert!(self.models.iter().all(|model| model.id != id));
        self.models.push(Model { id, ..self.models[index].clone() });
    }

    fn reorder(&mut self, picks: &[(usize, usize)]) {
        let free: Vec<usize> = (0..self.models.len()).filter(|&index| !self.models[index].open).collect();
        let mut chosen: Vec<usize> = Vec::new();
        for (pick, _) in picks {
            let index = free.get(pick % free.len().max(1)).copied();
            chosen.extend(index.filter(|index| !chosen.contains(index)));
        }
        let order: Vec<usize> =
            picks.iter().take(chosen.len()).map(|(_, from)| from % chosen.len().max(1)).collect();
        let ids: Vec<SequenceId> = chosen.iter().map(|&index| self.models[index].id).collect();
        self.tables.reorder(&ids, &order).unwrap();
        let old: Vec<Model> = chosen.iter().map(|&index| self.models[index].clone()).collect();
        for (&index, &from) in chosen.iter().zip(&order) {
            self.models[index] = Model { id: self.models[index].id, ..old[from].clone() };
        }
    }

    fn truncate(&mut self, pick: usize, drop: usize) {
        if self.models.is_empty() {
            return;
        }
        let (index, group) = (pick % self.models.len(), self.rule.group());
        let model = self.models[index].clone();
        let keep = model.tokens.len().saturating_sub(drop);
        let (before, unsealed) = (state(&self.tables), self.tables.stats().unsealed);
        let cut = model.unsealed_by(keep, &self.rule);
        if model.open {
            let result = self.tables.plan_truncation(model.id, keep);
            assert!(matches!(result, Err(TableError::SequenceInStep { .. })));
            assert_eq!(state(&self.tables), before);
            return;
        }
        if cut.is_some() && self.available().1 == 0 {
            let error = self.tables.plan_truncation(model.id, keep).unwrap_err();
            assert_eq!(error.kind(), TableErrorKind::Capacity);
            assert!(matches!(error, TableError::TruncateWithoutSlot { .. }), "{error}");
            assert_eq!((state(&self.tables), self.tables.stats().unsealed), (before, unsealed));
            return;
        }

        let references = self.references().1;
        self.make_room(0, usize::from(cut.is_some()));
        let snapshot = self.tables.view(model.id).unwrap().clone();
        let copy = deep_copy_view(&snapshot);
        let truncation = self.tables.plan_truncation(model.id, keep).unwrap();
        assert_eq!(truncation.before(), &snapshot);
        assert_eq!(truncation.unseal().map(|unseal| unseal.tile), cut);
        if let Some(Unseal { tile, page, slot, tokens }) = truncation.unseal() {
            assert_eq!((page as i32, tokens), (snapshot.block_table[tile], keep - tile * group));
            assert_eq!(references[slot], 0, "slot {slot} is in use");
            let record = &self.pages[page];
            assert!(!record.contains(&GARBAGE), "page {page} holds nothing");
            self.slots[slot].fill(GARBAGE);
            self.slots[slot][..tokens].copy_from_slice(&record[..tokens]);
        }
        truncation.commit();
        self.models[index].truncate(keep, &self.rule);
        assert_eq!(self.tables.stats().unsealed, unsealed + u64::from(cut.is_some()));
        assert_eq!(snapshot, copy, "a snapshot never changes");
    }

    pub(super) fn free(&mut self, pick: usize) {
        if self.models.is_empty() {
            return;
        }
        let index = pick % self.models.len();
        let before = state(&self.tables);
        let used = self.last_published(index);
        let result = self.tables.free(self.models[index].id);
        if self.models[index].open {
            assert!(matches!(result, Err(TableError::SequenceInStep { .. })));
            assert_eq!(state(&self.tables), before);
        } else {
            result.unwrap();
            let id = self.models.remove(index).id;
            assert_eq!(self.tables.view(id), Err(TableError::FreedSequence { sequence: id }));
            self.use_way(&used);
        }
    }
}
