//! The newest tokens of a sequence taken away.

use fastrand::Rng;
use kvarn::pool::PoolError;
use kvarn::tables::TableError;

use super::Outcome;
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    let index = world.any_sequence(random)?;
    let (rule, core) = (world.rule, world.pool.core());
    let sequence = &mut world.sequences[index];
    let length = sequence.stored.length();
    let keep = match random.u8(..10) {
        0 => 0,
        1 => random.usize(..=length),
        // Around the last boundary of a tile.
        2 => (length / rule.group * rule.group + random.usize(..3)).saturating_sub(1).min(length),
        3 | 4 => length.saturating_sub(random.usize(..rule.group)),
        _ => length.saturating_sub(random.usize(..4)),
    };
    let sealed = sequence.stored.sealed() * rule.group;
    match core.truncate(sequence.id, keep) {
        Ok(()) => {
            assert!(!sequence.open, "truncated a sequence in an open step");
            assert!(keep >= sealed, "cut into a sealed tile");
            let stored = &mut sequence.stored;
            stored.tokens.truncate(keep);
            stored.committed = stored.committed.min(keep);
            stored.tiles.truncate(keep.div_ceil(rule.group));
            world.touched.push(sequence.id);
            Some("done")
        }
        Err(PoolError::Table(TableError::SequenceInStep { sequence: named, .. })) => {
            assert!(sequence.open && named == sequence.id);
            Some("refused: in a step")
        }
        Err(PoolError::Table(TableError::TruncateBelowSealed { sequence: named, keep: told, boundary })) => {
            assert_eq!((named, told, boundary), (sequence.id, keep, sealed));
            assert!(keep < sealed && !sequence.open);
            Some("refused: sealed")
        }
        Err(error) => panic!("{error}"),
    }
}
