//! Random operations against a plain model: each sequence is a list of tokens, each pool a small memory of token values
//! that carries out the plans as a backend would.

use std::sync::Arc;

use proptest::prelude::*;

use super::{
    Place, SealRule, SealSource, SequenceId, SequenceView, StepPlan, TableError, TableErrorKind,
    Tables,
};

/// What a freed or fresh piece of memory holds: reading it is a failure.
const GARBAGE: u64 = u64::MAX;

#[derive(Debug, Clone)]
struct Token {
    value: u64,
    sealed: bool,
}

#[derive(Debug, Clone)]
struct Model {
    id: SequenceId,
    tokens: Vec<Token>,
    committed: usize,
    largest_hold: usize,
    /// Whether it is in an open step.
    open: bool,
}

/// A step that is planned and appended, but not closed.
struct OpenStep {
    plan: Arc<StepPlan>,
    /// A deep copy, to see that the plan never changes.
    copy: StepPlan,
    values: Vec<u64>,
}

#[derive(Debug, Clone)]
enum Op {
    Create,
    Plan {
        picks: Vec<(usize, usize, usize)>,
        close: Option<bool>,
    },
    Close {
        pick: usize,
        finish: bool,
    },
    Truncate {
        pick: usize,
        drop: usize,
    },
    Free {
        pick: usize,
    },
}

struct World {
    rule: SealRule,
    tables: Tables,
    models: Vec<Model>,
    open: Vec<OpenStep>,
    slots: Vec<Vec<u64>>,
    pages: Vec<Vec<u64>>,
    next_value: u64,
}

/// Everything a call that fails, or a step taken back, must leave as it was.
fn state(tables: &Tables) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        tables.pages.clone(),
        tables.slots.clone(),
        tables.sequences.clone(),
        tables.open_steps.clone(),
    )
}

/// Pages and slots that a step of one sequence takes, tile by tile.
fn needs(rule: &SealRule, model: &Model, count: usize, hold: usize) -> (usize, usize) {
    let group = rule.group();
    let (start, end) = (model.tokens.len(), model.tokens.len() + count);
    let (mut pages, mut slots) = (0, 0);
    for tile in 0..end.div_ceil(group) {
        let was_sealed = model
            .tokens
            .get(tile * group)
            .is_some_and(|token| token.sealed);
        let due = end - hold >= (tile + 1) * group + rule.recent_tokens();
        let whole_sink = tile == 0 && rule.sink_tokens() == group;
        let seals = due && !was_sealed && !whole_sink;
        let new = start <= tile * group;
        let sink = tile == 0 && rule.sink_tokens() > 0;
        pages += usize::from(seals);
        slots += usize::from(new && (!seals || sink));
    }
    (pages, slots)
}

