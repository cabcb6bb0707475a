//! A second sequence in the same pages and slots.

use fastrand::Rng;

use super::Outcome;
use crate::sequence::State;
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    if world.is_crowded() {
        return None;
    }
    let parent = &world.sequences[world.any_sequence(random)?];
    match world.pool.core().fork(parent.id) {
        Ok(fork) => {
            assert_eq!(parent.state, State::Idle, "what was forked");
            let (id, stored) = (parent.id, parent.stored.clone());
            world.add_sequence(fork, stored);
            world.touched.push(id);
            Some("done")
        }
        Err(error) => Some(parent.check_refusal(&error)),
    }
}
