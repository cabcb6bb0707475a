import numpy as np
import pytest
from kvarn.reference import Pool, attend, decode, encode
from kvarn.reference.codec import to_slot
from kvarn.reference.rotation import rotate
from kvarn.reference.rounding import Counts

G, D, HEADS, KV_HEADS, LAYERS = 64, 32, 4, 2, 2


@pytest.fixture
def config(settings):
    def make(**changes):
        return settings(**{"group": G, "head_dim": D, "sink_tokens": 0, **changes})

    return make


def tokens(rng, n, dtype=np.float32):
    return rng.standard_normal((2, LAYERS, n, KV_HEADS, D)).astype(dtype)


def feed(pool, sequence, k, v, counts, hold=0):
    """Add tokens in steps of `counts`, from k and v [layers, n, kv_heads, D]."""
    at = 0
    for count in counts:
        step = pool.step([sequence], [count], hold)
        for layer in range(LAYERS):
            step.append(layer, k[layer, at : at + count], v[layer, at : at + count])
        step.finish()
        at += count


def expected(cfg, k, v, sealed, slot_type="float16"):
    """What attention must read of one layer: slot values, and the decoded record on sealed tiles beyond S."""
    out = []
    slots = [to_slot(x, slot_type, False, Counts()) for x in (k, v)]
    for tile in sealed:
        part = slice(tile * G, (tile + 1) * G)
        record = encode(
            slots[0][part].swapaxes(0, 1),
            slots[1][part].swapaxes(0, 1),
            cfg,
            rotated=True,
            slot_type=slot_type,
        )
        out.append([x.swapaxes(0, 1) for x in decode(record, cfg, rotated=True)])
    for tile, pair in zip(sealed, out, strict=True):
        for position in range(tile * G, (tile + 1) * G):
            if position >= cfg.sink_tokens:
                for slot, decoded in zip(slots, pair, strict=True):
                    slot[position] = decoded[position - tile * G]
    return slots


@pytest.mark.parametrize("sinks", [0, 16, G])
@pytest.mark.parametrize("recent", [0, 5, G])
@pytest.mark.parametrize("hold", [0, 1])
def test_a_tile_is_sealed_at_its_moment(sinks, recent, hold, config, rng):
    cfg = config(sink_tokens=sinks, recent_tokens=recent)
    pool = Pool(cfg, LAYERS, KV_HEADS)
    sequence = pool.create()
    k, v = tokens(rng, 3 * G + 7)
    first = 1 if sinks == G else 0
    for n in range(1, 3 * G + 8):
        feed(pool, sequence, k[:, n - 1 : n], v[:, n - 1 : n], [1], hold)
        assert (sequence.length, sequence.committed) == (n, n - hold)
        due = [i for i in range(first, 4) if n - hold >= (i + 1) * G + recent]
        assert list(sequence.sealed) == due, n
        assert all(sorted(one.records) == due for one in sequence.layers), n
    for layer in range(LAYERS):
        for got, want in zip(
            pool.expand(sequence, layer, rotated=True), expected(cfg, k[layer], v[layer], due), strict=True
        ):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("sinks", [0, 16, 48, G])
def test_sink_positions_are_never_rounded(sinks, config, rng):
    cfg = config(sink_tokens=sinks, key_bits=2)
    pool = Pool(cfg, LAYERS, KV_HEADS)
    sequence = pool.create()
    k, v = tokens(rng, 2 * G)
    feed(pool, sequence, k, v, [2 * G])
    stored, _ = pool.expand(sequence, 0, rotated=True)
    exact = to_slot(k[0], "float16", False, Counts())
    same = (stored == exact).all(axis=(1, 2))
    assert same[:sinks].all()
    assert not same[sinks:].any()


