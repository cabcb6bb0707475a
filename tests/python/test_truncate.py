"""`Pool.truncate` at every position: what is kept, what it costs, who else keeps what, and how it goes on."""

import kvarn
import numpy as np
import pytest
from kvarn import CapacityError, Config, LayerShape, Pool
from kvarn.reference.attention import attend

LAYERS = [LayerShape(2, 32), LayerShape(1, 48)]
GROUP = 64
LENGTH = 3 * GROUP + 21
CASES = [(0, 0), (0, 70), (16, 0), (16, 70), (GROUP, 0), (GROUP, 70)]


def make_pool(sinks=0, recent=0, dtype="float16", name="kvarn_k4v2_g64", slots=32):
    cfg = Config(name, head_dim=32, sink_tokens=sinks, recent_tokens=recent)
    return Pool(cfg, layers=LAYERS, pages=32, slots=slots, dtype=dtype)


def rows(rng, count, dtype, heads=1):
    """K and V (`heads` 1), or queries, of every layer."""
    shapes = [(count, shape.kv_heads * heads, shape.head_dim) for shape in LAYERS]
    return [[rng.standard_normal(shape).astype(dtype) for _ in range(2)] for shape in shapes]


def append(pool, sequence, new, hold=0):
    with pool.step([sequence], [len(new[0][0])], hold) as step:
        for layer, (k, v) in enumerate(new):
            step.append(layer, k, v)


def filled(pool, seed=0, length=LENGTH):
    """A sequence, and the values of the slots it was given: rotated, rounded, never sealed."""
    rng = np.random.default_rng(seed)
    new = rows(rng, length, pool.dtype)
    sequence = pool.create()
    append(pool, sequence, new)
    raw = Pool(pool.cfg.replace(sink_tokens=0), layers=LAYERS, pages=8, slots=8, dtype=pool.dtype)
    whole = []
    for first in range(0, length, GROUP - 1):
        part = raw.create()
        append(raw, part, [[one[first : first + GROUP - 1] for one in layer] for layer in new])
        whole.append(rotated(raw, part))
        raw.free(part)
    return sequence, [
        tuple(np.concatenate([part[layer][side] for part in whole]) for side in range(2))
        for layer in range(len(LAYERS))
    ]


def rotated(pool, sequence):
    """What every layer stores, in the type of the slots."""
    return [pool.expand(sequence, layer, rotated=True) for layer in range(len(LAYERS))]


def same(found, expected):
    for pair, wanted in zip(found, expected, strict=True):
        for one, other in zip(pair, wanted, strict=True):
            np.testing.assert_array_equal(one, other)


def tables(sequence):
    return [np.from_dlpack(table).tolist() for table in (sequence.block_table, sequence.slot_table)]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("sinks", "recent"), CASES)
def test_a_cut_anywhere_keeps_what_was_read(sinks, recent, dtype):
    pool = make_pool(sinks, recent, dtype)
    sequence, raw = filled(pool)
    stored, before = rotated(pool, sequence), pool.stats()
    sealed = [page >= 0 for page in tables(sequence)[0]]
    assert any(sealed)
    for length in range(LENGTH + 1):
        fork, unsealed = pool.fork(sequence), pool.stats().unsealed
        pool.truncate(fork, length)
        assert (fork.length, fork.committed) == (length, length)
        tile, part = divmod(length, GROUP)
        cut = part > 0 and sealed[tile]
        # The slot of a first tile with sinks has all of it: what was read from the record is exact again.
        exact = cut and tile == 0 and sinks > 0
        expected = [[array[:length] for array in pair] for pair in (raw if exact else stored)]
        same(rotated(pool, fork), expected)
        stats = pool.stats()
        assert stats.unsealed - unsealed == int(cut and not exact)
        assert stats.pages_used == before.pages_used
        assert stats.slots_used == before.slots_used + int(cut and not exact)
        blocks, slots = tables(fork)
        assert [page >= 0 for page in blocks] == sealed[:tile] + [False] * (part > 0)
        assert len(slots) == len(blocks)
        assert part == 0 or slots[-1] >= 0
        pool.free(fork)
    same(rotated(pool, sequence), stored)
    assert fields(pool.stats()) == fields(before) | {"unsealed": pool.stats().unsealed}
    # Not of a fork, the same.
    pool.truncate(sequence, GROUP + 5)
    same(rotated(pool, sequence), [[array[: GROUP + 5] for array in pair] for pair in stored])
    assert pool.stats().pages_used == int(sinks < GROUP)
    assert f"unsealed={pool.stats().unsealed}" in repr(pool.stats())


