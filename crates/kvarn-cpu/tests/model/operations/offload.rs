//! A sequence moved out of the pool.

use fastrand::Rng;
use kvarn_cpu::Error;

use super::Outcome;
use crate::sequence::State;
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    let index = world.any_sequence(random)?;
    let sequence = &mut world.sequences[index];
    match world.pool.offload(sequence.id) {
        Ok(()) => {
            assert_eq!(sequence.state, State::Idle, "what was offloaded");
            sequence.state = State::Away;
            // Whoever shared its pages and slots still holds them.
            world.touched.extend(world.sequences.iter().map(|sequence| sequence.id));
            Some("done")
        }
        Err(Error::Pool(error)) => Some(sequence.check_refusal(&error)),
        Err(error) => panic!("{error}"),
    }
}
