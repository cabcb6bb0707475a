use super::*;
use crate::tables::TableErrorKind;

const GROUP: usize = 4;

fn tables(sink_tokens: usize, pages: usize, slots: usize) -> Tables {
    Tables::new(SealRule::new(GROUP, sink_tokens, 0).unwrap(), pages, slots).unwrap()
}

/// One key per letter.
fn keys(letters: &str) -> Vec<PrefixKey> {
    letters.bytes().map(|letter| PrefixKey::new([1; 16], [letter; 16])).collect()
}

fn append(tables: &mut Tables, id: SequenceId, count: usize) {
    let plan = tables.plan_step(&[id], &[count], &[0]).unwrap();
    tables.finish(plan.id).unwrap();
}

/// A sequence of whole tiles, published under one key per letter.
fn published(tables: &mut Tables, letters: &str) -> SequenceId {
    let id = tables.create();
    append(tables, id, letters.len() * GROUP);
    tables.publish(id, &keys(letters)).unwrap();
    id
}

fn counts(tables: &Tables) -> [u64; 4] {
    let PrefixCounts { hits, misses, duplicates, evictions } = tables.stats().prefixes;
    [hits, misses, duplicates, evictions]
}

#[test]
fn a_sequence_starts_with_what_is_published() {
    for (sink_tokens, blocks, slots) in
        [(0, [0, 1, 2], [-1, -1, -1]), (2, [0, 1, 2], [0, -1, -1]), (GROUP, [-1, 0, 1], [0, -1, -1])]
    {
        let mut tables = tables(sink_tokens, 8, 8);
        let a = published(&mut tables, "abc");
        for (asked, found) in [("", 0), ("x", 0), ("bc", 0), ("axc", 1), ("ab", 2), ("abc", 3), ("abcd", 3)] {
            assert_eq!(tables.match_prefix(&keys(asked)), found, "{asked}");
            let b = tables.create_from(&keys(asked));
            let view = tables.view(b).unwrap().clone();
            assert_eq!((view.length, view.committed), (found * GROUP, found * GROUP));
            assert_eq!(view.block_table[..], blocks[..found]);
            assert_eq!(view.slot_table[..], slots[..found]);
            append(&mut tables, b, GROUP + 1);
            let after = tables.view(b).unwrap();
            assert_eq!(after.length, (found + 1) * GROUP + 1);
            assert_eq!(after.block_table[..found], blocks[..found]);
            tables.free(b).unwrap();
        }
        assert_eq!(counts(&tables), [1 + 2 + 3 + 3, 1 + 2 + 2 + 1, 0, 0]);
        tables.free(a).unwrap();
        let usage = tables.stats();
        assert_eq!((usage.pages.used, usage.slots.used), (0, 0));
        assert_eq!((usage.pages.free, usage.slots.free), (8, 8));
        assert_eq!(usage.pages.cached, blocks.iter().filter(|&&page| page >= 0).count());
        assert_eq!(usage.slots.cached, usize::from(sink_tokens > 0));
        tables.unpublish();
        assert_eq!((tables.pages.unused(), tables.slots.unused()), (8, 8));
    }
}

#[test]
fn another_fingerprint_matches_nothing() {
    let mut tables = tables(0, 4, 4);
    published(&mut tables, "ab");
    let other: Vec<PrefixKey> = b"ab".iter().map(|&letter| PrefixKey::new([2; 16], [letter; 16])).collect();
    assert_eq!(tables.match_prefix(&other), 0);
}

#[test]
fn a_tile_is_found_behind_its_own_beginning_only() {
    let mut tables = tables(0, 16, 8);
    published(&mut tables, "ab");
    let other = published(&mut tables, "cb");
    assert_eq!(tables.stats().pages.published, 4, "the same key behind another one is another tile");
    let start = tables.create_from(&keys("cb"));
    assert_eq!(tables.view(start).unwrap().block_table, tables.view(other).unwrap().block_table);
}

