"""Prefix sharing: a sequence that starts with published tiles is, to the bit, one that computed them."""

import threading

import kvarn
import numpy as np
import pytest
from kvarn import CapacityError, Config, DTypeError, LayerShape, Pool, ShapeError, StateError, prefix_keys

LAYERS = [LayerShape(2, 32), LayerShape(1, 48)]
GROUP = 64


def make_pool(pages=32, slots=16, dtype="float16", **options):
    cfg = Config("kvarn_k4v2_g64", head_dim=32, **options)
    return Pool(cfg, layers=LAYERS, pages=pages, slots=slots, dtype=dtype)


class Network:
    """K, V and queries that depend on the tokens from the start on, as those of a model do."""

    def __init__(self, dtype="float16"):
        rng = np.random.default_rng(0)
        self.dtype = np.dtype(dtype)
        heads = sum(4 * kv_heads for kv_heads, _ in LAYERS)
        self.tokens = rng.standard_normal((50, heads, 48))
        self.positions = rng.standard_normal((2000, heads, 48))

    def rows(self, tokens, first):
        """For each layer k, v, q of the tokens from `first` on."""
        past = np.cumsum(self.tokens[tokens], axis=0)[first:] / 10
        rows = past + self.tokens[tokens[first:]] + self.positions[first : len(tokens)]
        start = 0
        for kv_heads, head_dim in LAYERS:
            part = rows[:, start : start + 4 * kv_heads, :head_dim].astype(self.dtype)
            start += 4 * kv_heads
            yield part[:, :kv_heads], part[:, kv_heads : 2 * kv_heads], part[:, 2 * kv_heads :]

    def run(self, pool, sequence, tokens, count=None):
        """Appends the next `count` tokens, or all that are missing; returns the attention of each layer."""
        first = sequence.length
        tokens = np.asarray(tokens[: None if count is None else first + count])
        outputs = []
        with pool.step([sequence], [len(tokens) - first]) as step:
            for layer, (k, v, q) in enumerate(self.rows(tokens, first)):
                step.append(layer, *map(np.ascontiguousarray, (k, v)))
                outputs.append(step.attend(layer, np.ascontiguousarray(q)))
        return outputs


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(50, size=length)


def same(pool, a, other, b):
    for layer in range(len(LAYERS)):
        for x, y in zip(pool.expand(a, layer), other.expand(b, layer), strict=True):
            np.testing.assert_array_equal(x, y)


def table(sequence):
    return np.from_dlpack(sequence.block_table).tolist(), np.from_dlpack(sequence.slot_table).tolist()


def published(pool, network, tokens):
    """A sequence of these tokens, all its sealed tiles published, and their keys."""
    sequence = pool.create()
    network.run(pool, sequence, tokens)
    sealed = (len(tokens) - pool.cfg.recent_tokens) // GROUP
    assert sequence.sealed == sealed
    keys = prefix_keys(tokens, GROUP)[:sealed]
    assert pool.publish(sequence, keys) == sealed
    return sequence, keys


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("recent_tokens", [0, 70])
@pytest.mark.parametrize("sink_tokens", [0, 16, 64])
def test_outputs_are_bitwise_those_of_a_sequence_that_computed_its_prefix(sink_tokens, recent_tokens, dtype):
    network = Network(dtype)
    pool = make_pool(sink_tokens=sink_tokens, recent_tokens=recent_tokens, dtype=dtype)
    tokens = prompt(4 * GROUP + 75)
    first, keys = published(pool, network, tokens)
    before = table(first)
    pool.free(first)
    for tiles in range(1, len(keys) + 1):
        other = make_pool(sink_tokens=sink_tokens, recent_tokens=recent_tokens, dtype=dtype)
        alone, started = other.create(), pool.create(keys[:tiles])
        assert (started.length, started.committed) == (tiles * GROUP, tiles * GROUP)
        assert table(started) == tuple(ids[:tiles] for ids in before)
        # The sequence alone needs its recent window behind the tiles before these are sealed.
        expected = network.run(other, alone, tokens)
        for got, want in zip(network.run(pool, started, tokens), expected, strict=True):
            np.testing.assert_array_equal(got, want[tiles * GROUP :])
        same(pool, started, other, alone)
        further = np.concatenate([tokens, prompt(80, seed=tiles)])
        for count in (1, 3, 76):
            want = network.run(other, alone, further, count)
            for x, y in zip(network.run(pool, started, further, count), want, strict=True):
                np.testing.assert_array_equal(x, y)
        same(pool, started, other, alone)
        pool.free(started)
    assert pool.stats().pages_used == pool.stats().slots_used == 0


