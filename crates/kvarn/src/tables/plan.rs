//! Planning a step, and closing it. All pages and slots are allocated here, and all writes are
//! decided here.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ids::Ids;
use super::pool::release_missing;
use super::rule::MAX_TOKENS;
use super::{
    Lack, Seal, SealRule, SealSource, SequenceId, SequencePlan, SequenceView, SlotCopy, SlotWrite, StepId,
    StepPlan, TableError, Tables,
};

impl Tables {
    /// Plans a step that appends `counts[i]` tokens to `sequences[i]` and keeps the newest
    /// `hold[i]` of them uncommitted; what was held before is committed. Pages and slots are
    /// reserved for all of it, or nothing changes. Where too few are free, published tiles that nobody
    /// holds are given up; [`abandon`](Self::abandon) does not bring them back.
    ///
    /// A count may be 0: such a sequence only commits what it held, if anything. The sequences stay as they
    /// are until [`finish`](Self::finish), and no other call changes them until then. A dropped
    /// plan is still an open step: finish or abandon it.
    pub fn plan_step(
        &mut self,
        sequences: &[SequenceId],
        counts: &[usize],
        hold: &[usize],
    ) -> Result<Arc<StepPlan>, TableError> {
        let demands = self.check_batch(sequences, counts, hold)?;
        self.check_capacity(sequences, &demands)?;
        let total = |needed: fn(&Demand) -> usize| demands.iter().map(needed).sum();
        self.make_room(total(|demand| demand.pages), total(|demand| demand.slots));

        let id = StepId { pool: self.pool, serial: self.next_step };
        self.next_step += 1;
        let mut first_row = 0;
        let mut first_rows = vec![0];
        let mut plans = Vec::with_capacity(sequences.len());
        for (index, &sequence) in sequences.iter().enumerate() {
            let state = self.existing(sequence);
            state.step = Some(id);
            let before = state.view.clone();
            let Parts { after, copy, writes, seals } =
                demands[index].allocate(&self.rule, &before, first_row, &mut self.pages, &mut self.slots);
            let (count, hold) = (counts[index], hold[index]);
            plans.push(SequencePlan {
                id: sequence,
                count,
                hold,
                first_row,
                before,
                after,
                copy,
                writes,
                seals,
            });
            first_row += count;
            first_rows.push(first_row as i32);
        }
        let plan =
            Arc::new(StepPlan { id, tokens: first_row, sequences: plans, first_rows: Arc::new(first_rows) });
        self.open_steps.insert(id.serial, Arc::clone(&plan));
        Ok(plan)
    }

    /// Whether a step was planned here and is neither finished nor abandoned.
    pub fn is_open(&self, step: StepId) -> bool {
        step.pool == self.pool && self.open_steps.contains_key(&step.serial)
    }

    /// Makes what a step planned the state of its sequences, and releases the slots of the tiles it
    /// sealed.
    pub fn finish(&mut self, step: StepId) -> Result<(), TableError> {
        let plan = self.close(step)?;
        for sequence in &plan.sequences {
            self.replace_view(sequence.id, sequence.after.clone());
        }
        Ok(())
    }

    /// Takes a step back: its sequences are as before, the pages and slots it reserved are free
    /// again.
    ///
    /// Layers already appended may have written behind the stored tokens of a slot; nothing reads
    /// that.
    pub fn abandon(&mut self, step: StepId) -> Result<(), TableError> {
        let plan = self.close(step)?;
        for SequencePlan { before, after, .. } in &plan.sequences {
            release_missing(&mut self.pages, &after.block_table, &before.block_table);
            release_missing(&mut self.slots, &after.slot_table, &before.slot_table);
        }
        Ok(())
    }

    fn close(&mut self, step: StepId) -> Result<Arc<StepPlan>, TableError> {
        if step.pool != self.pool {
            return Err(TableError::ForeignStep { step });
        }
        let plan = self.open_steps.remove(&step.serial).ok_or(TableError::ClosedStep { step })?;
        for sequence in &plan.sequences {
            self.existing(sequence.id).step = None;
        }
        Ok(plan)
    }

    fn check_batch(
        &self,
        sequences: &[SequenceId],
        counts: &[usize],
        hold: &[usize],
    ) -> Result<Vec<Demand>, TableError> {
        if sequences.len() != counts.len() || sequences.len() != hold.len() {
            return Err(TableError::BatchLengths {
                sequences: sequences.len(),
                counts: counts.len(),
                hold: hold.len(),
            });
        }
        if sequences.is_empty() {
            return Err(TableError::NoSequences);
        }
        let mut seen = BTreeMap::new();
        let mut rows: usize = 0;
        let mut demands = Vec::with_capacity(sequences.len());
        for (index, (&sequence, (&count, &hold))) in sequences.iter().zip(counts.iter().zip(hold)).enumerate()
        {
            let view = &self.idle(sequence)?.view;
            if let Some(first) = seen.insert(sequence, index) {
                return Err(TableError::DuplicateSequence { sequence, first, second: index });
            }
            if hold > count {
                return Err(TableError::HoldExceedsCount { sequence, hold, count });
            }
            if count > MAX_TOKENS - view.length {
                return Err(TableError::SequenceTooLong { sequence, length: view.length, count });
            }
            // Both sides are at most MAX_TOKENS, so the sum cannot overflow.
            rows += count;
            if rows > MAX_TOKENS {
                return Err(TableError::StepTooLong);
            }
            demands.push(Demand::new(&self.rule, view, &self.slots, count, hold));
        }
        Ok(demands)
    }

