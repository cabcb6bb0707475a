//! Calls that an open, or a closed, step must refuse.

use fastrand::Rng;
use kvarn::pool::{AttendOptions, PoolError};
use kvarn_cpu::Error;

use super::Outcome;
use crate::floats::Floats;
use crate::open_step::Request;
use crate::values::Rows;
use crate::world::World;

pub(super) fn run(world: &mut World, random: &mut Rng) -> Outcome {
    let idle = world.idle_sequences();
    let &sequence = idle.get(random.usize(..idle.len().max(1)))?;
    let mut open = world.plan(&[Request { sequence, count: 2, hold: 0 }], random)?;
    let &(heads, head_dim) = &world.setup.layers[0];
    let short = Rows::random(world.setup.input, [1, heads, head_dim], random);
    let error = open.step.append(0, &short.k.tensor(), &short.v.tensor(), false).unwrap_err();
    assert!(matches!(error, Error::Pool(PoolError::Shape { what: "k", .. })), "{error}");
    let mut out = Floats::zeros([1, heads, head_dim]);
    let q = Floats::random(out.shape, random);
    let attend = open.step.attend(0, &q.tensor(), &AttendOptions::default(), None, &out.tensor_mut(), None);
    assert!(matches!(attend, Err(Error::Pool(PoolError::Shape { what: "q", .. }))));
    assert!(matches!(open.step.open().finish(), Err(PoolError::Order(_))), "finished before every append");

    for layer in 0..open.appended.len() {
        world.append(&mut open, layer);
    }
    let whole = Rows::random(world.setup.input, [2, heads, head_dim], random);
    let append = |step: &kvarn_cpu::Step| step.append(0, &whole.k.tensor(), &whole.v.tensor(), false);
    assert!(matches!(append(&open.step), Err(Error::Pool(PoolError::Order(_)))), "appended to twice");
    open.step.open().finish().unwrap();
    assert!(matches!(append(&open.step), Err(Error::Pool(PoolError::Order(_)))), "appended to a closed step");
    assert!(matches!(open.step.open().finish(), Err(PoolError::Order(_))), "finished twice");
    open.step.open().abandon();
    world.settle(open);
    Some("done")
}
