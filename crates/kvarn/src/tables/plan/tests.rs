//! Single plans, checked by hand.

use super::*;
use crate::tables::TableErrorKind;

const GROUP: usize = 8;

fn tables(sink_tokens: usize, recent_tokens: usize, pages: usize, slots: usize) -> Tables {
    Tables::new(SealRule::new(GROUP, sink_tokens, recent_tokens).unwrap(), pages, slots).unwrap()
}

/// Runs a step of one sequence to its end.
fn step(tables: &mut Tables, id: SequenceId, count: usize, hold: usize) -> SequencePlan {
    let plan = tables.plan_step(&[id], &[count], &[hold]).unwrap();
    tables.finish(plan.id).unwrap();
    plan.sequences[0].clone()
}

fn write(slot: usize, offset: usize, row: usize, count: usize) -> SlotWrite {
    SlotWrite { slot, offset, row, count }
}

fn seal(tile: usize, page: usize, source: SealSource) -> Seal {
    Seal { tile, page, source }
}

#[test]
fn a_prompt_is_encoded_directly_but_for_its_sinks_and_its_tail() {
    let mut tables = tables(GROUP, 0, 8, 8);
    let id = tables.create();
    let plan = step(&mut tables, id, 3 * GROUP + 5, 0);
    assert_eq!(plan.writes, [write(0, 0, 0, 8), write(1, 0, 24, 5)]);
    assert_eq!(plan.seals, [seal(1, 0, SealSource::Rows(8)), seal(2, 1, SealSource::Rows(16))]);
    assert_eq!(*plan.after.block_table, [-1, 0, 1, -1]);
    assert_eq!(*plan.after.slot_table, [0, -1, -1, 1]);
    assert_eq!((plan.after.length, plan.after.committed, plan.after.sealed), (29, 29, 3));
}

#[test]
fn a_full_tail_is_sealed_from_its_slot_which_is_released_at_finish() {
    let mut tables = tables(0, 0, 8, 8);
    let id = tables.create();
    step(&mut tables, id, 5, 0);
    let plan = tables.plan_step(&[id], &[6], &[0]).unwrap();
    let only = &plan.sequences[0];
    assert_eq!(only.start(), 5);
    assert_eq!(only.writes, [write(0, 5, 0, 3), write(1, 0, 3, 3)]);
    assert_eq!(only.seals, [seal(0, 0, SealSource::Slot(0))]);
    assert_eq!((&*only.before.block_table, &*only.before.slot_table), (&vec![-1], &vec![0]));
    assert_eq!((&*only.after.block_table, &*only.after.slot_table), (&vec![0, -1], &vec![-1, 1]));
    assert_eq!(tables.stats().slots.used, 2);
    assert_eq!(tables.view(id).unwrap(), &only.before);
    tables.finish(plan.id).unwrap();
    assert_eq!(tables.stats().slots.used, 1);
    assert_eq!(tables.view(id).unwrap(), &only.after);
}

#[test]
fn a_partial_sink_tile_is_sealed_and_keeps_its_slot_whole() {
    let mut tables = tables(3, 0, 8, 8);
    let (slow, fast) = (tables.create(), tables.create());
    step(&mut tables, slow, 7, 0);
    let plan = step(&mut tables, slow, 1, 0);
    assert_eq!(plan.seals, [seal(0, 0, SealSource::Slot(0))]);
    assert_eq!((&*plan.after.block_table, &*plan.after.slot_table), (&vec![0], &vec![0]));

    let plan = step(&mut tables, fast, GROUP, 0);
    assert_eq!(plan.writes, [write(1, 0, 0, 8)]);
    assert_eq!(plan.seals, [seal(0, 1, SealSource::Slot(1))]);
    assert_eq!((&*plan.after.block_table, &*plan.after.slot_table), (&vec![1], &vec![1]));
}

#[test]
fn held_tokens_are_sealed_by_the_step_that_commits_them() {
    let mut tables = tables(0, 0, 8, 8);
    let id = tables.create();
    let plan = step(&mut tables, id, 10, 4);
    assert_eq!((plan.after.committed, plan.after.sealed, plan.seals.len()), (6, 0, 0));
    assert_eq!(plan.writes, [write(0, 0, 0, 8), write(1, 0, 8, 2)]);

    tables.plan_truncation(id, 9).unwrap().commit();
    let plan = step(&mut tables, id, 0, 0);
    assert_eq!((plan.after.length, plan.after.committed), (9, 9));
    assert_eq!(plan.writes, []);
    assert_eq!(plan.seals, [seal(0, 0, SealSource::Slot(0))]);
}

#[test]
fn the_recent_window_stays_in_slots() {
    let mut tables = tables(0, 5, 8, 8);
    let id = tables.create();
    assert_eq!(step(&mut tables, id, 2 * GROUP + 4, 0).after.sealed, 1);
    assert_eq!(step(&mut tables, id, 1, 0).seals, [seal(1, 1, SealSource::Slot(0))]);
}

#[test]
fn rows_of_a_ragged_batch_follow_each_other() {
    let mut tables = tables(0, 0, 8, 8);
    let ids = [tables.create(), tables.create()];
    let plan = tables.plan_step(&ids, &[3, 9], &[0, 0]).unwrap();
    assert_eq!((plan.tokens, &*plan.first_rows), (12, &vec![0, 3, 12]));
    assert_eq!(plan.sequences[1].first_row, 3);
    assert_eq!(plan.sequences[1].seals, [seal(0, 0, SealSource::Rows(3))]);
    assert_eq!(plan.sequences[1].writes, [write(1, 0, 11, 1)]);
}