    fn check_capacity(&self, sequences: &[SequenceId], demands: &[Demand]) -> Result<(), TableError> {
        let (mut pages_free, mut slots_free) = (self.pages.available(), self.slots.available());
        let mut lacking = Vec::new();
        for (index, (&sequence, demand)) in sequences.iter().zip(demands).enumerate() {
            let (pages_needed, slots_needed) = (demand.pages, demand.slots);
            if pages_needed > pages_free || slots_needed > slots_free {
                lacking.push(Lack { sequence, index, pages_needed, pages_free, slots_needed, slots_free });
            } else {
                pages_free -= pages_needed;
                slots_free -= slots_needed;
            }
        }
        if lacking.is_empty() {
            return Ok(());
        }
        Err(TableError::Capacity { lacking, pages: self.pages.total(), slots: self.slots.total() })
    }
}

/// Where a step takes one sequence and what it needs for that, known before anything is allocated.
struct Demand {
    length: usize,
    committed: usize,
    sealed: usize,
    pages: usize,
    slots: usize,
    /// The tile whose slot is not full, is shared, and gets tokens.
    shared: Option<usize>,
}

struct Parts {
    after: SequenceView,
    copy: Option<SlotCopy>,
    writes: Vec<SlotWrite>,
    seals: Vec<Seal>,
}

impl Demand {
    fn new(rule: &SealRule, before: &SequenceView, slots: &Ids, count: usize, hold: usize) -> Self {
        let length = before.length + count;
        let committed = length - hold;
        // After a truncation more tiles may be sealed than are due: they stay so.
        let sealed = rule.sealed_tiles(committed).max(before.sealed);

        // A new tile gets a slot unless this step seals it; a sink gets one in any case.
        let (old_tiles, tiles) = (rule.tiles(before.length), rule.tiles(length));
        let tail = tiles.saturating_sub(old_tiles.max(sealed));
        let sealed_sink = old_tiles == 0 && sealed > 0 && rule.keeps_slot(0);
        let open = before.length / rule.group();
        let shared = (count > 0 && !before.length.is_multiple_of(rule.group()))
            .then_some(open)
            .filter(|&tile| slots.is_shared(before.slot_table[tile] as usize));
        let copied = shared.is_some_and(|tile| tile >= sealed || rule.keeps_slot(tile));
        Self {
            length,
            committed,
            sealed,
            pages: rule.pages(sealed) - rule.pages(before.sealed),
            slots: tail + usize::from(sealed_sink) + usize::from(copied),
            shared,
        }
    }

    fn allocate(
        &self,
        rule: &SealRule,
        before: &SequenceView,
        first_row: usize,
        pages: &mut Ids,
        slots: &mut Ids,
    ) -> Parts {
        let tiles = rule.tiles(self.length);
        let mut after = SequenceView {
            length: self.length,
            committed: self.committed,
            sealed: self.sealed,
            block_table: Arc::clone(&before.block_table),
            slot_table: Arc::clone(&before.slot_table),
        };
        let (mut copy, mut writes, mut seals) = (None, Vec::new(), Vec::new());
        if tiles > before.block_table.len() {
            Arc::make_mut(&mut after.block_table).resize(tiles, -1);
            Arc::make_mut(&mut after.slot_table).resize(tiles, -1);
        }

        for tile in before.sealed..tiles {
            let tile_start = tile * rule.group();
            let from = tile_start.max(before.length);
            let to = (tile_start + rule.group()).min(self.length);
            let row = |position: usize| first_row + (position - before.length);

            let in_slot = tile >= self.sealed || rule.keeps_slot(tile);
            let shared = self.shared == Some(tile);
            if in_slot && (shared || after.slot_table[tile] < 0) {
                let new = slots.allocate();
                let old = std::mem::replace(&mut Arc::make_mut(&mut after.slot_table)[tile], new as i32);
                copy = shared.then_some(SlotCopy { from: old as usize, to: new }).or(copy);
            }
            let slot = usize::try_from(after.slot_table[tile]).ok();
            if let Some(slot) = slot
                && from < to
                && (in_slot || !shared)
            {
                writes.push(SlotWrite { slot, offset: from - tile_start, row: row(from), count: to - from });
            }

            if tile < self.sealed && rule.has_page(tile) {
                let page = pages.allocate();
                Arc::make_mut(&mut after.block_table)[tile] = page as i32;
                let source = match slot {
                    None => SealSource::Rows(row(tile_start)),
                    Some(slot) if shared && !in_slot => {
                        SealSource::SharedSlot { slot, stored: from - tile_start, row: row(from) }
                    }
                    Some(slot) => SealSource::Slot(slot),
                };
                seals.push(Seal { tile, page, source });
                if slot.is_some() && !rule.keeps_slot(tile) {
                    Arc::make_mut(&mut after.slot_table)[tile] = -1;
                }
            }
        }
        Parts { after, copy, writes, seals }
    }
}

#[cfg(test)]
mod tests;
