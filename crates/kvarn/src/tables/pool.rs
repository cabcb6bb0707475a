//! The tables of one pool: sequences, and the pages and slots they refer to.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ids::Ids;
use super::prefix::Prefixes;
use super::rule::MAX_TOKENS;
use super::{
    HostImage, SealRule, SequenceId, SequenceView, Stats, StepId, StepPlan, TableError, Usage, handle,
};

/// The tables of one pool.
///
/// Each entry of a sequence's tables is one reference to its page or slot; an open step holds one
/// reference to each page and slot that it adds, a published tile one to its page and to its sink slot. Every call either does all it says or changes
/// nothing.
#[derive(Debug)]
pub struct Tables {
    pub(super) pool: u64,
    pub(super) rule: SealRule,
    pub(super) pages: Ids,
    pub(super) slots: Ids,
    pub(super) sequences: BTreeMap<u64, Sequence>,
    pub(super) open_steps: BTreeMap<u64, Arc<StepPlan>>,
    pub(super) next_sequence: u64,
    pub(super) next_step: u64,
    pub(super) prefixes: Prefixes,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sequence {
    pub(super) view: SequenceView,
    pub(super) step: Option<StepId>,
    /// Where its bytes are, if they are not in the pool.
    pub(super) offloaded: Option<HostImage>,
}

impl Tables {
    /// Tables of an empty pool with this many pages and slots. Memory is used for what is in use
    /// only.
    pub fn new(rule: SealRule, pages: usize, slots: usize) -> Result<Self, TableError> {
        if pages > MAX_TOKENS {
            return Err(TableError::TooManyPages { pages });
        }
        if slots > MAX_TOKENS {
            return Err(TableError::TooManySlots { slots });
        }
        Ok(Self {
            pool: handle::next_pool(),
            rule,
            pages: Ids::new(pages),
            slots: Ids::new(slots),
            sequences: BTreeMap::new(),
            open_steps: BTreeMap::new(),
            next_sequence: 0,
            next_step: 0,
            prefixes: Prefixes::default(),
        })
    }

    /// The rule by which tiles are sealed.
    pub fn rule(&self) -> &SealRule {
        &self.rule
    }

    /// A new, empty sequence. It takes no page and no slot until its first step.
    pub fn create(&mut self) -> SequenceId {
        let id = SequenceId { pool: self.pool, serial: self.next_sequence };
        self.next_sequence += 1;
        self.sequences.insert(id.serial, Sequence::default());
        id
    }

    /// What is stored of the sequence. While it is in an open step this is what was stored before.
    pub fn view(&self, id: SequenceId) -> Result<&SequenceView, TableError> {
        self.sequence(id).map(|sequence| &sequence.view)
    }

    /// Keeps the first `keep` tokens of a sequence and drops the rest, exactly: only tokens in
    /// slots can be dropped.
    ///
    /// The kept tokens that were committed stay so: `committed = min(committed, keep)`. Slots
    /// without a kept token are released; a tile kept in part keeps its slot, and the next step
    /// writes over what was dropped. With `sink_tokens = group`, tile 0 can be cut while no later
    /// tile is sealed. Refused below the sealed boundary, beyond the length, and in an open step.
    pub fn truncate(&mut self, id: SequenceId, keep: usize) -> Result<(), TableError> {
        let view = &self.idle(id)?.view;
        if keep > view.length {
            return Err(TableError::TruncateBeyondLength { sequence: id, keep, length: view.length });
        }
        let boundary = view.sealed * self.rule.group();
        if keep < boundary {
            return Err(TableError::TruncateBelowSealed { sequence: id, keep, boundary });
        }

        let tiles = self.rule.tiles(keep);
        let mut after = view.clone();
        after.length = keep;
        after.committed = view.committed.min(keep);
        if tiles < view.slot_table.len() {
            Arc::make_mut(&mut after.block_table).truncate(tiles);
            Arc::make_mut(&mut after.slot_table).truncate(tiles);
        }
        self.replace_view(id, after);
        Ok(())
    }

    /// A new sequence that holds what `id` holds, held tokens included, in the same pages and slots. Refused in an open
    /// step.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId, TableError> {
        let view = self.idle(id)?.view.clone();
        let fork = self.create();
        self.retain(&view);
        self.existing(fork).view = view;
        Ok(fork)
    }

