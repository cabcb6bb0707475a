//! A sequence that is not needed any more.

use fastrand::Rng;
use kvarn::pool::PoolError;
use kvarn::tables::TableError;

use super::Outcome;
use crate::world::World;

/// Freed handles that are kept for misuse.
const REMEMBERED: usize = 8;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    let index = world.any_sequence(random)?;
    let (id, open) = (world.sequences[index].id, world.sequences[index].open);
    match world.pool.core().free(id) {
        Ok(()) => {
            assert!(!open, "freed a sequence in an open step");
            world.sequences.swap_remove(index);
            world.freed.push_back(id);
            world.freed.truncate(REMEMBERED);
            // Whoever shared its pages and slots still holds them.
            world.touched.extend(world.sequences.iter().map(|sequence| sequence.id));
            Some("done")
        }
        Err(PoolError::Table(TableError::SequenceInStep { sequence, .. })) => {
            assert!(open && sequence == id);
            Some("refused: in a step")
        }
        Err(error) => panic!("{error}"),
    }
}
