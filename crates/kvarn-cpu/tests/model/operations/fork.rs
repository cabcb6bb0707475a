//! A second sequence in the same pages and slots.

use fastrand::Rng;
use kvarn::pool::PoolError;
use kvarn::tables::TableError;

use super::Outcome;
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    if world.is_crowded() {
        return None;
    }
    let parent = &world.sequences[world.any_sequence(random)?];
    match world.pool.core().fork(parent.id) {
        Ok(fork) => {
            assert!(!parent.open, "forked a sequence in an open step");
            let (id, stored) = (parent.id, parent.stored.clone());
            world.add_sequence(fork, stored);
            world.touched.push(id);
            Some("done")
        }
        Err(PoolError::Table(TableError::SequenceInStep { sequence, .. })) => {
            assert!(parent.open && sequence == parent.id);
            Some("refused: in a step")
        }
        Err(error) => panic!("{error}"),
    }
}
