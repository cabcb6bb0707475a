//! Random steps of a batch: what attention reads, and what an append writes and seals, carried out on lists of values.

use std::collections::HashMap;
use std::sync::Arc;

use kvarn::tables::{Place, SequenceId, Span, Tables, Unseal};
use proptest::prelude::*;

use super::*;

/// New tokens and held tokens of each sequence in a step, and tokens cut off each sequence after it.
type Batch = Vec<(usize, usize, usize)>;

fn rules() -> impl Strategy<Value = SealRule> {
    prop::sample::select(vec![8_usize, 64, 128]).prop_flat_map(|group| {
        let sinks = prop_oneof![Just(0), Just(group), 0..=group];
        let recent = prop_oneof![2 => Just(0), 1 => 0..=4 * group];
        (Just(group), sinks, recent)
            .prop_map(|(group, sinks, recent)| SealRule::new(group, sinks, recent).unwrap())
    })
}

/// Steps of three sequences: short ones, and prompts long enough for every size of an item.
fn batches() -> impl Strategy<Value = Vec<Batch>> {
    let count = prop_oneof![4 => 0..40_usize, 2 => 0..700_usize, 1 => 0..150_000_usize];
    let hold = prop_oneof![2 => Just(0), 1 => 0..9_usize];
    let drop = prop_oneof![2 => Just(0), 1 => 0..12_usize, 1 => 0..500_usize];
    prop::collection::vec(prop::collection::vec((count, hold, drop), 3), 1..8)
}

fn keys() -> impl Strategy<Value = AttendKey> {
    let window = prop_oneof![2 => Just(usize::MAX), 1 => 1..20_usize, 1 => 1..2000_usize];
    let most_tokens = prop_oneof![2 => Just(usize::MAX), 1 => 0..100_usize];
    let most_parts = prop_oneof![1 => Just(usize::MAX), 1 => 1..200_usize];
    (any::<bool>(), 1..=9_usize, 1..=16_usize, 1..=16_usize, window, most_tokens, most_parts).prop_map(
        |(appended, kv_heads, group, query_tokens, window, most_tokens, most_parts)| AttendKey {
            appended,
            kv_heads,
            group,
            query_tokens,
            window,
            most_tokens,
            most_parts,
        },
    )
}

/// `key` with larger blocks where a step is long: as many blocks as a test has time for.
fn with_few_blocks(key: AttendKey, plan: &StepPlan) -> AttendKey {
    AttendKey { query_tokens: key.query_tokens.max(plan.tokens / 32), ..key }
}

/// What happened between two steps.
#[derive(Default)]
struct Between {
    /// Records that truncations decoded.
    unseals: Vec<Unseal>,
    /// A sequence, and its fork.
    forked: Option<(SequenceId, SequenceId)>,
}

/// Runs the steps; `check` sees each plan while it is open, and what came before it. After each step the sequences are
/// truncated; before every third the last one is replaced by a fork of the first.
fn run(rule: SealRule, batches: &[Batch], mut check: impl FnMut(&StepPlan, &Between)) {
    let mut tables = Tables::new(rule, 300_000, 300_000).unwrap();
    let mut ids: Vec<SequenceId> = (0..3).map(|_| tables.create()).collect();
    let mut between = Between::default();
    for (index, batch) in batches.iter().enumerate() {
        if index % 3 == 2 {
            tables.free(ids[2]).unwrap();
            ids[2] = tables.fork(ids[0]).unwrap();
            between.forked = Some((ids[0], ids[2]));
        }
        let counts: Vec<usize> = batch.iter().map(|&(count, ..)| count).collect();
        let hold: Vec<usize> = batch.iter().map(|&(count, hold, _)| hold.min(count)).collect();
        let plan = tables.plan_step(&ids, &counts, &hold).unwrap();
        check(&plan, &between);
        tables.finish(plan.id).unwrap();
        between = Between::default();
        for (&id, &(.., drop)) in ids.iter().zip(batch) {
            let length = tables.view(id).unwrap().length;
            let truncation = tables.plan_truncation(id, length.saturating_sub(drop)).unwrap();
            between.unseals.extend(truncation.unseal());
            truncation.commit();
        }
    }
}

