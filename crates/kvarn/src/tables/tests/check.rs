//! What holds after every operation.

use std::sync::Arc;

use super::world::{GARBAGE, World};
use crate::tables::ids::Ids;
use crate::tables::{Place, SequenceView, StepPlan, Tables};

/// Everything a call that fails, or a step taken back, must leave as it was.
pub(super) fn state(tables: &Tables) -> impl PartialEq + std::fmt::Debug + use<> {
    let Tables { pages, slots, sequences, open_steps, prefixes, .. } = tables;
    (pages.clone(), slots.clone(), sequences.clone(), open_steps.clone(), prefixes.clone())
}

impl World {
    pub(super) fn check(&mut self) {
        let (mut page_references, mut slot_references) = self.references();
        self.check_published(&mut page_references, &mut slot_references);
        check_references(&self.tables.pages, &page_references, &mut self.pages);
        check_references(&self.tables.slots, &slot_references, &mut self.slots);
        for model in &self.models {
            let view = self.tables.view(model.id).unwrap();
            assert_eq!((view.length, view.committed), (model.tokens.len(), model.committed));
            assert_eq!(self.read(view), model.values());
            for span in view.spans(&self.rule) {
                for position in span.position..span.position + span.count {
                    let from_page = model.tokens[position].sealed && position >= self.rule.sink_tokens();
                    assert_eq!(matches!(span.place, Place::Page(_)), from_page, "position {position}");
                }
            }
        }
        let tokens: usize = self.models.iter().map(|model| model.tokens.len()).sum();
        let stats = self.tables.stats();
        assert_eq!((stats.tokens, stats.sequences), (tokens, self.models.len()));
        assert_eq!(stats.open_steps, self.open.len());
    }

    /// References of sequences and open steps to each page and each slot.
    pub(super) fn references(&self) -> (Vec<u32>, Vec<u32>) {
        let mut page_references = vec![0; self.pages.len()];
        let mut slot_references = vec![0; self.slots.len()];
        let mut count = |views: &[&SequenceView]| {
            let tables = |pick: fn(&SequenceView) -> &Arc<Vec<i32>>| {
                views.iter().map(|view| pick(view).to_vec()).collect::<Vec<_>>()
            };
            held(&tables(|view| &view.block_table), &mut page_references);
            held(&tables(|view| &view.slot_table), &mut slot_references)
        };
        for model in &self.models {
            let view = self.tables.view(model.id).unwrap();
            let plan =
                self.open.iter().flat_map(|step| &step.plan.sequences).find(|plan| plan.id == model.id);
            assert_eq!(plan.is_some(), model.open);
            let slots = match plan {
                Some(plan) => count(&[view, &plan.after]),
                None => count(&[view]),
            };
            assert!(slots <= self.rule.slot_bound(model.largest_hold), "{slots} slots of {model:?}");
        }
        (page_references, slot_references)
    }

    /// The values of a sequence, by position.
    pub(super) fn read(&self, view: &SequenceView) -> Vec<u64> {
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

/// Each id has the references that the tables account for. What is free is wiped.
fn check_references(ids: &Ids, references: &[u32], memory: &mut [Vec<u64>]) {
    for (id, &expected) in references.iter().enumerate() {
        assert_eq!(ids.references(id), expected, "references of id {id}");
        if expected == 0 {
            memory[id].fill(GARBAGE);
        }
    }
    let used = references.iter().filter(|&&count| count > 0).count();
    assert_eq!((ids.used(), ids.unused()), (used, references.len() - used));
}

/// Counts each id of a sequence once per tile, over the tables before and after its open step;
/// returns how many.
fn held(tables: &[Vec<i32>], references: &mut [u32]) -> usize {
    let mut total = 0;
    for tile in 0..tables.iter().map(Vec::len).max().unwrap_or(0) {
        let mut ids: Vec<i32> =
            tables.iter().filter_map(|table| table.get(tile).copied()).filter(|&id| id >= 0).collect();
        ids.dedup();
        for id in ids {
            references[id as usize] += 1;
            total += 1;
        }
    }
    total
}

/// A plan that shares no table with the one given.
pub(super) fn deep_copy(plan: &StepPlan) -> StepPlan {
    let mut copy = plan.clone();
    copy.first_rows = Arc::new(plan.first_rows.to_vec());
    for sequence in &mut copy.sequences {
        sequence.before = deep_copy_view(&sequence.before);
        sequence.after = deep_copy_view(&sequence.after);
    }
    copy
}

/// A view that shares no table with the one given.
pub(super) fn deep_copy_view(view: &SequenceView) -> SequenceView {
    SequenceView {
        block_table: Arc::new(view.block_table.to_vec()),
        slot_table: Arc::new(view.slot_table.to_vec()),
        ..view.clone()
    }
}