def test_matching_is_by_the_first_keys_in_a_row():
    pool, network = make_pool(), Network()
    tokens = prompt(3 * GROUP)
    _, keys = published(pool, network, tokens)
    elsewhere = prefix_keys(prompt(3 * GROUP, seed=1), GROUP)
    for asked, tiles in [
        (keys, 3),
        (keys[:2], 2),
        ([*keys, elsewhere[0]], 3),
        ([keys[0], elsewhere[1], keys[2]], 1),
        (keys[1:], 0),
        (elsewhere, 0),
        ([], 0),
        (prefix_keys(tokens, GROUP, salt=b"another"), 0),
        (prefix_keys(tokens[GROUP:], GROUP, parent=keys[0]), 0),
    ]:
        assert pool.match_prefix(iter(asked)) == tiles
        sequence = pool.create(iter(asked))
        assert sequence.length == tiles * GROUP
        pool.free(sequence)
    stats = pool.stats()
    assert (stats.prefix_hits, stats.prefix_misses) == (9, 13)
    assert pool.create().length == 0


def test_stats_count_published_and_cached_tiles_and_cached_ones_are_free():
    pool, network = make_pool(pages=4, slots=3), Network()
    sequence, keys = published(pool, network, prompt(3 * GROUP + 1))
    stats = pool.stats()
    assert (stats.pages_published, stats.pages_cached, stats.pages_used, stats.pages_free) == (2, 0, 2, 2)
    assert (stats.slots_published, stats.slots_cached, stats.slots_used, stats.slots_free) == (1, 0, 2, 1)
    used = stats.page_bytes, stats.slot_bytes
    pool.free(sequence)
    stats = pool.stats()
    assert (stats.pages_published, stats.pages_cached, stats.pages_used, stats.pages_free) == (2, 2, 0, 4)
    assert (stats.slots_published, stats.slots_cached, stats.slots_used, stats.slots_free) == (1, 1, 0, 3)
    assert (stats.page_bytes, stats.slot_bytes) == (0, 0)
    started = pool.create(keys)
    stats = pool.stats()
    assert (stats.pages_cached, stats.slots_cached, stats.prefix_hits) == (0, 0, 3)
    assert (stats.page_bytes, stats.slot_bytes * 2) == used
    assert "prefix_hits=3, prefix_misses=0, prefix_duplicates=0, prefix_evictions=0" in repr(stats)
    pool.unpublish()
    assert pool.stats().pages_published == pool.match_prefix(keys) == 0
    assert started.length == 3 * GROUP
    pool.free(started)
    stats = pool.stats()
    assert (stats.pages_free, stats.slots_free, stats.sequences) == (4, 3, 0)


def test_what_is_longest_unused_goes_first_the_end_of_a_prompt_before_its_beginning():
    pool, network = make_pool(pages=6, slots=4, sink_tokens=0), Network()
    prompts = [prompt(3 * GROUP, seed) for seed in range(2)]
    sequences, keys = zip(*(published(pool, network, tokens) for tokens in prompts), strict=True)
    pool.free(sequences[1])
    pool.free(sequences[0])
    pool.free(pool.create(keys[1][:1]))  # a use of the first tile of the second prompt alone
    taker, seen = pool.create(), []
    for _ in range(6):
        network.run(pool, taker, prompt(6 * GROUP, seed=9), GROUP)
        seen.append((pool.match_prefix(keys[0]), pool.match_prefix(keys[1])))
    assert seen == [(3, 2), (3, 1), (2, 1), (1, 1), (0, 1), (0, 0)]
    assert pool.stats().prefix_evictions == 6
    with pytest.raises(CapacityError, match="sequence 3 needs 1 page with 0 free"):
        network.run(pool, taker, prompt(7 * GROUP, seed=9))


def test_a_step_that_does_not_fit_gives_nothing_up():
    pool, network = make_pool(pages=3, slots=3), Network()
    sequence, keys = published(pool, network, prompt(3 * GROUP))
    pool.free(sequence)
    other = pool.create()
    before = pool.stats()
    with pytest.raises(CapacityError, match="sequence 1 needs 4 pages with 3 free"):
        pool.step([other], [5 * GROUP])
    assert pool.stats() == before
    step = pool.step([other], [4 * GROUP])
    assert pool.match_prefix(keys) == 1
    step.abandon()
    assert pool.match_prefix(keys) == 1
    held = pool.create(keys)
    assert held.length == GROUP
    with pytest.raises(CapacityError, match="sequence 4 needs 1 slot with 0 free"):
        pool.step([other, pool.create(), pool.create()], [1, 1, 1])


def test_a_running_sequence_keeps_its_prefix_whatever_others_need():
    pool, network = make_pool(pages=3, slots=6), Network()
    tokens = prompt(3 * GROUP + 5)
    first, keys = published(pool, network, tokens)
    started = pool.create(keys)
    pool.free(first)
    filler = pool.create()
    with pytest.raises(CapacityError):
        network.run(pool, filler, prompt(4 * GROUP))
    network.run(pool, filler, prompt(2 * GROUP))
    network.run(pool, started, tokens)
    other = make_pool(pages=3, slots=6)
    alone = other.create()
    network.run(other, alone, tokens)
    same(pool, started, other, alone)


