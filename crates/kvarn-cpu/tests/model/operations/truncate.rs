//! The newest tokens of a sequence taken away, wherever the cut lies.

use fastrand::Rng;
use kvarn::Saturation;
use kvarn::codec::round_to_slot;
use kvarn::pool::PoolError;
use kvarn::tables::TableError;
use kvarn_cpu::Error;

use super::Outcome;
use crate::sequence::{State, Token};
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    let index = world.any_sequence(random)?;
    let group = world.rule.group;
    let sequence = &world.sequences[index];
    let length = sequence.stored.length();
    let keep = match random.u8(..10) {
        0 => 0,
        1 | 2 => random.usize(..=length),
        // Around the last boundary of a tile.
        3 => (length / group * group + random.usize(..3)).saturating_sub(1).min(length),
        4 | 5 => length.saturating_sub(random.usize(..group)),
        _ => length.saturating_sub(random.usize(..4)),
    };
    let cut = keep / group;
    let unseals = !keep.is_multiple_of(group) && sequence.stored.tiles[cut].page.is_some();
    let needs_slot = unseals && !world.rule.keeps_slot(cut);
    match world.pool.truncate(sequence.id, keep) {
        Ok(()) => {
            assert_eq!(sequence.state, State::Idle, "what was truncated");
            assert!(!needs_slot || world.fits((0, 1)), "unsealed into a slot that is not free");
            cut_model(world, index, keep, unseals);
            Some(match (unseals, needs_slot) {
                (false, _) => "done",
                (true, false) => "into the sink tile",
                (true, true) => "into a record",
            })
        }
        Err(Error::Pool(PoolError::Table(TableError::TruncateWithoutSlot {
            sequence: named,
            keep: told,
            tile,
            slots,
            boundary,
        }))) => {
            assert!(needs_slot && sequence.state == State::Idle && !world.fits((0, 1)));
            assert_eq!((named, told, tile, boundary), (sequence.id, keep, cut, cut * group));
            assert_eq!(slots, world.pool.core().layout().slots);
            Some("refused: too full")
        }
        Err(Error::Pool(error)) => Some(sequence.check_refusal(&error)),
        Err(error) => panic!("{error}"),
    }
}

fn cut_model(world: &mut World, index: usize, keep: usize, unseals: bool) {
    let (group, slot_type) = (world.rule.group, world.setup.input.slot_type());
    if unseals && !world.rule.keeps_slot(keep / group) {
        world.make_room(0, 1);
    }
    let sequence = &mut world.sequences[index];
    let stored = &mut sequence.stored;
    stored.tokens.truncate(keep);
    stored.committed = stored.committed.min(keep);
    stored.tiles.truncate(keep.div_ceil(group));
    world.touched.push(sequence.id);
    if !unseals {
        return;
    }
    let cut = keep / group;
    let tile = &mut stored.tiles[cut];
    tile.page = None;
    if world.rule.keeps_slot(cut) {
        // The slot has all of the tile, also what was read from its page.
        stored.tokens.clone_from_slice(&stored.sink_tile[..keep]);
        return;
    }
    tile.slot = Some(world.names.next());
    for token in &mut stored.tokens[cut * group..] {
        let mut values = token.to_vec();
        round_to_slot(&mut values, slot_type, &mut Saturation::default());
        *token = Token::from(values);
    }
    world.unsealed += 1;
}
