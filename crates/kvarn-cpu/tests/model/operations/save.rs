//! A sequence saved, to be loaded again or never.

use fastrand::Rng;
use kvarn_cpu::Error;

use super::Outcome;
use crate::sequence::State;
use crate::world::World;

/// Saved sequences that are kept.
const KEPT: usize = 4;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    let sequence = &world.sequences[world.any_sequence(random)?];
    match world.pool.save(sequence.id) {
        Ok(saved) => {
            assert_ne!(sequence.state, State::Open, "what was saved");
            world.saved.push((saved, sequence.stored.clone()));
            if world.saved.len() > KEPT {
                world.saved.swap_remove(random.usize(..KEPT));
            }
            Some("done")
        }
        Err(Error::Pool(error)) => Some(sequence.check_refusal(&error)),
        Err(error) => panic!("{error}"),
    }
}