def test_forks_truncation_and_free_leave_what_is_shared():
    pool, network = make_pool(), Network()
    tokens = prompt(3 * GROUP + 9)
    first, keys = published(pool, network, tokens)
    fork = pool.fork(first)
    pool.truncate(first, 3 * GROUP + 2)
    network.run(pool, first, np.concatenate([tokens[: 3 * GROUP + 2], prompt(100, 5)]))
    started = pool.create(keys)
    second = pool.fork(started)
    pool.reorder([first, started], [1, 0])
    for sequence in (fork, first, started):
        pool.free(sequence)
    network.run(pool, second, tokens)
    other = make_pool()
    alone = other.create()
    network.run(other, alone, tokens)
    same(pool, second, other, alone)
    assert pool.publish(second, keys) == 0
    assert pool.stats().prefix_duplicates == 0


def test_a_published_sink_slot_is_copied_before_its_publisher_writes_to_it():
    pool, network = make_pool(), Network()
    tokens = prompt(GROUP + 3)
    first, keys = published(pool, network, tokens)
    pool.truncate(first, 10)
    network.run(pool, first, np.concatenate([tokens[:10], prompt(90, 7)]))
    started = pool.create(keys)
    network.run(pool, started, tokens)
    other = make_pool()
    alone = other.create()
    network.run(other, alone, tokens)
    same(pool, started, other, alone)


def test_the_first_page_under_a_key_stays():
    pool, network = make_pool(sink_tokens=0), Network()
    tokens = prompt(3 * GROUP)
    first, _ = published(pool, network, tokens[: 2 * GROUP])
    second = pool.create()
    network.run(pool, second, tokens)
    before = table(second)
    assert pool.publish(second, prefix_keys(tokens, GROUP)) == 1
    assert pool.stats().prefix_duplicates == 2
    assert table(second) == before
    started = pool.create(prefix_keys(tokens, GROUP))
    assert table(started)[0] == table(first)[0] + before[0][2:]


def test_publishing_as_a_sequence_grows():
    pool, network = make_pool(sink_tokens=16), Network()
    tokens = prompt(5 * GROUP)
    sequence, new = pool.create(), []
    for _ in range(10):
        network.run(pool, sequence, tokens, GROUP // 2)
        new.append(pool.publish(sequence, prefix_keys(tokens[: sequence.length], GROUP)))
    assert new == [0, 1] * 5
    assert pool.stats().pages_published == 5


def test_another_configuration_has_another_fingerprint():
    same_as = make_pool(pages=2).fingerprint
    assert len(same_as) == 16
    assert make_pool(pages=9, slots=3).fingerprint == same_as
    for options in ({"sink_tokens": 16}, {"recent_tokens": 1}, {"refit": False}, {"dtype": "float32"}):
        assert make_pool(**options).fingerprint != same_as
    cfg = Config("kvarn_k4v2_g64", head_dim=32)
    assert Pool(cfg, layers=LAYERS[:1], pages=2, slots=2).fingerprint != same_as


def test_many_sequences_of_a_family_of_prompts_in_a_small_pool():
    """As an engine serves: look up, run what is missing, publish, go on for a while, free."""
    pool, network = make_pool(pages=24, slots=12), Network()
    reference = make_pool(pages=64, slots=12)
    rng = np.random.default_rng(3)
    system = [prompt(GROUP * tiles, seed) for seed, tiles in enumerate((3, 2, 1))]
    running, tiles = [], 0
    for request in range(120):
        parts = [
            system[rng.integers(3)],
            prompt(GROUP * 2, 100 + rng.integers(4)),
            prompt(rng.integers(1, 70)),
        ]
        tokens = np.concatenate(parts)
        keys = prefix_keys(tokens[:-1], GROUP)
        tiles += len(keys)
        sequence = pool.create(keys)
        got = network.run(pool, sequence, tokens)
        pool.publish(sequence, prefix_keys(tokens, GROUP))
        running.append(sequence)
        if request % 10 == 0:
            alone = reference.create()
            for x, y in zip(got, network.run(reference, alone, tokens), strict=True):
                np.testing.assert_array_equal(x, y[len(y) - len(x) :])
            same(pool, sequence, reference, alone)
            reference.free(alone)
        if len(running) > 3:
            pool.free(running.pop(rng.integers(4)))
    stats = pool.stats()
    assert stats.prefix_hits + stats.prefix_misses == tiles
    assert stats.prefix_hits > tiles / 2
    assert stats.prefix_evictions > 20
    assert stats.sequences == 3
    for sequence in running:
        pool.free(sequence)
    pool.unpublish()
    assert (pool.stats().pages_free, pool.stats().slots_free) == (24, 12)


def test_several_threads():
    pool, network = make_pool(pages=40, slots=24, sink_tokens=16), Network()
    reference = make_pool(pages=8, slots=8, sink_tokens=16)
    tokens = [np.concatenate([prompt(2 * GROUP), prompt(GROUP + 9, seed)]) for seed in range(4)]
    expected = []
    for row in tokens:
        sequence = reference.create()
        network.run(reference, sequence, row)
        expected.append(reference.expand(sequence, 0))
        reference.free(sequence)
    errors = []

    def work(seed):
        try:
            for turn in range(12):
                row = tokens[(seed + turn) % 4]
                sequence = pool.create(prefix_keys(row[:-1], GROUP))
                network.run(pool, sequence, row)
                pool.publish(sequence, prefix_keys(row, GROUP))
                for x, y in zip(pool.expand(sequence, 0), expected[(seed + turn) % 4], strict=True):
                    np.testing.assert_array_equal(x, y)
                pool.free(sequence)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert pool.stats().pages_used == 0
    assert pool.stats().prefix_hits > 0


KEY = bytes(range(16))


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ([KEY[:15]], ShapeError, "key 0 of 15 bytes: expected 16; pass keys as kvarn.prefix_keys makes them"),
        ([KEY, KEY + b"x"], ShapeError, "key 1 of 17 bytes: expected 16"),
        ([b""], ShapeError, "key 0 of 0 bytes"),
        (KEY, DTypeError, "key 0 of type int: expected bytes; pass a list of keys"),
        ([KEY.hex()], DTypeError, "key 0 of type str: expected bytes"),
        ([KEY, None], DTypeError, "key 1 of type NoneType: expected bytes"),
        ([bytearray(KEY)], DTypeError, "key 0 of type bytearray: expected bytes"),
        ([1], DTypeError, "key 0 of type int: expected bytes"),
    ],
)
def test_keys_that_are_none_are_refused(keys, error, text):
    pool, network = make_pool(), Network()
    sequence, _ = published(pool, network, prompt(3 * GROUP))
    before = pool.stats()
    for call in (
        lambda: pool.create(keys),
        lambda: pool.match_prefix(keys),
        lambda: pool.publish(sequence, keys),
    ):
        with pytest.raises(error, match=text):
            call()
    assert pool.stats() == before


