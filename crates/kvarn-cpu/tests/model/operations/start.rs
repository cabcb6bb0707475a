//! A sequence that starts with what is published.

use fastrand::Rng;

use super::Outcome;
use super::publish::keys;
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    if world.is_crowded() {
        return None;
    }
    let keys = keys(random.usize(..6), random);
    let core = world.pool.core();
    assert_eq!(core.match_prefix(&keys), world.prefixes.matching(&keys), "tiles that match");
    let id = core.create_from(&keys);
    let stored = world.prefixes.start(&keys);
    let found = stored.tiles.len();
    world.add_sequence(id, stored);
    Some(match found {
        0 => "found nothing",
        found if found == keys.len() => "found all",
        _ => "found some",
    })
}
