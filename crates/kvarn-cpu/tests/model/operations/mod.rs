//! The operations: one file each, and this table.

mod close;
mod create;
mod fork;
mod free;
mod load;
mod misuse;
mod misuse_step;
mod offload;
mod publish;
mod reorder;
mod restore;
mod save;
mod start;
mod step;
mod truncate;
mod unpublish;

use fastrand::Rng;

use crate::world::World;

/// What came of an operation: a word for the report, `None` if there was nothing to operate on.
pub(crate) type Outcome = Option<&'static str>;

/// One kind of operation. It acts on the pool and on the model, and asserts that what the pool says is right; the world
/// is checked afterwards.
pub(crate) struct Operation {
    pub(crate) name: &'static str,
    /// How often it is drawn, in proportion.
    weight: u32,
    pub(crate) run: fn(&mut World, &mut Rng) -> Outcome,
}

const OPERATIONS: [Operation; 16] = [
    Operation { name: "step", weight: 240, run: step::run },
    Operation { name: "close", weight: 32, run: close::run },
    Operation { name: "create", weight: 24, run: create::run },
    Operation { name: "fork", weight: 32, run: fork::run },
    Operation { name: "reorder", weight: 12, run: reorder::run },
    Operation { name: "truncate", weight: 32, run: truncate::run },
    Operation { name: "save", weight: 12, run: save::run },
    Operation { name: "load", weight: 12, run: load::run },
    Operation { name: "offload", weight: 12, run: offload::run },
    Operation { name: "restore", weight: 16, run: restore::run },
    Operation { name: "publish", weight: 24, run: publish::run },
    Operation { name: "start", weight: 20, run: start::run },
    Operation { name: "unpublish", weight: 1, run: unpublish::run },
    Operation { name: "free", weight: 24, run: free::run },
    Operation { name: "misuse", weight: 8, run: misuse::run },
    Operation { name: "misuse of a step", weight: 4, run: misuse_step::run },
];

/// A random operation.
pub(crate) fn draw(random: &mut Rng) -> &'static Operation {
    let weights: u32 = OPERATIONS.iter().map(|operation| operation.weight).sum();
    let mut ticket = random.u32(..weights);
    for operation in &OPERATIONS {
        match ticket.checked_sub(operation.weight) {
            Some(rest) => ticket = rest,
            None => return operation,
        }
    }
    unreachable!("the ticket is below the sum of the weights")
}