def fields(stats):
    return {name: getattr(stats, name) for name in dir(stats) if not name.startswith("_")}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("sinks", "recent"), CASES)
@pytest.mark.parametrize("length", [1, 40, GROUP, GROUP + 1, 2 * GROUP - 1, 2 * GROUP + 30, LENGTH - 1])
def test_a_cut_sequence_goes_on(length, sinks, recent, dtype):
    pool, rng = make_pool(sinks, recent, dtype), np.random.default_rng(length)
    sequence, _ = filled(pool)
    fork = pool.fork(sequence)
    kept = rotated(pool, fork)
    pool.truncate(sequence, length)
    cut = rotated(pool, sequence)
    for count, hold in ((1, 0), (3, 2), (70, 0), (2 * GROUP, 5)):
        start = sequence.length
        new, queries = rows(rng, count, dtype), rows(rng, count, dtype, heads=2)
        with pool.step([sequence], [count], hold) as step:
            for layer, (k, v) in enumerate(new):
                step.append(layer, k, v)
                out = step.attend(layer, queries[layer][0])
                k, v = step.expand(layer, 0, like=np.empty(0, np.float32))
                expected, _ = attend(
                    queries[layer][0].astype(np.float64),
                    k,
                    v,
                    scale=None,
                    window=None,
                    softcap=None,
                    sink_logits=None,
                    first_position=start,
                )
                error = np.linalg.norm(out.astype(np.float64) - expected, axis=-1)
                assert (error <= 2e-3 * np.linalg.norm(expected, axis=-1) + 1e-3).all()
    same(rotated(pool, fork), kept)
    # The tile that was cut is a record by now: it has moved by what a record costs, the others not at all.
    for (now, _), (then, _) in zip(rotated(pool, sequence), cut, strict=True):
        distance = np.linalg.norm(now[:length].astype(np.float64) - then) / np.linalg.norm(then)
        assert distance < 0.15
    for one in (sequence, fork):
        pool.free(one)
    assert (pool.stats().pages_used, pool.stats().slots_used) == (0, 0)


def test_a_tile_that_is_filled_again_is_the_record_of_what_was_decoded():
    pool, rng = make_pool(dtype="float32"), np.random.default_rng(3)
    sequence, _ = filled(pool)
    stored = rotated(pool, sequence)
    pool.truncate(sequence, GROUP + 20)
    new = rows(rng, GROUP - 20, "float32")
    rest = pool.create()
    append(pool, rest, new)
    tile = [
        [np.concatenate([one[GROUP : GROUP + 20], other]) for one, other in zip(*pairs, strict=True)]
        for pairs in zip(stored, rotated(pool, rest), strict=True)
    ]
    append(pool, sequence, new)
    page = tables(sequence)[0][1]
    for layer, ((k, v), shape) in enumerate(zip(tile, LAYERS, strict=True)):
        heads_first = [np.ascontiguousarray(one.transpose(1, 0, 2)) for one in (k, v)]
        records = kvarn.encode(*heads_first, pool.cfg.replace(head_dim=shape.head_dim), rotated=True)
        np.testing.assert_array_equal(np.from_dlpack(pool.pages[layer])[page], records)


def test_forks_cut_a_shared_record_apart():
    pool = make_pool()
    sequence, _ = filled(pool)
    stored, used = rotated(pool, sequence), pool.stats()
    a, b = pool.fork(sequence), pool.fork(sequence)
    pool.truncate(a, GROUP + 9)
    pool.truncate(b, GROUP + 40)
    assert tables(a)[0] == tables(b)[0] == [tables(sequence)[0][0], -1]
    assert tables(a)[1][1] != tables(b)[1][1]
    assert (pool.stats().pages_used, pool.stats().slots_used) == (used.pages_used, used.slots_used + 2)
    twin = pool.fork(a)
    rng = np.random.default_rng(1)
    append(pool, a, rows(rng, 3, "float16"))
    append(pool, twin, rows(rng, GROUP, "float16"))
    for one, length in ((a, GROUP + 9), (twin, GROUP), (b, GROUP + 40), (sequence, LENGTH)):
        same(
            [[array[:length] for array in pair] for pair in rotated(pool, one)],
            [[array[:length] for array in pair] for pair in stored],
        )
    pool.free(sequence)
    pool.truncate(b, GROUP + 9)
    same(rotated(pool, b), [[array[: GROUP + 9] for array in pair] for pair in stored])


