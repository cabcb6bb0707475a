//! A sequence that is not needed any more.

use fastrand::Rng;

use super::Outcome;
use crate::sequence::State;
use crate::world::World;

/// Freed handles that are kept for misuse.
const REMEMBERED: usize = 8;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    let index = world.any_sequence(random)?;
    let id = world.sequences[index].id;
    match world.pool.core().free(id) {
        Ok(()) => {
            assert_ne!(world.sequences[index].state, State::Open, "what was freed");
            let sequence = world.sequences.swap_remove(index);
            if sequence.state != State::Away {
                world.prefixes.note_use(&sequence.stored);
            }
            world.freed.push_back(id);
            world.freed.truncate(REMEMBERED);
            // Whoever shared its pages and slots still holds them.
            world.touched.extend(world.sequences.iter().map(|sequence| sequence.id));
            Some("done")
        }
        Err(error) => Some(world.sequences[index].check_refusal(&error)),
    }
}