@pytest.mark.parametrize(
    "counts", [[2 * G + 9], [1, 2 * G + 8], [G] * 2 + [9], [50, 50, 37], [G - 1, 1, 1, G - 1, 9]]
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_stored_values_do_not_depend_on_the_steps(counts, dtype, config, rng):
    cfg = config(sink_tokens=16)
    pool = Pool(cfg, LAYERS, KV_HEADS, dtype=dtype)
    sequence = pool.create()
    k, v = tokens(rng, 2 * G + 9)
    feed(pool, sequence, k, v, counts)
    assert sequence.sealed == range(2)
    for layer in range(LAYERS):
        want = expected(cfg, k[layer], v[layer], range(2), dtype)
        for got, one in zip(pool.expand(sequence, layer, rotated=True), want, strict=True):
            np.testing.assert_array_equal(got, one)


def test_records_are_those_of_encode(config, rng):
    cfg = config()
    pool = Pool(cfg, LAYERS, KV_HEADS)
    sequence = pool.create()
    k, v = tokens(rng, G, np.float16)
    feed(pool, sequence, k, v, [30, 34])
    for layer in range(LAYERS):
        want = encode(k[layer].swapaxes(0, 1), v[layer].swapaxes(0, 1), cfg)
        np.testing.assert_array_equal(sequence.layers[layer].records[0], want)


def test_expand_turns_back(config, rng):
    pool = Pool(config(sink_tokens=G), LAYERS, KV_HEADS)
    sequence = pool.create()
    k, v = tokens(rng, 40)
    feed(pool, sequence, k, v, [40])
    for layer in range(LAYERS):
        got_k, got_v = pool.expand(sequence, layer)
        np.testing.assert_allclose(got_k, k[layer], atol=5e-3)
        np.testing.assert_allclose(got_v, v[layer], atol=5e-3)
        np.testing.assert_array_equal(got_k, rotate(pool.expand(sequence, layer, rotated=True)[0]))


def test_ragged_batch_equals_single_sequences(config, rng):
    cfg = config()
    pool, single = Pool(cfg, LAYERS, KV_HEADS), Pool(cfg, LAYERS, KV_HEADS)
    counts = [70, 0, 3]
    k, v = tokens(rng, sum(counts))
    q = rng.standard_normal((sum(counts), HEADS, D))
    batch = [pool.create() for _ in counts]
    step = pool.step(batch, counts)
    outs = []
    for layer in range(LAYERS):
        step.append(layer, k[layer], v[layer])
        outs.append(step.attend(layer, q, return_lse=True))
    step.finish()
    start = 0
    for sequence, count in zip(batch, counts, strict=True):
        span = slice(start, start + count)
        start += count
        alone = single.create()
        one = single.step([alone], [count])
        for layer in range(LAYERS):
            one.append(layer, k[layer, span], v[layer, span])
            out, lse = one.attend(layer, q[span], return_lse=True)
            np.testing.assert_array_equal(out, outs[layer][0][span])
            np.testing.assert_array_equal(lse, outs[layer][1][span])
        one.finish()
        np.testing.assert_array_equal(pool.expand(sequence, 1)[0], single.expand(alone, 1)[0])


def test_attend_before_append_sees_the_past_only(config, rng):
    cfg = config()
    pool = Pool(cfg, LAYERS, KV_HEADS)
    sequence = pool.create()
    k, v = tokens(rng, 2 * G)
    feed(pool, sequence, k, v, [60])
    past = pool.expand(sequence, 0, rotated=True)
    q = rng.standard_normal((10, HEADS, D))
    step = pool.step([sequence], [10])
    options = {"window": 20, "softcap": 3.0, "scale": 0.3, "sink_logits": rng.standard_normal(HEADS)}
    out, lse = step.attend(0, q, return_lse=True, rotated=True, **options)
    want = attend(q, *past, first_position=60, **options)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(lse, want[1])

    step.append(0, k[0, 60:70], v[0, 60:70])
    out, lse = step.attend(0, q, return_lse=True, rotated=True, **options)
    stored = expected(cfg, k[0, :70], v[0, :70], [0])  # sealed in this step: read as a record
    want = attend(q, *stored, **options)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(lse, want[1])


def test_rotation_is_invisible_to_callers(config, rng):
    pool = Pool(config(sink_tokens=G), LAYERS, KV_HEADS, dtype="float32")
    sequence = pool.create()
    k, v = tokens(rng, 9)
    q = rng.standard_normal((9, HEADS, D))
    step = pool.step([sequence], [9])
    step.append(0, k[0], v[0])
    np.testing.assert_allclose(step.attend(0, q), attend(q, k[0], v[0])[0], atol=1e-5)


def test_an_abandoned_step_leaves_the_pool_as_it_was(config, rng):
    pool = Pool(config(), LAYERS, KV_HEADS)
    sequence = pool.create()
    k, v = tokens(rng, 2 * G)
    feed(pool, sequence, k, v, [50])
    before = pool.expand(sequence, 0)
    step = pool.step([sequence], [30])
    k[0, 60] = np.nan
    for layer in range(LAYERS):
        step.append(layer, k[layer, 50:80], v[layer, 50:80])
    assert (sequence.length, sequence.committed, len(sequence.sealed)) == (50, 50, 0)
    for got, want in zip(pool.expand(sequence, 0), before, strict=True):
        np.testing.assert_array_equal(got, want)
    assert pool.counts == Counts()
    feed(pool, sequence, k[:, 50:], v[:, 50:], [30])
    assert sequence.length == 80
    assert pool.counts == Counts(nonfinite=KV_HEADS * D)
    with pytest.raises(ValueError, match="changed since the step began"):
        step.finish()


def test_rejected_drafts_never_enter_a_record(config, rng):
    cfg = config()
    pool = Pool(cfg, LAYERS, KV_HEADS)
    drafted, plain = pool.create(), pool.create()
    k, v = tokens(rng, G + 10)
    feed(pool, drafted, k, v, [G - 2])
    wrong_k, wrong_v = tokens(rng, 6)
    feed(pool, drafted, wrong_k, wrong_v, [6], hold=6)
    assert (drafted.length, drafted.committed, len(drafted.sealed)) == (G + 4, G - 2, 0)
    pool.truncate(drafted, G - 2)
    assert (drafted.length, drafted.committed) == (G - 2, G - 2)
    feed(pool, drafted, k[:, G - 2 :], v[:, G - 2 :], [12])
    feed(pool, plain, k, v, [G + 10])
    assert drafted.sealed == plain.sealed == range(1)
    for layer in range(LAYERS):
        for got, want in zip(pool.expand(drafted, layer), pool.expand(plain, layer), strict=True):
            np.testing.assert_array_equal(got, want)


def test_the_next_step_commits_what_was_held(config, rng):
    pool = Pool(config(), LAYERS, KV_HEADS)
    sequence = pool.create()
    k, v = tokens(rng, G)
    feed(pool, sequence, k, v, [G], hold=4)
    assert (sequence.committed, len(sequence.sealed)) == (G - 4, 0)
    feed(pool, sequence, k[:, :0], v[:, :0], [0])
    assert (sequence.committed, list(sequence.sealed)) == (G, [0])


@pytest.mark.parametrize("slot_type", ["float16", "float32"])
@pytest.mark.parametrize("sinks", [0, 16, G])
def test_truncate_keeps_what_attention_read_or_the_slot_of_the_sinks(sinks, slot_type, config, rng):
    cfg = config(sink_tokens=sinks)
    k, v = tokens(rng, 2 * G + 9)
    for n in (2 * G + 9, 2 * G + 1, 2 * G, 2 * G - 1, G + 1, G, G - 1, sinks + 1, 1, 0):
        pool = Pool(cfg, LAYERS, KV_HEADS, slot_type)
        sequence = pool.create()
        feed(pool, sequence, k, v, [2 * G + 9])
        stored = pool.expand(sequence, 1, rotated=True)
        pool.truncate(sequence, n)
        cut = n % G > 0 and n < 2 * G
        raw = n < G and sinks > 0
        assert pool.unsealed == int(cut and not raw)
        assert (sequence.length, sequence.committed) == (n, n)
        assert list(sequence.sealed) == [
            tile for tile in range(2) if (tile + 1) * G <= n and (tile or sinks < G)
        ]
        for got, old, new in zip(pool.expand(sequence, 1, rotated=True), stored, (k[1], v[1]), strict=True):
            expected = old[:n].copy()
            if raw:
                expected = to_slot(new[:n], slot_type, False, Counts())
            elif cut and slot_type == "float16":
                first = n // G * G
                expected[first:] = expected[first:].astype(np.float16)
            np.testing.assert_array_equal(got, expected)
        feed(pool, sequence, k[:, n:], v[:, n:], [2 * G + 9 - n])
        assert list(sequence.sealed) == [tile for tile in range(2) if tile or sinks < G]


def test_truncate_refuses_lengths_that_the_sequence_never_had(config, rng):
    pool = Pool(config(), LAYERS, KV_HEADS)
    sequence = pool.create()
    k, v = tokens(rng, 9)
    feed(pool, sequence, k, v, [9])
    for n in (-1, 10):
        with pytest.raises(ValueError, match=rf"truncate to {n}: expected 0 to 9 \(length\)"):
            pool.truncate(sequence, n)
    assert sequence.length == 9


def test_a_sealed_tile_stays_sealed_when_the_recent_window_is_cut(config, rng):
    pool = Pool(config(recent_tokens=5), LAYERS, KV_HEADS)
    sequence = pool.create()
    k, v = tokens(rng, G + 5)
    feed(pool, sequence, k, v, [G + 5])
    pool.truncate(sequence, G)
    assert list(sequence.sealed) == [0]
    feed(pool, sequence, k[:, :1], v[:, :1], [1])
    assert list(sequence.sealed) == [0]


def test_slots_saturate_and_count(config):
    pool = Pool(config(), 1, KV_HEADS)
    sequence = pool.create()
    k = np.zeros((2, KV_HEADS, D), np.float32)
    k[0, 0, 0], k[1, 1, 3] = 1e9, np.nan
    step = pool.step([sequence], [2])
    step.append(0, k, k * 0, rotated=True)
    step.finish()
    stored, _ = pool.expand(sequence, 0, rotated=True)
    assert stored[0, 0, 0] == 65504
    assert stored[1, 1, 3] == 0
    assert pool.counts == Counts(nonfinite=2, saturated=1)  # NaN·0 is NaN: once in k, once in v


def test_misuse_is_refused(config, rng):
    pool = Pool(config(), LAYERS, KV_HEADS)
    a, b = pool.create(), pool.create()
    k, v = tokens(rng, 4)
    with pytest.raises(ValueError, match="count 2, hold 3: expected 0 <= hold <= count"):
        pool.step([a], [2], hold=3)
    with pytest.raises(ValueError, match="count -1"):
        pool.step([a], [-1])
    with pytest.raises(ValueError, match="2 sequences, 1 counts, 1 holds"):
        pool.step([a, b], [1])
    with pytest.raises(ValueError, match="listed twice"):
        pool.step([a, a], [1, 1])
    step = pool.step([a], [4])
    with pytest.raises(ValueError, match=r"expected \[4, 2, 32\]"):
        step.append(0, k[0, :3], v[0, :3])
    step.append(0, k[0], v[0])
    with pytest.raises(ValueError, match="layer 0: expected one of 2 that was not appended"):
        step.append(0, k[0], v[0])
    with pytest.raises(ValueError, match="layer 2"):
        step.append(2, k[0], v[0])
    with pytest.raises(ValueError, match=r"layers \[1\] were not appended"):
        step.finish()
    step.append(1, k[1], v[1])
    step.finish()
    with pytest.raises(ValueError, match="finished"):
        step.append(0, k[0], v[0])
    pool.free(b)
    for use in (lambda: pool.step([b], [1]), lambda: pool.expand(b, 0), lambda: pool.free(b)):
        with pytest.raises(ValueError, match="was freed"):
            use()
