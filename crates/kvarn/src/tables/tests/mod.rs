//! Random operations against a plain model: each sequence is a list of tokens, each pool a small
//! memory of token values that carries out the plans as a backend would.

mod check;
mod model;
mod prefix;
mod world;

use proptest::prelude::*;

use super::{SealRule, Tables};
use check::state;
use world::World;

#[derive(Debug, Clone)]
enum Op {
    Create,
    Plan { picks: Vec<(usize, usize, usize)>, close: Option<bool> },
    Close { pick: usize, finish: bool },
    Truncate { pick: usize, drop: usize },
    Free { pick: usize },
    Fork { pick: usize },
    Reorder { picks: Vec<(usize, usize)> },
    Publish { pick: usize, letters: Vec<u8> },
    Start { letters: Vec<u8> },
    Unpublish,
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
        3 => pick.clone().prop_map(|pick| Op::Free { pick }),
        3 => pick.clone().prop_map(|pick| Op::Fork { pick }),
        1 => prop::collection::vec((pick.clone(), pick.clone()), 0..4).prop_map(|picks| Op::Reorder { picks }),
        4 => (pick, letters()).prop_map(|(pick, letters)| Op::Publish { pick, letters }),
        3 => letters().prop_map(|letters| Op::Start { letters }),
        1 => prop_oneof![9 => Just(Op::Create), 1 => Just(Op::Unpublish)],
    ];
    prop::collection::vec(op, 1..60)
}

/// Few different ones, so that sequences meet under a key.
fn letters() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop_oneof![2 => Just(0_u8), 1 => 1..3_u8], 0..7)
}

fn rules() -> impl Strategy<Value = SealRule> {
    prop::sample::select(vec![1_usize, 4, 8])
        .prop_flat_map(|group| {
            (Just(group), prop_oneof![Just(0), Just(group), 0..=group], prop_oneof![Just(0), 0..=4 * group])
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
        world.run(&Op::Unpublish);
        prop_assert_eq!((world.tables.pages.unused(), world.tables.slots.unused()), (pages, slots));
    }

    #[test]
    fn requests_for_prefixes_in_a_small_pool_agree_with_the_model(
        sink_tokens in 0..5_usize,
        pages in 2..16_usize,
        slots in 3..8_usize,
        requests in prop::collection::vec((letters(), any::<bool>(), any::<bool>()), 1..40),
    ) {
        let rule = SealRule::new(4, sink_tokens.min(4), 0).unwrap();
        let mut world = World::new(rule, pages, slots);
        for (letters, look, keep) in requests {
            let pick = world.models.len();
            world.run(&if look { Op::Start { letters: letters.clone() } } else { Op::Create });
            let count = letters.len() * rule.group() - world.models[pick].tokens.len();
            world.run(&Op::Plan { picks: vec![(pick, count, 0)], close: Some(true) });
            world.run(&Op::Publish { pick, letters });
            if !keep || world.models.len() > 2 {
                world.run(&Op::Free { pick: if keep { 0 } else { pick } });
            }
        }
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
        let published = world.published.len();
        if world.plan(&picks) {
            prop_assert!(state(&world.tables) != before);
            world.close(world.open.len() - 1, false);
        }
        // What was given up for the step does not come back.
        prop_assert!(state(&world.tables) == before || world.published.len() < published);
    }
}

#[test]
fn the_slot_bound_is_reached() {
    for (group, sink_tokens, recent_tokens, hold) in
        [(8, 0, 0, 0), (8, 8, 0, 0), (8, 3, 0, 2), (8, 8, 9, 0), (4, 4, 16, 5), (128, 128, 0, 7)]
    {
        let rule = SealRule::new(group, sink_tokens, recent_tokens).unwrap();
        let mut tables = Tables::new(rule, 64, 64).unwrap();
        let id = tables.create();
        // The longest tail there can be, then a step that seals all of it and leaves as long a one.
        let tail = recent_tokens + group - 1 + hold;
        let plan = tables.plan_step(&[id], &[2 * group + tail], &[hold]).unwrap();
        tables.finish(plan.id).unwrap();
        tables.plan_step(&[id], &[10 * group], &[hold]).unwrap();
        assert_eq!(tables.stats().slots.used, rule.slot_bound(hold), "{rule:?}, hold {hold}");
    }
}
