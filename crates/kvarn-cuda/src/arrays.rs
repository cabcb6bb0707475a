//! The arrays of a step on the device: its own, or static ones, which a captured graph reads step after step.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvarn::pool::PoolError;
use kvarn::tables::{SealRule, StepId};

use crate::plan::{AttendKey, item_tiles, most_record_items};
use crate::share::{Cost, Grid};
use crate::upload::{StepBuffer, Words};
use crate::workspace::Workspace;
use crate::{Error, Kernel, Pool, Stream};

/// An append's arrays on the device.
#[derive(Debug)]
pub(crate) struct SentAppend {
    /// The step whose arrays they are, and the stream that they were sent on.
    pub sent: (StepId, Stream),
    pub buffer: StepBuffer,
    pub slot_of_row: Words,
    pub seals: Words,
    /// Seals, those included that a kernel skips.
    pub count: usize,
}

/// An attention's arrays on the device, and room for its partial results.
#[derive(Debug)]
pub(crate) struct SentAttend {
    pub key: AttendKey,
    pub head_dim: usize,
    pub kernel: Kernel,
    /// Dynamic shared memory of the launch.
    pub shared: u32,
    pub grid: Grid,
    pub cost: Cost,
    /// As of [`SentAppend`].
    pub sent: (StepId, Stream),
    pub buffer: StepBuffer,
    pub items: Words,
    pub shares: Words,
    /// Thread blocks of each launch, one for each share.
    pub blocks: Vec<usize>,
    /// Items that there is room for.
    pub item_count: usize,
    pub columns: usize,
    /// Partial results that there is room for.
    pub parts: usize,
    pub workspace: Workspace,
}

impl SentAttend {
    /// Elements of all partial outputs.
    pub(crate) fn outputs(&self) -> usize {
        self.parts * self.key.kv_heads * self.columns * self.head_dim
    }
}

/// What a step has on the device; made when it is first needed.
#[derive(Debug, Default)]
pub(crate) struct Arrays {
    pub append: Mutex<Option<SentAppend>>,
    pub attend: Mutex<Vec<SentAttend>>,
}

impl Arrays {
    pub(crate) fn append(&self) -> MutexGuard<'_, Option<SentAppend>> {
        self.append.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn attend(&self) -> MutexGuard<'_, Vec<SentAttend>> {
        self.attend.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Arrays whose addresses stay, for steps of one shape: a graph that was captured with one step runs later ones, once
/// their arrays have been sent here.
///
/// Must outlive the graphs that were captured with it.
#[derive(Debug)]
pub struct StaticArrays {
    pool: Arc<Pool>,
    shape: StepShape,
    arrays: Arc<Arrays>,
    /// The step that uses them, or did last.
    user: Mutex<Option<StepId>>,
}

/// Static arrays that are about to be lent.
pub(crate) struct Lending<'a> {
    of: &'a StaticArrays,
    user: MutexGuard<'a, Option<StepId>>,
}

/// New tokens of each sequence, and tokens of the longest sequence: launches of all steps are of the same size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepShape {
    pub counts: Vec<usize>,
    pub tokens: usize,
}

impl StaticArrays {
    /// Arrays for steps of `pool` in which sequence i of the batch gets `counts[i]` new tokens and none has more than `tokens`
    /// tokens then. Nothing is allocated before the first step that uses them.
    pub fn new(pool: &Arc<Pool>, counts: &[usize], tokens: usize) -> Result<Arc<Self>, Error> {
        let most = counts.iter().copied().max().unwrap_or(0);
        if most == 0 || most > tokens {
            let (what, got) = if most == 0 {
                ("counts", format!("{counts:?} of static arrays"))
            } else {
                ("tokens", format!("{tokens} of static arrays"))
            };
            let expected = if most == 0 {
                "a new token or more".into()
            } else {
                format!("{most}, the largest count, or more")
            };
            let fix = "pass the counts of the steps, and the longest length that a sequence will have";
            return Err(PoolError::Value { what, got, expected, fix }.into());
        }
        let shape = StepShape { counts: counts.to_vec(), tokens };
        Ok(Arc::new(Self { pool: Arc::clone(pool), shape, arrays: Arc::default(), user: Mutex::default() }))
    }

