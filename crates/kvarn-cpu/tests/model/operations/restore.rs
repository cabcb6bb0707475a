//! An offloaded sequence brought back.

use fastrand::Rng;
use kvarn::pool::PoolError;
use kvarn::tables::TableError;
use kvarn_cpu::Error;

use super::Outcome;
use crate::sequence::State;
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    let away: Vec<usize> =
        (0..world.sequences.len()).filter(|&index| world.sequences[index].state == State::Away).collect();
    // Now and then one that is not away.
    let index = match random.choice(&away) {
        Some(&index) if random.u8(..16) > 0 => index,
        _ => world.any_sequence(random)?,
    };
    let (id, state) = (world.sequences[index].id, world.sequences[index].state);
    let (pages, slots) = world.sequences[index].stored.extent();
    let fits = world.fits((pages, slots));
    match world.pool.restore(id) {
        Ok(()) => {
            assert!(state == State::Away && fits, "restored what is {state:?}, or does not fit");
            world.make_room(pages, slots);
            let sequence = &mut world.sequences[index];
            sequence.stored = sequence.stored.moved(&mut world.names);
            sequence.state = State::Idle;
            world.touched.push(id);
            Some("done")
        }
        Err(Error::Pool(PoolError::Table(error @ TableError::ImageCapacity { .. }))) => {
            assert!(state == State::Away && !fits, "{error}");
            Some("refused: too full")
        }
        Err(Error::Pool(PoolError::Table(TableError::ResidentSequence { sequence }))) => {
            assert!(state != State::Away && sequence == id);
            Some("refused: in the pool")
        }
        Err(error) => panic!("{error}"),
    }
}
