//! A new, empty sequence.

use fastrand::Rng;

use super::Outcome;
use crate::sequence::Stored;
use crate::world::World;

pub(super) fn run(world: &mut World, _: &mut Rng) -> Outcome {
    if world.is_crowded() {
        return None;
    }
    let id = world.pool.core().create();
    world.add_sequence(id, Stored::default());
    Some("done")
}