/// The words of one item.
struct Words<'a> {
    words: &'a [i32],
    pages: &'a [i32],
}

impl Words<'_> {
    fn at(&self, index: usize) -> usize {
        usize::try_from(self.words[index]).expect("no word of an item is negative")
    }

    /// What the kernel reads for the item, tile by tile.
    fn reads(&self, rule: &SealRule) -> Vec<Span> {
        let (first_tile, tiles, slot, slot_tokens) = (self.at(0), self.at(1), self.at(2), self.at(3));
        let group = rule.group();
        if tiles == 0 {
            let span = Span {
                position: first_tile * group,
                offset: 0,
                count: slot_tokens,
                place: Place::Slot(slot),
            };
            return if slot_tokens > 0 { vec![span] } else { vec![] };
        }
        assert!(tiles <= ITEM_TILES);
        assert!(self.pages[tiles..].iter().all(|&page| page == 0));
        let span = |index: usize| {
            let tile = first_tile + index;
            let offset = if tile == 0 { rule.sink_tokens() } else { 0 };
            let page = usize::try_from(self.pages[index]).expect("record tiles have pages");
            Span { position: tile * group + offset, offset, count: group - offset, place: Place::Page(page) }
        };
        (0..tiles).map(span).collect()
    }
}

fn items(plan: &AttendPlan) -> impl Iterator<Item = Words<'_>> {
    assert_eq!(plan.items.len() % ITEM_WORDS, 0);
    plan.items.chunks_exact(ITEM_WORDS).map(|item| {
        let (words, pages) = item.split_at(ITEM_WORDS - ITEM_TILES);
        Words { words, pages }
    })
}

/// Checks the items of one block of queries against where the tables say that each token lies.
fn check_block(
    block: &[Words<'_>],
    sequence: &SequencePlan,
    view: &SequenceView,
    rule: &SealRule,
    key: AttendKey,
    first: usize,
) {
    let tokens = key.query_tokens.min(sequence.count - first);
    let position = sequence.start() + first;
    for (part, item) in block.iter().enumerate() {
        assert_eq!((item.at(4), item.at(5)), (part, block.len()));
        assert_eq!((item.at(6), item.at(7)), (sequence.first_row + first, tokens));
        assert_eq!((item.at(8), item.at(9)), (position, view.length));
    }
    let mut reads: Vec<Span> = block.iter().flat_map(|item| item.reads(rule)).collect();
    reads.sort_by_key(|span| span.position);
    assert!(reads.windows(2).all(|pair| pair[0].position < pair[1].position), "read twice");

    let low = (position + 1).saturating_sub(key.window);
    let high = (position + tokens).min(view.length);
    let seen = |span: &Span| span.position < high && span.position + span.count > low;
    let spans: Vec<Span> = view.spans(rule).collect();
    assert!(reads.iter().all(|read| {
        spans.binary_search_by_key(&read.position, |span| span.position).is_ok_and(|at| spans[at] == *read)
    }));
    let needed: Vec<&Span> = spans.iter().filter(|span| seen(span)).collect();
    assert_eq!(reads.iter().filter(|span| seen(span)).collect::<Vec<_>>(), needed);
    // Beyond what is seen at most the other part of a tile of which something is.
    let tiles = low / rule.group()..high.div_ceil(rule.group());
    assert!(reads.iter().all(|span| tiles.contains(&(span.position / rule.group()))));
    if reads.is_empty() {
        assert_eq!(block.len(), 1, "one item writes the zeros");
    } else {
        assert!(block.iter().all(|item| !item.reads(rule).is_empty()));
    }
}

/// Checks one attention plan.
fn check_attend(plan: &StepPlan, rule: &SealRule, key: AttendKey) {
    let made = AttendPlan::new(plan, rule, key);
    let listed: Vec<Words<'_>> = items(&made).collect();
    let (mut at, mut parts, mut most, mut columns) = (0, 0, 0, 0);
    let mut launches = made.launches.iter().peekable();
    for sequence in plan.sequences.iter().filter(|sequence| sequence.count <= key.most_tokens) {
        let view = if key.appended { &sequence.after } else { &sequence.before };
        for first in (0..sequence.count).step_by(key.query_tokens) {
            let block = &listed[at..at + listed[at].at(5)];
            let full = at == 0 || parts + block.len() > key.most_parts;
            if launches.next_if_eq(&&at).is_some() {
                assert!(full, "a launch ends early");
                parts = 0;
            } else {
                assert!(!full, "a launch leaves more than it may");
            }
            assert!(block.iter().all(|item| item.at(10) == parts));
            check_block(block, sequence, view, rule, key, first);
            at += block.len();
            parts += block.len();
            most = most.max(parts);
            columns = columns.max(block[0].at(7) * key.group);
        }
    }
    assert_eq!((at, most, columns), (listed.len(), made.parts, made.columns));
    assert_eq!(launches.next(), None);
}

/// The items of a sequence with rows and parts counted from its own first, in one launch.
fn rebased(plan: &StepPlan, index: usize, rule: &SealRule, key: AttendKey) -> Vec<(Vec<i32>, Vec<i32>)> {
    let made = AttendPlan::new(plan, rule, AttendKey { most_parts: usize::MAX, ..key });
    let sequence = &plan.sequences[index];
    let rows = sequence.first_row as i32..(sequence.first_row + sequence.count) as i32;
    let mut own = items(&made).filter(|item| rows.contains(&item.words[6])).peekable();
    let Some(part) = own.peek().map(|item| item.words[10]) else {
        return vec![];
    };
    let rebase = |item: Words<'_>| {
        let mut words = item.words.to_vec();
        words[6] -= rows.start;
        words[10] -= part;
        (words, item.pages.to_vec())
    };
    own.map(rebase).collect()
}

