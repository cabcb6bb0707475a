//! A shorter list of operations that fails too.

use std::time::{Duration, Instant};

use crate::report::Report;
use crate::run::play;
use crate::setup::Setup;

/// Time for the search.
const LIMIT: Duration = Duration::from_secs(30);

/// Leaves out ever smaller parts of the operations, as long as the rest fails in some way; returns what is left, and how
/// it fails.
pub(crate) fn shrink(setup: &'static Setup, seed: u64, mut numbers: Vec<usize>) -> (Vec<usize>, String) {
    let start = Instant::now();
    let mut text = String::from("they did not fail again");
    let mut part = numbers.len().div_ceil(2);
    loop {
        let mut first = 0;
        let mut shorter = false;
        while first < numbers.len() && start.elapsed() < LIMIT {
            let end = (first + part).min(numbers.len());
            let mut fewer = numbers.clone();
            fewer.drain(first..end);
            match play(setup, seed, &fewer, &mut Report::default()) {
                Err(failure) => {
                    fewer.retain(|&number| number <= failure.number);
                    (numbers, text, shorter) = (fewer, failure.text, true);
                }
                Ok(()) => first = end,
            }
        }
        if start.elapsed() >= LIMIT || (part == 1 && !shorter) {
            return (numbers, text);
        }
        part = part.div_ceil(2);
    }
}
