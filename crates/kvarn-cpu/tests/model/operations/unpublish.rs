//! Nothing is published any more.

use fastrand::Rng;

use super::Outcome;
use crate::world::World;

pub(super) fn run(world: &mut World, _: &mut Rng) -> Outcome {
    if world.prefixes.tiles.is_empty() {
        return None;
    }
    world.pool.core().unpublish();
    world.prefixes.tiles.clear();
    Some("done")
}
