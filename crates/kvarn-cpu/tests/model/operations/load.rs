//! A saved sequence loaded, whatever has become of the one that was saved; or a damaged file refused.

use fastrand::Rng;
use kvarn::pool::PoolError;
use kvarn::tables::TableError;
use kvarn_cpu::Error;

use super::Outcome;
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    if world.is_crowded() || world.saved.is_empty() {
        return None;
    }
    let (saved, stored) = &world.saved[random.usize(..world.saved.len())];
    let mut bytes = [saved.header.as_slice(), saved.image.as_slice()].concat();
    match random.u8(..8) {
        0 => {
            let place = random.usize(..bytes.len());
            bytes[place] ^= 1 << random.u8(..8);
            assert!(
                world.pool.load(&mut bytes.as_slice()).is_err(),
                "loaded with byte {place} of it changed"
            );
            return Some("refused: damaged");
        }
        1 => {
            assert!(
                world.stranger.0.load(&mut bytes.as_slice()).is_err(),
                "loaded by a pool of other layers"
            );
            return Some("refused: another pool");
        }
        _ => {}
    }
    let (pages, slots) = stored.extent();
    let fits = world.fits((pages, slots));
    match world.pool.load(&mut bytes.as_slice()) {
        Ok(id) => {
            assert!(fits, "loaded what does not fit");
            let stored = stored.moved(&mut world.names);
            world.make_room(pages, slots);
            world.add_sequence(id, stored);
            Some("done")
        }
        Err(Error::Pool(PoolError::Table(error @ TableError::ImageCapacity { .. }))) => {
            assert!(!fits, "{error}");
            Some("refused: too full")
        }
        Err(error) => panic!("{error}"),
    }
}
