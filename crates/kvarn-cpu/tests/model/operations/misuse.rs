//! Calls that a pool must refuse: stale and foreign handles, arguments that do not fit. The checks after every operation
//! show that nothing has changed.

use fastrand::Rng;
use kvarn::pool::PoolError;
use kvarn::tables::{SequenceId, TableError};
use kvarn_cpu::Error;

use super::Outcome;
use crate::floats::Floats;
use crate::sequence::State;
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    match random.u8(..4) {
        0 => {
            let freed = *world.freed.back()?;
            handle(world, freed, &TableError::FreedSequence { sequence: freed });
            Some("freed handle")
        }
        1 => {
            let foreign = world.stranger.1;
            handle(world, foreign, &TableError::ForeignSequence { sequence: foreign });
            Some("foreign handle")
        }
        2 => {
            batch(world, random)?;
            Some("batch that does not fit")
        }
        _ => {
            arguments(world, random)?;
            Some("numbers out of range")
        }
    }
}

/// Everything that takes a handle refuses this one.
fn handle(world: &World, id: SequenceId, expected: &TableError) {
    let core = world.pool.core();
    let expected = PoolError::Table(expected.clone());
    assert_eq!(core.view(id).unwrap_err(), expected);
    assert_eq!(core.free(id).unwrap_err(), expected);
    assert_eq!(core.fork(id).unwrap_err(), expected);
    assert_eq!(pool_error(world.pool.truncate(id, 0)), expected);
    assert_eq!(pool_error(world.pool.save(id)), expected);
    assert_eq!(pool_error(world.pool.offload(id)), expected);
    assert_eq!(pool_error(world.pool.restore(id)), expected);
    assert_eq!(core.reorder(&[id], &[0]).unwrap_err(), expected);
    assert_eq!(core.step(&[id], &[1], &[0]).unwrap_err(), expected);
}

/// The refusal of a call that must not succeed.
fn pool_error<T: std::fmt::Debug>(result: Result<T, Error>) -> PoolError {
    match result.unwrap_err() {
        Error::Pool(error) => error,
        error => panic!("{error}"),
    }
}

fn batch(world: &World, random: &mut Rng) -> Outcome {
    let idle = world.idle_sequences();
    let id = world.sequences[*idle.get(random.usize(..idle.len().max(1)))?].id;
    let core = world.pool.core();
    let refused = |result: Result<_, PoolError>| match result.map(|_: kvarn::pool::OpenStep| ()).unwrap_err()
    {
        PoolError::Table(error) => error,
        error => panic!("{error}"),
    };
    assert_eq!(refused(core.step(&[], &[], &[])), TableError::NoSequences);
    let error = TableError::BatchLengths { sequences: 1, counts: 2, hold: 1 };
    assert_eq!(refused(core.step(&[id], &[1, 1], &[0])), error);
    let error = TableError::HoldExceedsCount { sequence: id, hold: 2, count: 1 };
    assert_eq!(refused(core.step(&[id], &[1], &[2])), error);
    let error = TableError::DuplicateSequence { sequence: id, first: 0, second: 1 };
    assert_eq!(refused(core.step(&[id, id], &[1, 1], &[0, 0])), error);
    assert_eq!(core.reorder(&[id, id], &[0, 1]).unwrap_err(), PoolError::Table(error));
    let error = TableError::OrderLength { order: 2, sequences: 1 };
    assert_eq!(core.reorder(&[id], &[0, 0]).unwrap_err(), PoolError::Table(error));
    let error = TableError::OrderIndex { index: 0, from: 1, sequences: 1 };
    assert_eq!(core.reorder(&[id], &[1]).unwrap_err(), PoolError::Table(error));
    for busy in world.sequences.iter().filter(|sequence| sequence.state != State::Idle) {
        busy.check_refusal(&PoolError::Table(refused(core.step(&[id, busy.id], &[1, 1], &[0, 0]))));
        busy.check_refusal(&core.reorder(&[id, busy.id], &[1, 0]).unwrap_err());
    }
    Some("")
}

fn arguments(world: &World, random: &mut Rng) -> Outcome {
    let sequence = &world.sequences[world.any_sequence(random)?];
    let (id, length) = (sequence.id, sequence.stored.length());
    if sequence.state == State::Idle {
        let error = TableError::TruncateBeyondLength { sequence: id, keep: length + 1, length };
        assert_eq!(pool_error(world.pool.truncate(id, length + 1)), PoolError::Table(error));
    }
    if sequence.state == State::Away {
        let mut nothing = Floats::zeros([0, 1, 16]);
        let mut also_nothing = Floats::zeros(nothing.shape);
        let expand = world.pool.expand(id, 0, 0, true, &nothing.tensor_mut(), &also_nothing.tensor_mut());
        sequence.check_refusal(&pool_error(expand));
        return Some("");
    }
    let at = &world.codec.layers[0];
    let expand = |layer: usize, shape: [usize; 3], first: usize| {
        let (mut k, mut v) = (Floats::zeros(shape), Floats::zeros(shape));
        world.pool.expand(id, layer, first, true, &k.tensor_mut(), &v.tensor_mut()).unwrap_err()
    };
    let token = [1, at.kv_heads, at.head_dim];
    assert!(matches!(expand(0, token, length), Error::Pool(PoolError::Value { what: "tokens", .. })));
    assert!(matches!(expand(0, token, usize::MAX), Error::Pool(PoolError::Value { what: "tokens", .. })));
    let error = expand(world.codec.layers.len(), token, 0);
    assert!(matches!(error, Error::Pool(PoolError::Value { what: "layer", .. })));
    let error = expand(0, [1, at.kv_heads + 1, at.head_dim], 0);
    assert!(matches!(error, Error::Pool(PoolError::Shape { what: "k", .. })));
    Some("")
}