impl World {
    fn new(rule: SealRule, pages: usize, slots: usize) -> Self {
        let tile = vec![GARBAGE; rule.group()];
        Self {
            rule,
            tables: Tables::new(rule, pages, slots).unwrap(),
            models: Vec::new(),
            open: Vec::new(),
            slots: vec![tile.clone(); slots],
            pages: vec![tile; pages],
            next_value: 0,
        }
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Create => {
                let id = self.tables.create();
                assert!(self.models.iter().all(|model| model.id != id));
                self.models.push(Model {
                    id,
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
        }
        self.check();
    }

    /// Whether a step was opened.
    fn plan(&mut self, picks: &[(usize, usize, usize)]) -> bool {
        let mut batch: Vec<(usize, usize, usize)> = Vec::new();
        for &(pick, count, hold) in picks {
            if self.models.is_empty() {
                return false;
            }
            let index = pick % self.models.len();
            let model = &self.models[index];
            let nothing = count == 0 && model.committed == model.tokens.len();
            if !model.open && !nothing && batch.iter().all(|(other, ..)| *other != index) {
                batch.push((index, count, hold.min(count)));
            }
        }
        if batch.is_empty() {
            return false;
        }
        let before = state(&self.tables);
        let unused = (self.tables.pages.unused(), self.tables.slots.unused());
        let (pages, slots) = batch
            .iter()
            .map(|&(index, count, hold)| needs(&self.rule, &self.models[index], count, hold))
            .fold((0, 0), |sum, need| (sum.0 + need.0, sum.1 + need.1));

        match self.plan_batch(&batch) {
            Ok(plan) => {
                assert!(pages <= unused.0 && slots <= unused.1);
                assert_eq!(self.tables.pages.unused(), unused.0 - pages);
                assert_eq!(self.tables.slots.unused(), unused.1 - slots);
                self.append(&batch, plan);
                true
            }
            Err(error) => {
                assert_eq!(error.kind(), TableErrorKind::Capacity);
                assert!(
                    pages > unused.0 || slots > unused.1,
                    "refused a step that fits: {error}"
                );
                assert_eq!(state(&self.tables), before);
                let TableError::Capacity { lacking, .. } = error else {
                    unreachable!()
                };
                batch.retain(|(index, ..)| {
                    lacking
                        .iter()
                        .all(|lack| lack.sequence != self.models[*index].id)
                });
                if !batch.is_empty() {
                    let plan = self
                        .plan_batch(&batch)
                        .expect("the step fits without those listed");
                    self.tables.abandon(plan.id).unwrap();
                    assert_eq!(state(&self.tables), before);
                }
                false
            }
        }
    }

    fn plan_batch(&mut self, batch: &[(usize, usize, usize)]) -> Result<Arc<StepPlan>, TableError> {
        let ids: Vec<SequenceId> = batch
            .iter()
            .map(|(index, ..)| self.models[*index].id)
            .collect();
        let counts: Vec<usize> = batch.iter().map(|(_, count, _)| *count).collect();
        let hold: Vec<usize> = batch.iter().map(|(.., hold)| *hold).collect();
        self.tables.plan_step(&ids, &counts, &hold)
    }

    /// Carries the plan out, as a backend does in each layer.
    fn append(&mut self, batch: &[(usize, usize, usize)], plan: Arc<StepPlan>) {
        let values: Vec<u64> = (0..plan.tokens as u64)
            .map(|row| self.next_value + row)
            .collect();
        self.next_value += plan.tokens as u64;
        for (sequence, &(index, _, hold)) in plan.sequences.iter().zip(batch) {
            assert_eq!(
                self.read(&sequence.before),
                self.models[index].values(),
                "read before the append"
            );
            self.models[index].open = true;
            self.models[index].largest_hold = self.models[index].largest_hold.max(hold);
        }
        for sequence in &plan.sequences {
            for write in &sequence.writes {
                let rows = &values[write.row..write.row + write.count];
                self.slots[write.slot][write.offset..write.offset + write.count]
                    .copy_from_slice(rows);
            }
            for seal in &sequence.seals {
                self.pages[seal.page] = match seal.source {
                    SealSource::Slot(slot) => self.slots[slot].clone(),
                    SealSource::Rows(row) => values[row..row + self.rule.group()].to_vec(),
                };
            }
        }
        for (sequence, &(index, count, _)) in plan.sequences.iter().zip(batch) {
            let mut expected = self.models[index].values();
            expected.extend(&values[sequence.first_row..sequence.first_row + count]);
            assert_eq!(
                self.read(&sequence.after),
                expected,
                "read after the append"
            );
        }
        let copy = deep_copy(&plan);
        self.open.push(OpenStep { plan, copy, values });
    }

    fn close(&mut self, index: usize, finish: bool) {
        let step = self.open.remove(index);
        assert_eq!(*step.plan, step.copy, "a plan never changes");
        if finish {
            self.tables.finish(step.plan.id).unwrap();
        } else {
            self.tables.abandon(step.plan.id).unwrap();
        }
        for sequence in &step.plan.sequences {
            let rule = self.rule;
            let model = self
                .models
                .iter_mut()
                .find(|model| model.id == sequence.id)
                .unwrap();
            model.open = false;
            if finish {
                let rows = sequence.first_row..sequence.first_row + sequence.count;
                model
                    .tokens
                    .extend(step.values[rows].iter().map(|&value| Token {
                        value,
                        sealed: false,
                    }));
                model.committed = model.tokens.len() - sequence.hold;
                model.seal(&rule);
            }
            let expected = if finish {
                &sequence.after
            } else {
                &sequence.before
            };
            assert_eq!(self.tables.view(sequence.id).unwrap(), expected);
        }
    }

    fn truncate(&mut self, pick: usize, drop: usize) {
        if self.models.is_empty() {
            return;
        }
        let index = pick % self.models.len();
        let model = &mut self.models[index];
        let length = model.tokens.len();
        let keep = length.saturating_sub(drop);
        let boundary = model
            .tokens
            .iter()
            .rposition(|token| token.sealed)
            .map_or(0, |last| last + 1);
        let before = state(&self.tables);
        let view = self.tables.view(model.id).unwrap().clone();
        let result = self.tables.truncate(model.id, keep);
        if model.open {
            assert!(matches!(result, Err(TableError::SequenceInStep { .. })));
        } else if keep < boundary {
            assert_eq!(
                result,
                Err(TableError::TruncateBelowSealed {
                    sequence: model.id,
                    keep,
                    boundary
                })
            );
        } else {
            result.unwrap();
            model.tokens.truncate(keep);
            model.committed = model.committed.min(keep);
            assert_eq!(view.length, length, "a snapshot never changes");
            return;
        }
        assert_eq!(state(&self.tables), before);
    }

    fn free(&mut self, pick: usize) {
        if self.models.is_empty() {
            return;
        }
        let index = pick % self.models.len();
        let before = state(&self.tables);
        let result = self.tables.free(self.models[index].id);
        if self.models[index].open {
            assert!(matches!(result, Err(TableError::SequenceInStep { .. })));
            assert_eq!(state(&self.tables), before);
        } else {
            result.unwrap();
            let id = self.models.remove(index).id;
            assert_eq!(
                self.tables.view(id),
                Err(TableError::FreedSequence { sequence: id })
            );
        }
    }

    fn check(&mut self) {
        let mut page_references = vec![0; self.pages.len()];
        let mut slot_references = vec![0; self.slots.len()];
        let mut count = |views: &[&SequenceView]| {
            let tables = |pick: fn(&SequenceView) -> &Arc<Vec<i32>>| {
                views
                    .iter()
                    .map(|view| pick(view).to_vec())
                    .collect::<Vec<_>>()
            };
            held(&tables(|view| &view.block_table), &mut page_references);
            held(&tables(|view| &view.slot_table), &mut slot_references)
        };
        for model in &self.models {
            let view = self.tables.view(model.id).unwrap();
            let plan = self
                .open
                .iter()
                .flat_map(|step| &step.plan.sequences)
                .find(|plan| plan.id == model.id);
            assert_eq!(plan.is_some(), model.open);
            let slots = match plan {
                Some(plan) => count(&[view, &plan.after]),
                None => count(&[view]),
            };
            assert!(
                slots <= self.rule.slot_bound(model.largest_hold),
                "{slots} slots of {model:?}"
            );
        }
        for (id, &references) in page_references.iter().enumerate() {
            assert_eq!(self.tables.pages.references(id), references, "page {id}");
            assert!(references <= 1, "page {id} in use twice");
            if references == 0 {
                self.pages[id].fill(GARBAGE);
            }
        }
        for (id, &references) in slot_references.iter().enumerate() {
            assert_eq!(self.tables.slots.references(id), references, "slot {id}");
            assert!(references <= 1, "slot {id} in use twice");
            if references == 0 {
                self.slots[id].fill(GARBAGE);
            }
        }
        for model in &self.models {
            let view = self.tables.view(model.id).unwrap();
            assert_eq!(
                (view.length, view.committed),
                (model.tokens.len(), model.committed)
            );
            assert_eq!(self.read(view), model.values());
            for span in view.spans(&self.rule) {
                for position in span.position..span.position + span.count {
                    let from_page =
                        model.tokens[position].sealed && position >= self.rule.sink_tokens();
                    assert_eq!(
                        matches!(span.place, Place::Page(_)),
                        from_page,
                        "position {position}"
                    );
                }
            }
        }
        let stats = self.tables.stats();
        assert_eq!(
            stats.pages.used,
            page_references
                .iter()
                .filter(|&&references| references > 0)
                .count()
        );
        assert_eq!(
            stats.slots.used,
            slot_references
                .iter()
                .filter(|&&references| references > 0)
                .count()
        );
        assert_eq!(
            stats.tokens,
            self.models
                .iter()
                .map(|model| model.tokens.len())
                .sum::<usize>()
        );
    }

    /// The values of a sequence, by position.
    fn read(&self, view: &SequenceView) -> Vec<u64> {
        let mut values = Vec::new();
        for span in view.spans(&self.rule) {
            assert_eq!(span.position, values.len(), "each position once, in order");
            assert_eq!(span.offset, span.position % self.rule.group());
            let memory = match span.place {
                Place::Slot(slot) => &self.slots[slot],
                Place::Page(page) => &self.pages[page],
            };
            values.extend_from_slice(&memory[span.offset..span.offset + span.count]);
        }
        assert_eq!(values.len(), view.length);
        values
    }
}

/// Counts each id of a sequence once per tile, over the tables before and after its open step; returns how many.
fn held(tables: &[Vec<i32>], references: &mut [u32]) -> usize {
    let mut total = 0;
    for tile in 0..tables.iter().map(Vec::len).max().unwrap_or(0) {
        let mut ids: Vec<i32> = tables
            .iter()
            .filter_map(|table| table.get(tile).copied())
            .filter(|&id| id >= 0)
            .collect();
        ids.dedup();
        for id in ids {
            references[id as usize] += 1;
            total += 1;
        }
    }
    total
}

fn deep_copy(plan: &StepPlan) -> StepPlan {
    let mut copy = plan.clone();
    copy.first_rows = Arc::new(plan.first_rows.to_vec());
    for sequence in &mut copy.sequences {
        for view in [&mut sequence.before, &mut sequence.after] {
            view.block_table = Arc::new(view.block_table.to_vec());
            view.slot_table = Arc::new(view.slot_table.to_vec());
        }
    }
    copy
}

impl Model {
    fn values(&self) -> Vec<u64> {
        self.tokens.iter().map(|token| token.value).collect()
    }

    /// Seals what is due, tile by tile.
    fn seal(&mut self, rule: &SealRule) {
        let group = rule.group();
        for (tile, tokens) in self.tokens.chunks_mut(group).enumerate() {
            let due = self.committed >= (tile + 1) * group + rule.recent_tokens();
            if due && !(tile == 0 && rule.sink_tokens() == group) {
                for token in tokens {
                    token.sealed = true;
                }
            }
        }
    }
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let pick = 0..8_usize;
    let row = (
        pick.clone(),
        prop_oneof![3 => 0..3_usize, 2 => 0..40_usize],
        prop_oneof![2 => Just(0), 1 => 0..9_usize],
    );
    let op = prop_oneof![
        2 => Just(Op::Create),
        10 => (prop::collection::vec(row, 1..5), prop_oneof![
            6 => Just(Some(true)), 2 => Just(Some(false)), 1 => Just(None)
        ]).prop_map(|(picks, close)| Op::Plan { picks, close }),
        2 => (pick.clone(), any::<bool>()).prop_map(|(pick, finish)| Op::Close { pick, finish }),
        3 => (pick.clone(), 0..12_usize).prop_map(|(pick, drop)| Op::Truncate { pick, drop }),
        1 => pick.prop_map(|pick| Op::Free { pick }),
    ];
    prop::collection::vec(op, 1..60)
}

fn rules() -> impl Strategy<Value = SealRule> {
    prop::sample::select(vec![1_usize, 4, 8])
        .prop_flat_map(|group| {
            (
                Just(group),
                prop_oneof![Just(0), Just(group), 0..=group],
                prop_oneof![Just(0), 0..=4 * group],
            )
        })
        .prop_map(|(group, sink, recent)| SealRule::new(group, sink, recent).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_agree_with_the_model(
        rule in rules(),
        pages in 0..40_usize,
        slots in 0..40_usize,
        ops in ops(),
    ) {
        let mut world = World::new(rule, pages, slots);
        for op in &ops {
            world.run(op);
        }
        while !world.open.is_empty() {
            world.close(0, true);
            world.check();
        }
        while !world.models.is_empty() {
            world.free(0);
            world.check();
        }
        prop_assert_eq!((world.tables.stats().pages.used, world.tables.stats().slots.used), (0, 0));
    }

    #[test]
    fn abandon_restores_the_pool_bit_for_bit(
        rule in rules(),
        ops in ops(),
        picks in prop::collection::vec((0..8_usize, 1..40_usize, 0..9_usize), 1..5),
    ) {
        let mut world = World::new(rule, 400, 400);
        world.run(&Op::Create);
        for op in &ops {
            world.run(op);
        }
        let before = state(&world.tables);
        if world.plan(&picks) {
            prop_assert!(state(&world.tables) != before);
            world.close(world.open.len() - 1, false);
        }
        prop_assert_eq!(state(&world.tables), before);
    }
}