#[test]
fn only_sealed_tiles_and_full_sinks_are_published() {
    for (recent_tokens, sink_tokens, length, most) in [
        (0, 0, 11, 2),
        (3, 0, 10, 1),
        (0, 2, 4, 1),
        (0, GROUP, 3, 0),
        (0, GROUP, 4, 1),
        (4, GROUP, 7, 1),
        (0, GROUP, 8, 2),
    ] {
        let rule = SealRule::new(GROUP, sink_tokens, recent_tokens).unwrap();
        let mut tables = Tables::new(rule, 8, 8).unwrap();
        let id = tables.create();
        append(&mut tables, id, length);
        assert_eq!(tables.view(id).unwrap().publishable(&rule), most);
        let error = tables.publish(id, &keys(&"abcde"[..=most])).unwrap_err();
        assert_eq!(error, TableError::TooManyKeys { sequence: id, keys: most + 1, tiles: most });
        assert_eq!(tables.publish(id, &keys(&"abcde"[..most])), Ok(most));
        assert_eq!(tables.match_prefix(&keys("abcde")), most);
    }
    let mut tables = tables(GROUP, 8, 8);
    let id = tables.create();
    let plan = tables.plan_step(&[id], &[6], &[3]).unwrap();
    assert_eq!(
        tables.publish(id, &[]).unwrap_err(),
        TableError::SequenceInStep { sequence: id, step: plan.id },
        "what a step plans is not there yet"
    );
    tables.finish(plan.id).unwrap();
    let error = tables.publish(id, &keys("a")).unwrap_err();
    assert_eq!(error, TableError::TooManyKeys { sequence: id, keys: 1, tiles: 0 }, "held tokens may go");
    let plan = tables.plan_step(&[id], &[20], &[0]).unwrap();
    tables.abandon(plan.id).unwrap();
    assert_eq!(tables.publish(id, &keys("a")).unwrap_err(), error);
}

#[test]
fn bad_publications_change_nothing_and_say_why() {
    let mut ours = tables(0, 16, 8);
    let mut theirs = tables(0, 16, 8);
    let a = published(&mut ours, "ab");
    let foreign = published(&mut theirs, "z");
    let freed = ours.create();
    ours.free(freed).unwrap();
    let before = ours.prefixes.clone();
    for (id, letters, kind, text) in [
        (
            a,
            "cdc",
            TableErrorKind::Shape,
            "3 keys for sequence 0: expected at most 2, its sealed tiles; pass fewer, or publish once more are sealed",
        ),
        (
            a,
            "cc",
            TableErrorKind::Shape,
            "key 63636363636363636363636363636363 at 0 and 1: expected each key once; \
             derive the key of a tile from that of the tile before it",
        ),
        (
            a,
            "ac",
            TableErrorKind::State,
            "tile 1 of sequence 0, which is published under other keys: \
             expected the keys it was published with; pass these",
        ),
        (
            freed,
            "a",
            TableErrorKind::State,
            "sequence 1, which was freed: expected a live sequence; create one",
        ),
        (
            foreign,
            "a",
            TableErrorKind::State,
            "sequence 0 of another pool: expected a sequence of this pool; use the pool that created it",
        ),
    ] {
        let error = ours.publish(id, &keys(letters)).unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (kind, text));
        assert_eq!(ours.prefixes, before);
    }
    assert_eq!(ours.publish(a, &keys("ab")), Ok(0), "once more is no mistake");
    assert_eq!(counts(&ours), [0; 4], "and no duplicate");
}

#[test]
fn the_first_tile_under_a_key_stays() {
    let mut tables = tables(0, 16, 8);
    let a = published(&mut tables, "ab");
    let b = tables.create();
    append(&mut tables, b, 3 * GROUP);
    let before = tables.view(b).unwrap().clone();
    assert_eq!(tables.publish(b, &keys("abc")), Ok(1));
    assert_eq!(counts(&tables), [0, 0, 2, 0]);
    assert_eq!(tables.view(b).unwrap(), &before);
    let start = tables.create_from(&keys("abc"));
    let pages = |id| tables.view(id).unwrap().block_table.to_vec();
    assert_eq!(pages(start), [&pages(a)[..], &pages(b)[2..]].concat());
}

#[test]
fn what_is_longest_unused_goes_first_and_later_tiles_before_earlier_ones() {
    let mut tables = tables(0, 6, 4);
    let (a, b) = (published(&mut tables, "abc"), published(&mut tables, "xyz"));
    tables.free(b).unwrap();
    tables.free(a).unwrap();
    let taker = tables.create();
    let mut left = |count: usize| {
        append(&mut tables, taker, count * GROUP);
        (tables.match_prefix(&keys("abc")), tables.match_prefix(&keys("xyz")))
    };
    // b was freed before a.
    assert_eq!([left(1), left(1), left(2), left(1)], [(3, 2), (3, 1), (2, 0), (1, 0)]);
    assert_eq!(counts(&tables)[3], 5);
    assert_eq!(tables.stats().pages.free, 1);
    let used = tables.create_from(&keys("a"));
    assert_eq!(tables.stats().pages.free, 0);
    let error = tables.plan_step(&[taker], &[GROUP], &[0]).unwrap_err();
    assert_eq!(error.kind(), TableErrorKind::Capacity);
    assert_eq!(tables.match_prefix(&keys("a")), 1, "a refused step gives nothing up");
    tables.free(used).unwrap();
    append(&mut tables, taker, GROUP);
    assert_eq!(tables.match_prefix(&keys("a")), 0);
}

