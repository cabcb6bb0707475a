use std::sync::Arc;

use super::Unseal;
use crate::tables::{SealRule, SealSource, SequenceId, SequenceView, SlotCopy, TableErrorKind, Tables};

const GROUP: usize = 8;

fn tables(sink_tokens: usize, recent_tokens: usize, slots: usize) -> Tables {
    Tables::new(SealRule::new(GROUP, sink_tokens, recent_tokens).unwrap(), 8, slots).unwrap()
}

fn append(tables: &mut Tables, id: SequenceId, count: usize) {
    let plan = tables.plan_step(&[id], &[count], &[0]).unwrap();
    tables.finish(plan.id).unwrap();
}

fn filled(tables: &mut Tables, count: usize) -> SequenceId {
    let id = tables.create();
    append(tables, id, count);
    id
}

/// Cuts, and returns what has to be decoded.
fn truncate(tables: &mut Tables, id: SequenceId, keep: usize) -> Option<Unseal> {
    let truncation = tables.plan_truncation(id, keep).unwrap();
    let unseal = truncation.unseal();
    truncation.commit();
    unseal
}

/// Length, sealed tiles, block table, slot table.
fn stored(tables: &Tables, id: SequenceId) -> (usize, usize, Vec<i32>, Vec<i32>) {
    let SequenceView { length, committed, sealed, block_table, slot_table } = tables.view(id).unwrap();
    assert_eq!(length, committed);
    (*length, *sealed, block_table.to_vec(), slot_table.to_vec())
}

fn used(tables: &Tables) -> (usize, usize) {
    (tables.stats().pages.used, tables.stats().slots.used)
}

#[test]
fn slots_without_a_kept_token_are_released_and_the_cut_one_is_kept() {
    let mut tables = tables(0, 4 * GROUP, 8);
    let id = filled(&mut tables, 3 * GROUP + 1);
    let snapshot = tables.view(id).unwrap().clone();
    for (keep, slots) in [(25, 4), (24, 3), (17, 3), (16, 2), (1, 1), (0, 0)] {
        assert_eq!(truncate(&mut tables, id, keep), None);
        let view = tables.view(id).unwrap();
        assert_eq!((view.length, view.committed, view.slot_table.len()), (keep, keep, slots));
        assert_eq!(tables.stats().slots.used, slots);
    }
    assert_eq!(*snapshot.slot_table, [0, 1, 2, 3], "a snapshot never changes");
}

#[test]
fn what_was_committed_stays_so() {
    let mut tables = tables(0, 0, 8);
    let id = tables.create();
    let plan = tables.plan_step(&[id], &[7], &[3]).unwrap();
    tables.finish(plan.id).unwrap();
    for (keep, committed) in [(6, 4), (4, 4), (3, 3)] {
        assert_eq!(truncate(&mut tables, id, keep), None);
        assert_eq!(tables.view(id).unwrap().committed, committed);
    }
}

#[test]
fn a_cut_between_tiles_decodes_nothing_and_needs_no_slot() {
    for (sink_tokens, sealed) in [(0, [2, 1, 0]), (3, [2, 1, 0]), (GROUP, [2, 0, 0])] {
        let mut tables = tables(sink_tokens, 0, 2);
        let id = filled(&mut tables, 3 * GROUP);
        // All slots are in use.
        let other = filled(&mut tables, if sink_tokens > 0 { 1 } else { 2 * GROUP - 1 });
        if sink_tokens == 0 {
            filled(&mut tables, 1);
        }
        assert_eq!(tables.stats().slots.free, 0);
        for (keep, sealed) in [2 * GROUP, GROUP, 0].into_iter().zip(sealed) {
            assert_eq!(truncate(&mut tables, id, keep), None);
            let view = tables.view(id).unwrap();
            assert_eq!((view.length, view.sealed), (keep, sealed));
            assert_eq!(view.block_table.len(), keep / GROUP);
        }
        assert_eq!((tables.view(id).unwrap().slot_table.len(), tables.stats().unsealed), (0, 0));
        assert_eq!(tables.view(other).unwrap().slot_table.iter().filter(|&&slot| slot >= 0).count(), 1);
    }
}

