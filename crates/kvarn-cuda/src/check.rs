//! The debug check of a step's arrays: what a kernel takes for a place in the pool must be one.

use std::ops::RangeInclusive;

use kvarn::pool::PoolLayout;
use kvarn::tables::{SequencePlan, StepPlan};

use crate::Error;
use crate::params::{ITEM_TILES, ITEM_WORDS, SEAL_WORDS};
use crate::plan::AppendPlan;

/// Checks that every word of an array, or every `stride`-th from `first` on, lies in `range`.
fn within(
    array: &'static str,
    words: &[i32],
    (first, stride): (usize, usize),
    range: RangeInclusive<i64>,
) -> Result<(), Error> {
    let places = words.iter().enumerate().skip(first).step_by(stride);
    for (index, value) in places.map(|(index, &value)| (index, i64::from(value))) {
        if !range.contains(&value) {
            return Err(Error::OutOfRange { array, index, value, low: *range.start(), high: *range.end() });
        }
    }
    Ok(())
}

/// Checks the tables of a step, from which attention's arrays are made.
pub(crate) fn tables(plan: &StepPlan, layout: &PoolLayout) -> Result<(), Error> {
    let (pages, slots) = (layout.pages as i64, layout.slots as i64);
    for SequencePlan { before, after, .. } in &plan.sequences {
        for view in [before, after] {
            within("block_table", &view.block_table, (0, 1), -1..=pages - 1)?;
            within("slot_table", &view.slot_table, (0, 1), -1..=slots - 1)?;
        }
    }
    Ok(())
}

/// Checks the arrays of an append of `rows` rows.
pub(crate) fn append(arrays: &AppendPlan, rows: usize, layout: &PoolLayout) -> Result<(), Error> {
    let (pages, slots, group) = (layout.pages as i64, layout.slots as i64, layout.rule.group() as i64);
    within("slot_of_row", &arrays.slot_of_row, (0, 1), -1..=slots * group - 1)?;
    let seals = &arrays.seals;
    within("seals", seals, (0, SEAL_WORDS), -1..=pages - 1)?;
    within("seals", seals, (1, SEAL_WORDS), -1..=slots - 1)?;
    within("seals", seals, (2, SEAL_WORDS), 0..=group)?;
    within("seals", seals, (3, SEAL_WORDS), 0..=(rows as i64 - 1).max(0))?;
    for seal in seals.chunks_exact(SEAL_WORDS).filter(|seal| seal[0] >= 0) {
        // The tile's tokens from the third word on come with the rows, from the fourth word's row on.
        let last = i64::from(seal[3]) + group - i64::from(seal[2]);
        if last > rows as i64 {
            let (index, high) = (seals.len(), rows as i64);
            return Err(Error::OutOfRange { array: "seals", index, value: last, low: 0, high });
        }
    }
    Ok(())
}

/// Checks the slots and the pages of attention's items.
pub(crate) fn items(words: &[i32], layout: &PoolLayout) -> Result<(), Error> {
    within("items", words, (2, ITEM_WORDS), 0..=(layout.slots as i64 - 1).max(0))?;
    let pages = 0..=(layout.pages as i64 - 1).max(0);
    (ITEM_WORDS - ITEM_TILES..ITEM_WORDS)
        .try_for_each(|at| within("items", words, (at, ITEM_WORDS), pages.clone()))
}

#[cfg(test)]
mod tests {
    use kvarn::codec::SlotType;
    use kvarn::pool::LayerShape;
    use kvarn::{Config, ConfigOptions};

    use super::*;

    fn layout() -> PoolLayout {
        let config = Config::new(&ConfigOptions::from_name("kvarn_k4v2_g64", 64).unwrap()).unwrap();
        let shape = LayerShape { kv_heads: 1, head_dim: 64 };
        PoolLayout::new(config, &[shape], 10, 5, SlotType::Float16).unwrap()
    }

    fn refused(slot_of_row: &[i32], seals: &[i32]) -> String {
        let arrays = AppendPlan { slot_of_row: slot_of_row.to_vec(), seals: seals.to_vec() };
        append(&arrays, slot_of_row.len(), &layout()).unwrap_err().to_string()
    }

    #[test]
    fn array_index_and_value_are_named() {
        assert_eq!(
            refused(&[0, 5 * 64], &[]),
            "320 at 1 of the step's array \"slot_of_row\": expected -1 to 319; the tables are damaged: report it as a bug \
             of kvarn"
        );
        assert!(
            refused(&[-2], &[])
                .starts_with("-2 at 0 of the step's array \"slot_of_row\": expected -1 to 319")
        );
        for (seal, text) in [
            ([10, -1, 63, 0], "10 at 4 of the step's array \"seals\": expected -1 to 9"),
            ([9, 5, 63, 0], "5 at 5 of the step's array \"seals\": expected -1 to 4"),
            ([9, 4, 65, 0], "65 at 6 of the step's array \"seals\": expected 0 to 64"),
            ([9, 4, 63, 2], "2 at 7 of the step's array \"seals\": expected 0 to 1"),
            ([9, 4, 61, 0], "3 at 8 of the step's array \"seals\": expected 0 to 2"),
        ] {
            let refused = refused(&[0, 1], &[[9, 4, 62, 0], seal].concat());
            assert!(refused.starts_with(text), "{refused}");
        }
        for (at, value, text) in [(2, 5, "expected 0 to 4"), (ITEM_WORDS - 1, 10, "expected 0 to 9")] {
            let mut words = vec![0; 2 * ITEM_WORDS];
            words[ITEM_WORDS + at] = value;
            let error = items(&words, &layout()).unwrap_err().to_string();
            let index = ITEM_WORDS + at;
            assert!(
                error.starts_with(&format!("{value} at {index} of the step's array \"items\": {text}")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_steps_own_arrays_pass() {
        let arrays = AppendPlan { slot_of_row: vec![-1, 319, 0], seals: vec![9, -1, 64, 0, -1, -1, 64, 0] };
        append(&arrays, 3, &layout()).unwrap();
        items(&[0; ITEM_WORDS], &layout()).unwrap();
    }
}