    /// Makes each `sequences[i]` hold what `sequences[order[i]]` held, as if by forks; what none of them holds any more is
    /// given back. Refused where one is in an open step, or named twice.
    pub fn reorder(&mut self, sequences: &[SequenceId], order: &[usize]) -> Result<(), TableError> {
        if order.len() != sequences.len() {
            return Err(TableError::OrderLength { order: order.len(), sequences: sequences.len() });
        }
        let mut seen = BTreeMap::new();
        for (index, &sequence) in sequences.iter().enumerate() {
            self.idle(sequence)?;
            if let Some(first) = seen.insert(sequence, index) {
                return Err(TableError::DuplicateSequence { sequence, first, second: index });
            }
        }
        if let Some(index) = order.iter().position(|&from| from >= sequences.len()) {
            return Err(TableError::OrderIndex { index, from: order[index], sequences: sequences.len() });
        }
        // All are retained before any is released: nothing that is kept is ever free.
        let views: Vec<SequenceView> =
            order.iter().map(|&from| self.existing(sequences[from]).view.clone()).collect();
        for view in &views {
            self.retain(view);
        }
        for (&sequence, view) in sequences.iter().zip(views) {
            let before = std::mem::replace(&mut self.existing(sequence).view, view);
            let nothing = Arc::default();
            release_missing(&mut self.pages, &before.block_table, &nothing);
            release_missing(&mut self.slots, &before.slot_table, &nothing);
        }
        Ok(())
    }

    /// Forgets a sequence and gives back its pages and slots. Refused in an open step.
    pub fn free(&mut self, id: SequenceId) -> Result<(), TableError> {
        let sequence = self.sequence(id)?;
        let (view, offloaded) = (sequence.view.clone(), sequence.offloaded.is_some());
        if !offloaded {
            self.idle(id)?;
        }
        self.note_use(&view);
        self.replace_view(id, SequenceView::default());
        self.sequences.remove(&id.serial);
        Ok(())
    }

    /// How full the pool is.
    pub fn stats(&self) -> Stats {
        let usage = |ids: &Ids| Usage {
            total: ids.total(),
            used: ids.total() - ids.available(),
            free: ids.available(),
            published: ids.published(),
            cached: ids.cached(),
        };
        Stats {
            pages: usage(&self.pages),
            slots: usage(&self.slots),
            sequences: self.sequences.len(),
            tokens: self.sequences.values().map(|sequence| sequence.view.length).sum(),
            open_steps: self.open_steps.len(),
            prefixes: self.prefixes.counts(),
        }
    }

    /// The sequence, in the pool and outside open steps.
    pub(super) fn idle(&self, id: SequenceId) -> Result<&Sequence, TableError> {
        let sequence = self.sequence(id)?;
        match sequence.step {
            Some(step) => Err(TableError::SequenceInStep { sequence: id, step }),
            None if sequence.offloaded.is_some() => Err(TableError::OffloadedSequence { sequence: id }),
            None => Ok(sequence),
        }
    }

    /// The sequence, which the caller knows to exist.
    pub(super) fn existing(&mut self, id: SequenceId) -> &mut Sequence {
        self.sequences.get_mut(&id.serial).expect("a checked sequence, or one of an open step, exists")
    }

    /// Makes `after` what is stored; what only the old tables refer to is released. References that
    /// `after` adds are already counted.
    pub(super) fn replace_view(&mut self, id: SequenceId, after: SequenceView) {
        let sequence = self.existing(id);
        let before = std::mem::replace(&mut sequence.view, after);
        let after = sequence.view.clone();
        release_missing(&mut self.pages, &before.block_table, &after.block_table);
        release_missing(&mut self.slots, &before.slot_table, &after.slot_table);
    }

    /// Counts the references of one more sequence with these tables.
    pub(super) fn retain(&mut self, view: &SequenceView) {
        for (ids, table) in [(&mut self.pages, &view.block_table), (&mut self.slots, &view.slot_table)] {
            for &id in table.iter().filter(|&&id| id >= 0) {
                ids.retain(id as usize);
            }
        }
    }

    pub(super) fn sequence(&self, id: SequenceId) -> Result<&Sequence, TableError> {
        if id.pool != self.pool {
            return Err(TableError::ForeignSequence { sequence: id });
        }
        self.sequences.get(&id.serial).ok_or(TableError::FreedSequence { sequence: id })
    }
}