#[test]
fn a_cut_into_a_record_decodes_what_is_kept_into_a_free_slot() {
    let mut tables = tables(0, 0, 8);
    let id = filled(&mut tables, 3 * GROUP + 2);
    assert_eq!(stored(&tables, id), (26, 3, vec![0, 1, 2, -1], vec![-1, -1, -1, 0]));
    // The slot of the tail, which is dropped, is still in use when the record is decoded.
    assert_eq!(truncate(&mut tables, id, 13), Some(Unseal { tile: 1, page: 1, slot: 1, tokens: 5 }));
    assert_eq!(stored(&tables, id), (13, 1, vec![0, -1], vec![-1, 1]));
    assert_eq!((used(&tables), tables.stats().unsealed), ((1, 1), 1));
    // From here on in the slot: exactly.
    assert_eq!(truncate(&mut tables, id, 9), None);
    // The tile is filled and sealed again, from its slot.
    let plan = tables.plan_step(&[id], &[8], &[0]).unwrap();
    let sequence = &plan.sequences[0];
    assert_eq!((sequence.writes[0].slot, sequence.writes[0].offset), (1, 1));
    assert_eq!((sequence.seals[0].tile, sequence.seals[0].source), (1, SealSource::Slot(1)));
    tables.finish(plan.id).unwrap();
    assert_eq!(stored(&tables, id), (17, 2, vec![0, 1, -1], vec![-1, -1, 0]));
    assert_eq!(tables.stats().unsealed, 1);
}

#[test]
fn the_first_tile_without_sinks_is_like_any_other() {
    let mut tables = tables(0, 0, 8);
    let id = filled(&mut tables, 2 * GROUP);
    assert_eq!(truncate(&mut tables, id, 1), Some(Unseal { tile: 0, page: 0, slot: 0, tokens: 1 }));
    assert_eq!(stored(&tables, id), (1, 0, vec![-1], vec![0]));
    assert_eq!(used(&tables), (0, 1));
}

#[test]
fn a_tile_with_some_sinks_goes_on_in_its_slot_which_has_all_of_it() {
    // One slot: none is free.
    for keep in [1, 2, 3, 4, 7] {
        let mut tables = tables(3, 0, 1);
        let id = filled(&mut tables, 2 * GROUP);
        assert_eq!(stored(&tables, id), (16, 2, vec![0, 1], vec![0, -1]));
        assert_eq!(truncate(&mut tables, id, keep), None);
        assert_eq!(stored(&tables, id), (keep, 0, vec![-1], vec![0]));
        assert_eq!((used(&tables), tables.stats().unsealed), ((0, 1), 0));
        // Sealed again, it keeps its slot again.
        append(&mut tables, id, GROUP - keep);
        assert_eq!(stored(&tables, id), (GROUP, 1, vec![0], vec![0]));
    }
}

#[test]
fn a_whole_tile_of_sinks_stays_in_its_slot() {
    let mut tables = tables(GROUP, 0, 1);
    let id = filled(&mut tables, 3 * GROUP);
    assert_eq!(stored(&tables, id), (24, 3, vec![-1, 0, 1], vec![0, -1, -1]));
    assert_eq!(truncate(&mut tables, id, 3), None);
    assert_eq!(stored(&tables, id), (3, 0, vec![-1], vec![0]));
    assert_eq!(used(&tables), (0, 1));
    append(&mut tables, id, 2 * GROUP - 3);
    assert_eq!(stored(&tables, id), (16, 2, vec![-1, 0], vec![0, -1]));
}

#[test]
fn tiles_before_the_cut_stay_sealed_within_the_recent_window() {
    let mut tables = tables(0, 2 * GROUP, 8);
    let id = filled(&mut tables, 5 * GROUP);
    assert_eq!(tables.view(id).unwrap().sealed, 3);
    assert_eq!(truncate(&mut tables, id, 2 * GROUP + 1).unwrap().tile, 2);
    assert_eq!(stored(&tables, id), (17, 2, vec![0, 1, -1], vec![-1, -1, 2]));
    append(&mut tables, id, 2 * GROUP - 1);
    assert_eq!(tables.view(id).unwrap().sealed, 2);
}

#[test]
fn held_tokens_behind_the_cut_are_dropped() {
    let mut tables = tables(0, 0, 8);
    let id = tables.create();
    let plan = tables.plan_step(&[id], &[2 * GROUP + 3], &[2]).unwrap();
    tables.finish(plan.id).unwrap();
    assert!(truncate(&mut tables, id, GROUP + 2).is_some());
    let view = tables.view(id).unwrap();
    assert_eq!((view.length, view.committed, view.sealed), (10, 10, 1));
}

#[test]
fn forks_keep_the_record_and_their_slots() {
    let mut tables = tables(0, 0, 8);
    let a = filled(&mut tables, 2 * GROUP + 4);
    let (b, c) = (tables.fork(a).unwrap(), tables.fork(a).unwrap());
    let kept = stored(&tables, a);
    let unseal = truncate(&mut tables, b, GROUP + 4).unwrap();
    assert_eq!((unseal.page, unseal.slot), (1, 1));
    assert_eq!(truncate(&mut tables, c, GROUP + 4).unwrap().slot, 2);
    assert_eq!(stored(&tables, a), kept);
    assert_eq!((used(&tables), tables.stats().unsealed), ((2, 3), 2));
    // A fork of what was unsealed shares the new slot, and copies it before it writes.
    let d = tables.fork(b).unwrap();
    let plan = tables.plan_step(&[b, d], &[1, GROUP], &[0, 0]).unwrap();
    assert_eq!(plan.sequences[0].copy, Some(SlotCopy { from: 1, to: 3 }));
    let source = SealSource::SharedSlot { slot: 1, stored: 4, row: 1 };
    assert_eq!((plan.sequences[1].copy, plan.sequences[1].seals[0].source), (None, source));
    tables.finish(plan.id).unwrap();
    for id in [a, b, c, d] {
        tables.free(id).unwrap();
    }
    assert_eq!(used(&tables), (0, 0));
}