/// Carries out appends on lists of values, as the kernels do: a seal reads the slot as it was before the step's writes,
/// and the rows.
struct Memory {
    rule: SealRule,
    next: u64,
    tokens: HashMap<SequenceId, Vec<u64>>,
    slots: HashMap<usize, Vec<u64>>,
    pages: HashMap<usize, Vec<u64>>,
}

impl Memory {
    fn append(&mut self, plan: &StepPlan, between: &Between) {
        let group = self.rule.group();
        for &Unseal { page, slot, tokens, .. } in &between.unseals {
            let mut values = self.pages[&page][..tokens].to_vec();
            values.resize(group, u64::MAX);
            self.slots.insert(slot, values);
        }
        if let Some((parent, fork)) = between.forked {
            let tokens = self.tokens.get(&parent).cloned().unwrap_or_default();
            self.tokens.insert(fork, tokens);
        }
        for copy in plan.sequences.iter().filter_map(|sequence| sequence.copy) {
            let slot = self.slots[&copy.from].clone();
            self.slots.insert(copy.to, slot);
        }
        let made = AppendPlan::new(plan, group);
        assert_eq!(made.slot_of_row.len(), plan.tokens);
        assert_eq!(made.count(), plan.sequences.iter().map(|sequence| sequence.seals.len()).sum::<usize>());
        let rows: Vec<u64> = (0..plan.tokens as u64).map(|row| self.next + row).collect();
        self.next += plan.tokens as u64;

        let word = |word: i32| usize::try_from(word).unwrap();
        for seal in made.seals.chunks_exact(SEAL_WORDS) {
            let (page, from, row) = (word(seal[0]), word(seal[2]), word(seal[3]));
            assert!(seal[1] >= 0 || from == 0, "without a slot all comes with the rows");
            let mut tile = if from == 0 { vec![] } else { self.slots[&word(seal[1])][..from].to_vec() };
            tile.extend_from_slice(&rows[row..row + group - from]);
            self.pages.insert(page, tile);
        }
        for (row, &place) in made.slot_of_row.iter().enumerate().filter(|(_, place)| **place >= 0) {
            let (slot, offset) = (word(place) / group, word(place) % group);
            self.slots.entry(slot).or_insert_with(|| vec![u64::MAX; group])[offset] = rows[row];
        }

        for sequence in &plan.sequences {
            let tokens = self.tokens.entry(sequence.id).or_default();
            // Shorter where it was truncated since.
            tokens.truncate(sequence.start());
            tokens.extend_from_slice(&rows[sequence.first_row..sequence.first_row + sequence.count]);
            for span in sequence.after.spans(&self.rule) {
                let stored = match span.place {
                    Place::Slot(slot) => &self.slots[&slot],
                    Place::Page(page) => &self.pages[&page],
                };
                assert_eq!(
                    stored[span.offset..span.offset + span.count],
                    tokens[span.position..span.position + span.count],
                    "{span:?}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn what_a_block_of_queries_may_see_is_read_once(rule in rules(), batches in batches(), key in keys()) {
        run(rule, &batches, |plan, _| check_attend(plan, &rule, with_few_blocks(key, plan)));
    }

    #[test]
    fn a_sequence_has_the_same_items_alone_and_in_a_batch(rule in rules(), batches in batches(), key in keys()) {
        run(rule, &batches, |plan, _| {
            let key = with_few_blocks(key, plan);
            for (index, sequence) in plan.sequences.iter().enumerate() {
                let alone = StepPlan {
                    id: plan.id,
                    tokens: sequence.count,
                    sequences: vec![SequencePlan { first_row: 0, ..sequence.clone() }],
                    first_rows: Arc::new(vec![0, sequence.count as i32]),
                };
                assert_eq!(rebased(plan, index, &rule, key), rebased(&alone, 0, &rule, key));
            }
        });
    }

    #[test]
    fn appends_leave_every_token_where_the_tables_say(rule in rules(), batches in batches()) {
        let mut memory = Memory {
            rule,
            next: 0,
            tokens: HashMap::new(),
            slots: HashMap::new(),
            pages: HashMap::new(),
        };
        run(rule, &batches, |plan, between| memory.append(plan, between));
    }
}

#[test]
fn longer_sequences_and_more_heads_have_larger_items() {
    for (tile, kv_heads, group, sizes) in [
        (128, 8, 4, [4, 8, 16, 12, 21]),
        (64, 8, 4, [8, 16, 32, 24, 32]),
        (128, 40, 1, [4, 8, 16, 12, 21]),
        (128, 4, 8, [4, 8, 8, 8, 16]),
        (128, 2, 1, [4, 8, 8, 8, 16]),
        (128, 1, 8, [4, 8, 8, 8, 8]),
        (64, 1, 16, [16, 16, 16, 16, 32]),
        (128, 8, 16, [8, 8, 16, 12, 21]),
    ] {
        let key = AttendKey::of_one_token(kv_heads, group);
        let found = [4_096, 16_384, 49_152, 98_304, 98_305].map(|tokens| item_tiles(tokens, tile, key));
        assert_eq!(found, sizes, "{tile} {kv_heads} {group}");
    }
}

#[test]
fn no_length_has_more_record_items_than_the_most() {
    for (tile, kv_heads, group) in [(128, 8, 4), (64, 8, 16), (128, 4, 1), (64, 1, 8), (128, 1, 16)] {
        let key = AttendKey::of_one_token(kv_heads, group);
        let mut most = 0;
        for tiles in 1..3_000_usize {
            most = most.max(tiles.div_ceil(item_tiles(tiles * tile, tile, key)));
            assert_eq!(most_record_items(tiles, tile, key), most, "{tiles} of {tile}, {kv_heads} {group}");
        }
        for step in STEPS {
            assert_eq!(step % tile, 0, "sizes change between tiles");
        }
    }
}