    /// Checks that a step of `pool` with these counts may use the arrays; nobody else is told the same until
    /// [`Lending::to`] says which step does.
    pub(crate) fn lend(&self, pool: &Arc<Pool>, counts: &[usize]) -> Result<Lending<'_>, Error> {
        let refuse = |text: String| Err(PoolError::Order(text).into());
        if !Arc::ptr_eq(pool, &self.pool) {
            return refuse(
                "static arrays of another pool: expected those of this pool; make them with its static_arrays".into(),
            );
        }
        if counts != self.shape.counts {
            let (got, expected) =
                (format!("{counts:?} with static arrays"), format!("{:?}", self.shape.counts));
            let fix = "make static arrays for each shape of step";
            return Err(PoolError::Value { what: "counts", got, expected, fix }.into());
        }
        let user = self.user.lock().unwrap_or_else(PoisonError::into_inner);
        if (*user).is_some_and(|step| pool.core().is_open(step)) {
            return refuse(
                "static arrays that an open step uses: expected one step at a time; finish or abandon it"
                    .into(),
            );
        }
        Ok(Lending { of: self, user })
    }
}

impl Lending<'_> {
    /// Lends the arrays to an open step.
    pub(crate) fn to(mut self, step: StepId) -> (Arc<Arrays>, StepShape) {
        *self.user = Some(step);
        (Arc::clone(&self.of.arrays), self.of.shape.clone())
    }
}

impl StepShape {
    /// Most tiles that a step of this shape seals: what it commits are its own tokens and as many that were held.
    pub(crate) fn seals(&self, rule: &SealRule) -> usize {
        let group = rule.group();
        self.counts.iter().map(|count| (2 * count).div_ceil(group)).sum()
    }

    /// Most items, and partial results, of an attention.
    pub(crate) fn items(&self, rule: &SealRule, key: AttendKey) -> usize {
        let records = most_record_items(rule.tiles(self.tokens), rule.group(), key);
        let hold = self.counts.iter().copied().max().unwrap_or(0);
        self.query_blocks(key) * (most_slots(rule, hold) + records)
    }

    /// Most that an attention reads of one KV head.
    pub(crate) fn cost(&self, rule: &SealRule, key: AttendKey, cost: Cost) -> u64 {
        let tiles = rule.tiles(self.tokens) * self.query_blocks(key);
        let hold = self.counts.iter().copied().max().unwrap_or(0);
        let slots = most_slots(rule, hold) * self.query_blocks(key);
        cost.of(self.items(rule, key), tiles, slots * rule.group())
    }

    /// What an item of its longest sequences reads of one KV head.
    pub(crate) fn largest(&self, rule: &SealRule, key: AttendKey, cost: Cost) -> u64 {
        let tiles = item_tiles(self.tokens, rule.group(), key).min(rule.tiles(self.tokens));
        cost.of(1, tiles, 0)
    }

    fn query_blocks(&self, key: AttendKey) -> usize {
        self.counts.iter().map(|count| count.div_ceil(key.query_tokens)).sum()
    }
}

/// Most slots that a query reads where no step holds back more than `hold` tokens: of the sinks, and of tiles that are not
/// sealed, which are those of the recent window, less than a tile more, and what is held.
pub(crate) fn most_slots(rule: &SealRule, hold: usize) -> usize {
    let tail = (rule.recent_tokens() + rule.group() - 1 + hold).div_ceil(rule.group()) + 1;
    usize::from(rule.sink_tokens() > 0) + tail
}

#[cfg(test)]
mod tests {
    use kvarn::tables::Tables;
    use proptest::prelude::*;

    use super::*;
    use crate::params::ITEM_WORDS;
    use crate::plan::{AppendPlan, AttendPlan};
    use crate::share::launches;

