//! Beams: each sequence takes what another one held.

use fastrand::Rng;
use kvarn::tables::SequenceId;

use super::Outcome;
use crate::sequence::Stored;
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    let mut chosen = world.idle_sequences();
    random.shuffle(&mut chosen);
    chosen.truncate(random.usize(1..=4));
    if chosen.is_empty() {
        return None;
    }
    let order: Vec<usize> = chosen.iter().map(|_| random.usize(..chosen.len())).collect();
    let ids: Vec<SequenceId> = chosen.iter().map(|&index| world.sequences[index].id).collect();
    world.pool.core().reorder(&ids, &order).unwrap();
    let held: Vec<Stored> = order.iter().map(|&from| world.sequences[chosen[from]].stored.clone()).collect();
    for (index, stored) in chosen.into_iter().zip(held) {
        world.sequences[index].stored = stored;
    }
    world.touched.extend(ids);
    Some("done")
}