/// Releases the entries of `from` that `to` does not have at the same tile.
pub(super) fn release_missing(ids: &mut Ids, from: &Arc<Vec<i32>>, to: &Arc<Vec<i32>>) {
    if Arc::ptr_eq(from, to) {
        return;
    }
    for (tile, &id) in from.iter().enumerate() {
        if id >= 0 && to.get(tile) != Some(&id) {
            ids.release(id as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::PrefixCounts;

    const GROUP: usize = 8;

    fn tables(sink_tokens: usize) -> Tables {
        Tables::new(SealRule::new(GROUP, sink_tokens, 0).unwrap(), 8, 8).unwrap()
    }

    fn append(tables: &mut Tables, id: SequenceId, count: usize) {
        let plan = tables.plan_step(&[id], &[count], &[0]).unwrap();
        tables.finish(plan.id).unwrap();
    }

    #[test]
    fn a_freed_handle_is_never_a_newer_sequence() {
        let mut tables = tables(0);
        let old = tables.create();
        tables.free(old).unwrap();
        let new = tables.create();
        assert_ne!(old, new);
        let error = TableError::FreedSequence { sequence: old };
        assert_eq!(tables.view(old).unwrap_err(), error);
        assert_eq!(tables.free(old).unwrap_err(), error);
        assert_eq!(tables.truncate(old, 0).unwrap_err(), error);
        assert_eq!(tables.plan_step(&[old], &[1], &[0]).unwrap_err(), error);
        assert_eq!(tables.view(new).unwrap().length, 0);
    }

    #[test]
    fn a_handle_of_another_pool_is_foreign() {
        let (mut ours, mut theirs) = (tables(0), tables(0));
        let (id, _) = (ours.create(), theirs.create());
        let error = TableError::ForeignSequence { sequence: id };
        assert_eq!(theirs.view(id).unwrap_err(), error);
        assert_eq!(theirs.free(id).unwrap_err(), error);
        assert_eq!(theirs.truncate(id, 0).unwrap_err(), error);
        assert_eq!(theirs.plan_step(&[id], &[1], &[0]).unwrap_err(), error);
    }

    #[test]
    fn truncation_releases_whole_slots_and_keeps_the_cut_one() {
        let mut tables = Tables::new(SealRule::new(GROUP, 0, 4 * GROUP).unwrap(), 8, 8).unwrap();
        let id = tables.create();
        append(&mut tables, id, 3 * GROUP + 1);
        let snapshot = tables.view(id).unwrap().clone();
        for (keep, slots) in [(25, 4), (24, 3), (17, 3), (16, 2), (1, 1), (0, 0)] {
            tables.truncate(id, keep).unwrap();
            let view = tables.view(id).unwrap();
            assert_eq!((view.length, view.committed, view.slot_table.len()), (keep, keep, slots));
            assert_eq!(tables.stats().slots.used, slots);
        }
        assert_eq!(*snapshot.slot_table, [0, 1, 2, 3], "a snapshot never changes");
    }

    #[test]
    fn truncation_keeps_what_was_committed() {
        let mut tables = tables(0);
        let id = tables.create();
        let plan = tables.plan_step(&[id], &[7], &[3]).unwrap();
        tables.finish(plan.id).unwrap();
        for (keep, committed) in [(6, 4), (4, 4), (3, 3)] {
            tables.truncate(id, keep).unwrap();
            assert_eq!(tables.view(id).unwrap().committed, committed);
        }
    }

    #[test]
    fn truncation_below_the_sealed_boundary_or_beyond_the_length_changes_nothing() {
        for sink_tokens in [0, 3, GROUP] {
            let mut tables = tables(sink_tokens);
            let id = tables.create();
            append(&mut tables, id, 2 * GROUP + 3);
            let before = tables.view(id).unwrap().clone();
            assert_eq!(
                tables.truncate(id, 15).unwrap_err().to_string(),
                "15 tokens of sequence 0: expected at least 16, its sealed boundary; \
                 keep more, or hold back tokens that may be rejected"
            );
            assert_eq!(
                tables.truncate(id, 20).unwrap_err().to_string(),
                "20 tokens of sequence 0: expected at most its length, 19; append tokens with a step"
            );
            assert!(tables.truncate(id, usize::MAX).is_err());
            assert_eq!(tables.view(id).unwrap(), &before);
            tables.truncate(id, 16).unwrap();
            assert_eq!(tables.view(id).unwrap().sealed, 2);
        }
    }

    #[test]
    fn a_whole_sink_tile_can_be_cut_while_no_later_tile_is_sealed() {
        let mut tables = tables(GROUP);
        let id = tables.create();
        append(&mut tables, id, 2 * GROUP - 1);
        tables.truncate(id, 3).unwrap();
        append(&mut tables, id, 2);
        let view = tables.view(id).unwrap();
        assert_eq!((view.length, &*view.slot_table), (5, &vec![0]));
    }

    #[test]
    fn stats_add_up() {
        let mut tables = tables(GROUP);
        let (a, b) = (tables.create(), tables.create());
        append(&mut tables, a, 3 * GROUP);
        tables.plan_step(&[b], &[5], &[0]).unwrap();
        assert_eq!(
            tables.stats(),
            Stats {
                pages: Usage { total: 8, used: 2, free: 6, published: 0, cached: 0 },
                slots: Usage { total: 8, used: 2, free: 6, published: 0, cached: 0 },
                sequences: 2,
                tokens: 24,
                open_steps: 1,
                prefixes: PrefixCounts::default(),
            }
        );
    }

    #[test]
    fn pools_beyond_int32_are_refused() {
        let rule = SealRule::new(GROUP, 0, 0).unwrap();
        assert!(Tables::new(rule, MAX_TOKENS, MAX_TOKENS).is_ok());
        assert_eq!(
            Tables::new(rule, usize::MAX, 0).unwrap_err().to_string(),
            "18446744073709551615 pages: expected at most 2147483647, which an int32 table can name; \
             make the pool smaller"
        );
        assert!(matches!(Tables::new(rule, 0, MAX_TOKENS + 1), Err(TableError::TooManySlots { .. })));
    }
}