def test_drafts_behind_the_cut_are_forgotten():
    pool = make_pool()
    sequence, _ = filled(pool)
    append(pool, sequence, rows(np.random.default_rng(1), 5, "float16"), hold=5)
    assert sequence.committed == LENGTH
    pool.truncate(sequence, 10)
    assert (sequence.length, sequence.committed) == (10, 10)
    append(pool, sequence, rows(np.random.default_rng(2), GROUP, "float16"), hold=3)
    assert (sequence.length, sequence.committed) == (GROUP + 10, GROUP + 7)


def test_without_a_free_slot_nothing_changes():
    pool = make_pool(slots=2)
    sequence, _ = filled(pool)
    other = pool.create()
    append(pool, other, rows(np.random.default_rng(1), 1, "float16"))
    stored, stats, before = rotated(pool, sequence), pool.stats(), tables(sequence)
    memory = [np.from_dlpack(view).tobytes() for view in (*pool.pages, *pool.slots)]
    with pytest.raises(
        CapacityError,
        match=r"100 tokens of sequence 0: expected a free slot for tile 1, which is sealed, with 0 of 2 "
        r"free; free a sequence, keep 64 tokens, or make the pool larger",
    ):
        pool.truncate(sequence, 100)
    assert (pool.stats(), tables(sequence), sequence.length) == (stats, before, LENGTH)
    assert [np.from_dlpack(view).tobytes() for view in (*pool.pages, *pool.slots)] == memory
    same(rotated(pool, sequence), stored)
    # Between two tiles no slot is needed; that gives back the slot of the tail.
    pool.truncate(sequence, 2 * GROUP)
    pool.truncate(sequence, 100)
    same(rotated(pool, sequence), [[array[:100] for array in pair] for pair in stored])


def test_other_tiles_keep_their_bytes():
    pool = make_pool(16)
    sequence, _ = filled(pool)
    pages = [np.from_dlpack(view).copy() for view in pool.pages]
    slots = [np.from_dlpack(view).copy() for view in pool.slots]
    pool.truncate(sequence, 2 * GROUP + 7)
    taken = tables(sequence)[1][2]
    for view, before in zip(pool.pages, pages, strict=True):
        np.testing.assert_array_equal(np.from_dlpack(view), before)
    for view, before in zip(pool.slots, slots, strict=True):
        differs = (np.from_dlpack(view) != before).any(axis=(1, 2, 4))
        assert differs.any(axis=1).nonzero()[0].tolist() == [taken]
        assert differs[taken].nonzero()[0].tolist() == list(range(7))


@pytest.mark.parametrize("sinks", [0, 16, GROUP])
def test_saved_and_offloaded_sequences_can_be_cut_and_cut_ones_saved(sinks, tmp_path):
    pool = make_pool(sinks)
    sequence, raw = filled(pool)
    stored = rotated(pool, sequence)
    pool.save(sequence, tmp_path / "whole.kvarn")
    pool.offload(sequence)
    with pytest.raises(kvarn.StateError, match="offloaded"):
        pool.truncate(sequence, 10)
    pool.restore(sequence)
    for one in (sequence, pool.load(tmp_path / "whole.kvarn")):
        pool.truncate(one, GROUP + 30)
        pool.save(one, tmp_path / "cut.kvarn")
        for cut in (one, pool.load(tmp_path / "cut.kvarn")):
            same(rotated(pool, cut), [[array[: GROUP + 30] for array in pair] for pair in stored])
            pool.truncate(cut, 40)
            expected = raw if sinks else stored
            same(rotated(pool, cut), [[array[:40] for array in pair] for pair in expected])
            pool.free(cut)
