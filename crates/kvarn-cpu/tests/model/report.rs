//! Operations counted by kind and outcome, and what they made the pool do.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;

#[derive(Default)]
pub(crate) struct Report {
    counts: BTreeMap<(&'static str, &'static str), u64>,
    effects: BTreeMap<&'static str, u64>,
    pub(crate) total: u64,
}

impl Report {
    pub(crate) fn count(&mut self, operation: &'static str, outcome: &'static str) {
        *self.counts.entry((operation, outcome)).or_default() += 1;
        self.total += 1;
    }

    /// Notes what operations made the pool do: how much of it a run has reached.
    pub(crate) fn add_effects(&mut self, effects: &BTreeMap<&'static str, u64>) {
        for (effect, count) in effects {
            *self.effects.entry(effect).or_default() += count;
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = "";
        for (&(operation, outcome), count) in &self.counts {
            let separator = if operation == last { ", " } else { "\n    " };
            let name = if operation == last { String::new() } else { format!("{operation}: ") };
            write!(f, "{separator}{name}{count} {outcome}")?;
            last = operation;
        }
        for (index, (effect, count)) in self.effects.iter().enumerate() {
            write!(f, "{}{count} {effect}", if index == 0 { "\n    in these: " } else { ", " })?;
        }
        Ok(())
    }
}

/// Prints also where the test harness keeps back what `println!` prints: the counts are what a run is worth.
pub(crate) fn announce(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}
