//! Runs: random operations on one fresh pool after another, and what is told of a failure.
//!
//! Everything random comes of the seed of a pool and the number of an operation, so that any of a run's operations can be
//! left out and the others played again.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::operations::draw;
use crate::quiet::quietly;
use crate::report::{Report, announce};
use crate::setup::Setup;
use crate::shrink::shrink;
use crate::world::World;

/// Operations on one pool: enough for it to age, few enough to play a failure again many times.
pub(crate) const OPERATIONS_PER_POOL: usize = 1500;

/// A long run says so often how far it is.
const PROGRESS: Duration = Duration::from_secs(60);

/// What a run is asked to do.
pub(crate) struct Order {
    /// Operations in all.
    pub(crate) operations: u64,
    /// Seed of the first pool; the next pools have the next seeds.
    pub(crate) seed: u64,
    /// Only these operations of the first pool.
    pub(crate) only: Option<Vec<usize>>,
}

/// How a run of one pool failed.
pub(crate) struct Failure {
    /// Number of the operation.
    pub(crate) number: usize,
    pub(crate) text: String,
}

/// Runs one configuration; panics with a way to play the failure again.
pub(crate) fn run(name: &str, setup: &'static Setup, order: &Order) {
    let start = Instant::now();
    let mut said = start;
    let mut report = Report::default();
    let mut seed = order.seed;
    loop {
        let numbers = order.only.clone().unwrap_or_else(|| (0..OPERATIONS_PER_POOL).collect());
        if let Err(failure) = play(setup, seed, &numbers, &mut report) {
            fail(name, setup, seed, &numbers, &failure);
        }
        if order.only.is_some() || report.total >= order.operations {
            break;
        }
        seed += 1;
        if said.elapsed() > PROGRESS {
            said = Instant::now();
            announce(&format!(
                "{name}: {} of {} operations, {} s",
                report.total,
                order.operations,
                start.elapsed().as_secs()
            ));
        }
    }
    let (total, seconds) = (report.total, start.elapsed().as_secs_f64());
    let rate = total as f64 / seconds;
    announce(&format!(
        "{name}: {total} operations, seeds {} to {seed}, {seconds:.1} s, {rate:.0} operations a second{report}",
        order.seed
    ));
}

/// Plays operations on a fresh pool, checks after each, and empties the pool in the end.
pub(crate) fn play(
    setup: &'static Setup,
    seed: u64,
    numbers: &[usize],
    report: &mut Report,
) -> Result<(), Failure> {
    let number = Cell::new(0);
    let played = catch_unwind(AssertUnwindSafe(|| {
        quietly(|| {
            let mut world = World::new(setup, &mut Rng::with_seed(seed));
            for &next in numbers {
                number.set(next);
                let mut random = random_of(seed, next);
                let operation = draw(&mut random);
                if let Some(outcome) = (operation.run)(&mut world, &mut random) {
                    report.count(operation.name, outcome);
                }
                world.check_accounting();
                world.check_contents(&mut random);
            }
            report.add_effects(&world.effects);
            world.empty(&mut random_of(seed, usize::MAX));
        });
    }));
    played.map_err(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        let text = text.or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string));
        Failure { number: number.get(), text: text.unwrap_or_else(|| "a panic without a text".into()) }
    })
}

/// The random source of one operation.
fn random_of(seed: u64, number: usize) -> Rng {
    Rng::with_seed(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(number as u64))
}

fn fail(name: &str, setup: &'static Setup, seed: u64, numbers: &[usize], failure: &Failure) -> ! {
    let Failure { number, text } = failure;
    announce(&format!(
        "{name}: seed {seed}, operation {number}: {text}\n    looking for fewer operations that fail"
    ));
    let numbers: Vec<usize> = numbers.iter().copied().filter(|other| other <= number).collect();
    let (few, last) = shrink(setup, seed, numbers);
    let names: Vec<&str> = few.iter().map(|&number| draw(&mut random_of(seed, number)).name).collect();
    let list = few.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    panic!(
        "seed {seed}, operation {number}: {text}\n{} operations that fail ({}): {last}\nplay them again:\n\
         KVARN_MODEL_SEED={seed} KVARN_MODEL_ONLY={list} cargo test -p kvarn-kv-cpu --test model {name}",
        few.len(),
        names.join(", ")
    );
}