#[test]
fn a_sequence_may_be_idle_in_a_step() {
    let mut tables = tables(0, 0, 8, 8);
    let ids = [tables.create(), tables.create()];
    let plan = tables.plan_step(&ids, &[3, 0], &[0, 0]).unwrap();
    assert_eq!(plan.sequences[1].after, plan.sequences[1].before);
    tables.finish(plan.id).unwrap();
    assert_eq!(tables.view(ids[1]).unwrap().length, 0);
}

#[test]
fn bad_batches_are_refused() {
    let mut tables = tables(0, 0, 8, 8);
    let (a, b) = (tables.create(), tables.create());
    let mut text = |sequences: &[SequenceId], counts: &[usize], hold: &[usize]| {
        let error = tables.plan_step(sequences, counts, hold).unwrap_err();
        assert_eq!(error.kind(), TableErrorKind::Shape);
        error.to_string()
    };
    assert_eq!(text(&[], &[], &[]), "0 sequences: expected at least one; leave the step out");
    assert_eq!(
        text(&[a, b], &[1, 1], &[0]),
        "2 counts and 1 hold for 2 sequences: expected one of each per sequence; pass 2"
    );
    assert_eq!(
        text(&[a, b, a], &[1, 1, 1], &[0, 0, 0]),
        "sequence 0 at 0 and 2 of the batch: expected each sequence once; append its tokens with one count"
    );
    assert_eq!(
        text(&[b], &[2], &[3]),
        "hold 3 for sequence 1: expected at most its count, 2; hold fewer tokens"
    );
    assert_eq!(
        text(&[a], &[usize::MAX], &[usize::MAX]),
        "18446744073709551615 tokens after 0 of sequence 0: expected at most 2147483647 in all; \
         start another sequence"
    );
    assert_eq!(
        text(&[a, b], &[MAX_TOKENS, 1], &[0, 0]),
        "counts that add up to more than 2147483647: expected at most so many rows in a step; make several steps"
    );
    assert_eq!((tables.next_step, tables.stats().slots.used), (0, 0));
}

#[test]
fn a_step_that_does_not_fit_names_those_without_which_it_fits() {
    let mut tables = tables(0, 0, 2, 2);
    let ids = [tables.create(), tables.create(), tables.create()];
    let error = tables.plan_step(&ids, &[9, 25, 9], &[0, 0, 0]).unwrap_err();
    let TableError::Capacity { lacking, pages: 2, slots: 2 } = error else { panic!("{error}") };
    assert_eq!(
        lacking,
        [Lack { sequence: ids[1], index: 1, pages_needed: 3, pages_free: 1, slots_needed: 1, slots_free: 1 }]
    );
    assert_eq!(tables.stats().slots.used, 0);
    tables.plan_step(&[ids[0], ids[2]], &[9, 9], &[0, 0]).unwrap();
}

#[test]
fn an_empty_pool_and_a_huge_count_are_refused_at_once() {
    for (pages, slots) in [(0, 0), (0, 8), (8, 0)] {
        let mut tables = tables(3, 0, pages, slots);
        let id = tables.create();
        let error = tables.plan_step(&[id], &[MAX_TOKENS], &[0]).unwrap_err();
        assert_eq!(error.kind(), TableErrorKind::Capacity);
    }
}

#[test]
fn it_works_again_after_a_free() {
    let mut tables = tables(0, 0, 1, 1);
    let (a, b) = (tables.create(), tables.create());
    step(&mut tables, a, GROUP, 0);
    assert!(tables.plan_step(&[b], &[GROUP], &[0]).is_err());
    tables.free(a).unwrap();
    step(&mut tables, b, GROUP, 0);
}

#[test]
fn open_steps_lock_their_sequences_and_close_once() {
    let mut tables = tables(0, 0, 8, 8);
    let (a, b) = (tables.create(), tables.create());
    let first = tables.plan_step(&[a], &[1], &[0]).unwrap();
    let text = tables.plan_step(&[b, a], &[1, 1], &[0, 0]).unwrap_err().to_string();
    assert_eq!(
        text,
        "sequence 0, which is in open step 0: expected a sequence outside open steps; \
         finish or abandon the step first"
    );
    assert!(tables.plan_truncation(a, 0).is_err() && tables.free(a).is_err());

    let second = tables.plan_step(&[b], &[1], &[0]).unwrap();
    tables.abandon(first.id).unwrap();
    tables.finish(second.id).unwrap();
    for closed in [first.id, second.id] {
        let error = tables.finish(closed).unwrap_err();
        assert_eq!(error, TableError::ClosedStep { step: closed });
        assert_eq!(tables.abandon(closed).unwrap_err(), error);
    }
    assert_eq!((tables.view(a).unwrap().length, tables.view(b).unwrap().length), (0, 1));
}

#[test]
fn a_step_of_another_pool_is_foreign() {
    let (mut ours, mut theirs) = (tables(0, 0, 8, 8), tables(0, 0, 8, 8));
    let (a, b) = (ours.create(), theirs.create());
    let ours_step = ours.plan_step(&[a], &[1], &[0]).unwrap().id;
    theirs.plan_step(&[b], &[1], &[0]).unwrap();
    assert_eq!(theirs.finish(ours_step).unwrap_err(), TableError::ForeignStep { step: ours_step });
    assert_eq!(theirs.abandon(ours_step).unwrap_err(), TableError::ForeignStep { step: ours_step });
    ours.finish(ours_step).unwrap();
}
