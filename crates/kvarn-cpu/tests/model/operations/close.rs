//! An open step finished, or taken back, while other sequences moved on.

use fastrand::Rng;

use super::Outcome;
use super::step::append_and_look;
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    if world.open_steps.is_empty() {
        return None;
    }
    let mut open = world.open_steps.swap_remove(random.usize(..world.open_steps.len()));
    if random.u8(..4) == 0 {
        world.abandon(open, random);
        return Some("abandoned");
    }
    for layer in 0..open.appended.len() {
        if !open.appended[layer] {
            append_and_look(world, &mut open, layer, random);
        }
    }
    world.finish(open);
    Some("finished")
}