def test_publications_that_are_refused_change_nothing():
    pool, network = make_pool(), Network()
    tokens = prompt(3 * GROUP + 5)
    sequence, keys = published(pool, network, tokens)
    unpublished = pool.create()
    network.run(pool, unpublished, prompt(2 * GROUP, 8))
    assert unpublished.sealed == 2
    freed = pool.create()
    pool.free(freed)
    foreign = make_pool().create()
    other = prefix_keys(prompt(4 * GROUP, 5), GROUP)
    before = pool.stats()
    for given, offered, error, text in [
        (sequence, other, ShapeError, "4 keys for sequence 0: expected at most 3, its sealed tiles"),
        (unpublished, [KEY, KEY], ShapeError, f"key {KEY.hex()} at 0 and 1: expected each key once"),
        (sequence, other[:1], StateError, "tile 0 of sequence 0, which is published under other keys"),
        (sequence, [*keys[:2], other[2]], StateError, "tile 2 of sequence 0, which is published"),
        (freed, keys, StateError, "sequence 2, which was freed"),
        (foreign, keys, StateError, "of another pool"),
    ]:
        with pytest.raises(error, match=text):
            pool.publish(given, offered)
        assert pool.stats() == before
    step = pool.step([unpublished], [2 * GROUP])
    with pytest.raises(StateError, match="sequence 1, which is in open step"):
        pool.publish(unpublished, other[:2])
    step.abandon()
    with pytest.raises(ShapeError, match="3 keys for sequence 1: expected at most 2"):
        pool.publish(unpublished, other[:3])
    assert pool.stats() == before
    assert pool.publish(unpublished, other[:2]) == 2


def test_a_hundred_thousand_keys_that_nobody_published():
    pool = make_pool()
    keys = [index.to_bytes(16, "big") for index in range(100_000)]
    assert pool.create(keys).length == pool.match_prefix(keys) == 0
    assert pool.stats().prefix_misses == 100_000
    with pytest.raises(ShapeError, match="100000 keys for sequence 1: expected at most 0"):
        pool.publish(pool.create(), keys)


def test_wrong_arguments_are_type_errors():
    pool = make_pool()
    for call in (lambda: pool.create(5), lambda: pool.publish(None, []), lambda: pool.match_prefix(None)):
        with pytest.raises(TypeError):
            call()
    assert issubclass(DTypeError, TypeError)
    assert kvarn.prefix_keys is prefix_keys
