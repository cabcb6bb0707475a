//! The first tiles of a sequence published, under keys of which there are few: tiles meet.

use fastrand::Rng;
use kvarn::pool::{PoolError, TileKey};
use kvarn::tables::TableError;

use super::Outcome;
use crate::sequence::State;
use crate::world::World;

/// Keys of the first tiles of some text.
pub(super) fn keys(tiles: usize, random: &mut Rng) -> Vec<TileKey> {
    let key = |tile: usize| {
        let mut key = [0; 16];
        (key[0], key[1]) = (tile as u8, random.u8(..8) / 7);
        key
    };
    (0..tiles).map(key).collect()
}

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    let sequence = &world.sequences[world.any_sequence(random)?];
    let (id, stored) = (sequence.id, &sequence.stored);
    let full_sink = world.rule.sinks == world.rule.group && stored.committed >= world.rule.group;
    let tiles = stored.sealed().max(usize::from(full_sink));
    let mut keys = keys(tiles.saturating_sub(random.usize(..3)) + usize::from(random.u8(..16) == 0), random);
    if keys.len() > 1 && random.u8(..32) == 0 {
        keys[1] = keys[0];
    }
    let repeated = keys.len() > 1 && keys[0] == keys[1];
    let elsewhere =
        (keys.len() <= tiles).then(|| world.prefixes.published_elsewhere(stored, &keys)).flatten();
    match world.pool.core().publish(id, &keys) {
        Ok(new) => {
            assert_eq!(sequence.state, State::Idle, "what was published");
            assert!(keys.len() <= tiles && !repeated && elsewhere.is_none());
            assert_eq!(new, world.prefixes.publish(stored, &keys, world.rule.group), "tiles newly published");
            Some(if new > 0 { "done" } else { "nothing new" })
        }
        Err(PoolError::Table(TableError::TooManyKeys { sequence: named, keys: given, tiles: told })) => {
            assert!(keys.len() > tiles && (named, given, told) == (id, keys.len(), tiles));
            Some("refused: not sealed")
        }
        Err(PoolError::Table(TableError::RepeatedKey { first, second, .. })) => {
            assert!(repeated && (first, second) == (0, 1));
            Some("refused: a key twice")
        }
        Err(PoolError::Table(TableError::PublishedTile { sequence: named, tile })) => {
            assert_eq!((named, Some(tile)), (id, elsewhere));
            Some("refused: published under other keys")
        }
        Err(error) => Some(sequence.check_refusal(&error)),
    }
}