#[test]
fn a_shared_slot_with_sinks_is_copied_before_it_is_written_to() {
    for sink_tokens in [3, GROUP] {
        let mut tables = tables(sink_tokens, 0, 8);
        let a = filled(&mut tables, 2 * GROUP);
        let b = tables.fork(a).unwrap();
        assert_eq!(truncate(&mut tables, b, 5), None);
        let plan = tables.plan_step(&[b], &[1], &[0]).unwrap();
        assert_eq!(plan.sequences[0].copy, Some(SlotCopy { from: 0, to: 1 }));
        tables.finish(plan.id).unwrap();
        assert_eq!(tables.view(a).unwrap().slot_table[0], 0);
        // Alone, it writes in place.
        assert_eq!(truncate(&mut tables, a, 5), None);
        let plan = tables.plan_step(&[a], &[1], &[0]).unwrap();
        assert_eq!(plan.sequences[0].copy, None);
    }
}

#[test]
fn without_a_free_slot_nothing_changes() {
    let mut tables = tables(0, 0, 1);
    let id = filled(&mut tables, 2 * GROUP + 1);
    let before = (tables.view(id).unwrap().clone(), tables.stats());
    let error = tables.plan_truncation(id, 13).unwrap_err();
    assert_eq!(
        error.to_string(),
        "13 tokens of sequence 0: expected a free slot for tile 1, which is sealed, with 0 of 1 free; free a sequence, keep \
         8 tokens, or make the pool larger"
    );
    assert_eq!(error.kind(), TableErrorKind::Capacity);
    assert_eq!((tables.view(id).unwrap(), tables.stats()), (&before.0, before.1));
    // Between the tiles no slot is needed, and that of the tail is given back.
    assert_eq!(truncate(&mut tables, id, 2 * GROUP), None);
    assert_eq!(truncate(&mut tables, id, 13).unwrap().slot, 0);
}

#[test]
fn a_truncation_that_is_not_committed_changes_nothing() {
    let mut tables = tables(3, 0, 8);
    let id = filled(&mut tables, 3 * GROUP + 1);
    let before = (tables.view(id).unwrap().clone(), tables.stats());
    for keep in [25, 17, 16, 13, 8, 5, 0] {
        drop(tables.plan_truncation(id, keep).unwrap());
        let view = tables.view(id).unwrap();
        assert_eq!((view, tables.stats()), (&before.0, before.1));
        assert!(Arc::ptr_eq(&view.block_table, &before.0.block_table));
    }
}

#[test]
fn beyond_the_length_and_in_an_open_step_it_is_refused() {
    let mut tables = tables(0, 0, 8);
    let id = filled(&mut tables, 2 * GROUP + 3);
    assert_eq!(
        tables.plan_truncation(id, 20).unwrap_err().to_string(),
        "20 tokens of sequence 0: expected at most its length, 19; append tokens with a step"
    );
    assert!(tables.plan_truncation(id, usize::MAX).is_err());
    let plan = tables.plan_step(&[id], &[1], &[0]).unwrap();
    let error = tables.plan_truncation(id, 3).unwrap_err();
    assert_eq!(error.kind(), TableErrorKind::State);
    assert!(error.to_string().starts_with("sequence 0, which is in open step 1"), "{error}");
    tables.abandon(plan.id).unwrap();
    assert_eq!(truncate(&mut tables, id, 3).unwrap().tokens, 3);
}

#[test]
fn the_slot_bound_holds_while_a_record_is_decoded() {
    // The longest tail, its first tile beside the slot for the cut: no more than a step may take.
    for (sink_tokens, recent_tokens, hold) in [(0, 0, 0), (3, 9, 5), (GROUP, 4 * GROUP, 0)] {
        let rule = SealRule::new(GROUP, sink_tokens, recent_tokens).unwrap();
        let mut tables = Tables::new(rule, 64, rule.slot_bound(hold)).unwrap();
        let id = tables.create();
        let plan = tables.plan_step(&[id], &[4 * GROUP + recent_tokens + GROUP - 1 + hold], &[hold]).unwrap();
        tables.finish(plan.id).unwrap();
        assert!(truncate(&mut tables, id, 2 * GROUP + 1).is_some());
        assert!(truncate(&mut tables, id, GROUP + 1).is_some());
    }
}