    /// What planning on the host costs: once a step, for all layers. Prints µs.
    #[test]
    #[ignore = "measures; run it with --release and --nocapture"]
    fn planning_time() {
        let rule = SealRule::new(128, 128, 0).unwrap();
        for (batch, tokens) in [(1, 4_096), (1, 131_072), (8, 32_768), (64, 4_096), (64, 32_768)] {
            let mut tables = Tables::new(rule, batch * tokens / 128, 4 * batch).unwrap();
            let ids: Vec<_> = (0..batch).map(|_| tables.create()).collect();
            let mut microseconds: [Vec<f64>; 2] = Default::default();
            let prompt = tables.plan_step(&ids, &vec![tokens - 200; batch], &vec![0; batch]).unwrap();
            tables.finish(prompt.id).unwrap();
            for _ in 0..100 {
                let start = std::time::Instant::now();
                let plan = tables.plan_step(&ids, &vec![1; batch], &vec![0; batch]).unwrap();
                let planned = start.elapsed();
                let start = std::time::Instant::now();
                let key = AttendKey {
                    appended: true,
                    kv_heads: 8,
                    group: 4,
                    query_tokens: 2,
                    window: usize::MAX,
                    most_tokens: usize::MAX,
                    most_parts: usize::MAX,
                };
                let (append, attend) = (AppendPlan::new(&plan, 128), AttendPlan::new(&plan, &rule, key));
                let cost = Cost { record: 13_824, token: 512 };
                let (shares, _) = launches(&attend, 8, Grid { resident: 396, room: None }, cost);
                assert_eq!(append.slot_of_row.len(), batch);
                assert!(!shares.is_empty());
                for (kept, time) in microseconds.iter_mut().zip([planned, start.elapsed()]) {
                    kept.push(time.as_secs_f64() * 1e6);
                }
                tables.finish(plan.id).unwrap();
            }
            for times in &mut microseconds {
                times.sort_by(f64::total_cmp);
            }
            let [tables, arrays] = microseconds.map(|times| times[50]);
            println!("batch {batch} of {tokens} tokens: tables {tables:.1} µs, arrays {arrays:.1} µs");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn steps_of_a_shape_have_room(
            counts in prop::collection::vec(1..20_usize, 1..4),
            prompt in prop_oneof![0..2_000_usize, 60_000..70_000_usize],
            sinks in prop_oneof![Just(0_usize), Just(16), Just(64)],
            recent in 0..256_usize,
            query_tokens in 1..8_usize,
            kv_heads in 1..9_usize,
        ) {
            let rule = SealRule::new(64, sinks, recent).unwrap();
            let shape = StepShape { counts: counts.clone(), tokens: prompt + 40 * 20 };
            let mut tables = Tables::new(rule, 20_000, 1_000).unwrap();
            let ids: Vec<_> = counts.iter().map(|_| tables.create()).collect();
            let first = tables.plan_step(&ids, &vec![prompt; ids.len()], &vec![0; ids.len()]).unwrap();
            tables.finish(first.id).unwrap();
            for round in 0..40_usize {
                let hold: Vec<usize> = counts.iter().map(|count| round % 3 * count / 2).collect();
                let plan = tables.plan_step(&ids, &counts, &hold).unwrap();
                prop_assert!(AppendPlan::new(&plan, 64).count() <= shape.seals(&rule));
                for appended in [false, true] {
                    let (window, most_tokens) = (usize::MAX, usize::MAX);
                    let key = AttendKey { appended, kv_heads, group: 2, query_tokens, window, most_tokens, most_parts: usize::MAX };
                    let arrays = AttendPlan::new(&plan, &rule, key);
                    prop_assert!(arrays.count() <= shape.items(&rule, key) && arrays.parts <= shape.items(&rule, key));
                    let cost = Cost { record: 3_000, token: 256 };
                    let items = arrays.items.chunks_exact(ITEM_WORDS);
                    prop_assert!(items.map(|item| cost.of_item(item)).sum::<u64>() <= shape.cost(&rule, key, cost));
                }
                tables.finish(plan.id).unwrap();
            }
        }
    }
}