#[test]
fn starting_from_a_prefix_and_looking_for_it_count_as_use_and_as_none() {
    for (starts, kept) in [(true, "ab"), (false, "xy")] {
        let mut tables = tables(0, 4, 4);
        for letters in ["ab", "xy"] {
            let id = published(&mut tables, letters);
            tables.free(id).unwrap();
        }
        if starts {
            let id = tables.create_from(&keys("ab"));
            let taker = tables.create();
            append(&mut tables, taker, GROUP);
            tables.free(taker).unwrap();
            tables.free(id).unwrap();
        } else {
            assert_eq!(tables.match_prefix(&keys("ab")), 2);
        }
        let taker = tables.create();
        append(&mut tables, taker, 2 * GROUP);
        assert_eq!(tables.match_prefix(&keys(kept)), 2);
        assert_eq!(tables.stats().pages.published, 2);
    }
}

#[test]
fn a_publication_is_a_use_of_what_was_published_first() {
    let mut tables = tables(0, 6, 4);
    for letters in ["ab", "xy"] {
        let id = published(&mut tables, letters);
        tables.free(id).unwrap();
    }
    let again = published(&mut tables, "ab");
    tables.free(again).unwrap();
    let taker = tables.create();
    append(&mut tables, taker, 3 * GROUP);
    assert_eq!((tables.match_prefix(&keys("ab")), tables.match_prefix(&keys("xy"))), (2, 1));
}

#[test]
fn tiles_in_use_behind_one_that_is_given_up_are_published_no_longer() {
    let mut tables = tables(0, 5, 4);
    let a = published(&mut tables, "ab");
    let b = tables.create();
    append(&mut tables, b, 3 * GROUP);
    tables.publish(b, &keys("abc")).unwrap();
    tables.free(a).unwrap();
    assert_eq!(tables.stats().pages.free, 2);
    let before = tables.view(b).unwrap().clone();
    let c = tables.create();
    append(&mut tables, c, GROUP);
    assert_eq!((tables.match_prefix(&keys("abc")), counts(&tables)[3]), (1, 2));
    assert_eq!(tables.view(b).unwrap(), &before);
    assert_eq!(tables.publish(b, &keys("abc")), Ok(2), "and can be published anew");
    tables.free(b).unwrap();
    tables.free(c).unwrap();
    assert_eq!(tables.stats().pages.free, 5);
}

#[test]
fn a_sink_slot_is_given_up_with_all_that_lies_behind() {
    let mut tables = tables(GROUP, 8, 2);
    let a = published(&mut tables, "abc");
    tables.free(a).unwrap();
    assert_eq!((tables.stats().pages.cached, tables.stats().slots.cached), (2, 1));
    let (b, c) = (tables.create(), tables.create());
    append(&mut tables, b, 1);
    assert_eq!(tables.match_prefix(&keys("abc")), 3);
    append(&mut tables, c, 1);
    assert_eq!((tables.match_prefix(&keys("abc")), counts(&tables)[3]), (0, 3));
    assert_eq!((tables.stats().pages.published, tables.stats().slots.published), (0, 0));
    assert_eq!(tables.pages.unused(), 8);
}

#[test]
fn a_published_sink_slot_is_never_written_to() {
    let mut tables = tables(GROUP, 8, 3);
    let a = published(&mut tables, "a");
    tables.truncate(a, 1).unwrap();
    let plan = tables.plan_step(&[a], &[3], &[0]).unwrap();
    let copy = plan.sequences[0].copy.unwrap();
    assert_eq!((copy.from, copy.to), (0, 1));
    tables.finish(plan.id).unwrap();
    let b = tables.create_from(&keys("a"));
    assert_eq!(*tables.view(b).unwrap().slot_table, [0]);
    assert_eq!(tables.publish(a, &keys("a")), Ok(0), "other tokens under the same key: the first stay");
    assert_eq!(counts(&tables)[2], 1);
}

#[test]
fn an_abandoned_step_gives_back_room_but_not_what_was_published_there() {
    let mut tables = tables(0, 2, 2);
    let a = published(&mut tables, "ab");
    tables.free(a).unwrap();
    let b = tables.create();
    let plan = tables.plan_step(&[b], &[GROUP], &[0]).unwrap();
    tables.abandon(plan.id).unwrap();
    assert_eq!(tables.match_prefix(&keys("ab")), 1);
    assert_eq!((tables.stats().pages.free, tables.pages.unused()), (2, 1));
}
