"""Dense attention of long chunks: on CPU tensors, against float64 and against the CPU backend."""

import itertools

import kvarn
import kvarn.step
import numpy as np
import pytest
import torch
from kvarn import _dense
from kvarn.reference import attention

G, D, KV, SHARED = 64, 32, 2, 3
HEADS = KV * SHARED
CFG = kvarn.Config("kvarn_k4v2_g64", head_dim=D)
OPTIONS = {
    "plain": {},
    "window": {"window": 45},
    "window of one": {"window": 1},
    "wide window": {"window": 10_000},
    "softcap": {"softcap": 4.0},
    "scale": {"scale": 0.4},
    "sinks": {"sink_logits": torch.linspace(-2, 3, HEADS)},
    "all": {"window": 70, "softcap": 3.0, "scale": 0.3, "sink_logits": torch.linspace(-2, 3, HEADS)},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks and groups of rows that a short sequence has many of."""
    monkeypatch.setattr(_dense, "BLOCK", 48)
    monkeypatch.setattr(_dense, "ROWS", 24)
    monkeypatch.setattr(_dense, "SCORES", 5 * HEADS * 48)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_pool(lengths, dtype="float32"):
    """A pool of one layer, with sequences of these lengths."""
    pool = kvarn.Pool(CFG, layers=1, kv_heads=KV, pages=64, slots=64, dtype=dtype)
    sequences = [pool.create() for _ in lengths]
    if any(lengths):
        with pool.step(sequences, lengths) as step:
            k, v = (normal(sum(lengths), KV, D, seed=seed).to(getattr(torch, dtype)) for seed in (1, 2))
            step.append(0, k, v)
    return pool, sequences


def expected(q, k, v, start, *, scale=None, window=None, softcap=None, sink_logits=None):
    sinks = None if sink_logits is None else sink_logits.numpy()
    out, lse = attention.attend(
        *(x.float().numpy() for x in (q, k, v)),
        scale=scale,
        window=window,
        softcap=softcap,
        sink_logits=sinks,
        first_position=start,
    )
    return torch.from_numpy(out), torch.from_numpy(lse)


def dense(step, q, start, rotated, *, scale=None, window=None, softcap=None, sink_logits=None):
    """What the dense path makes of the only sequence of a step."""
    like = torch.empty(0)
    asked = []

    def expand(first, count):
        asked.append((first, count))
        return step.expand(0, 0, rotated, like=like, first=first, count=count)

    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
    scoring = _dense.Scoring(D**-0.5 if scale is None else scale, window, softcap)
    stored = len(step.expand(0, 0, like=like)[0])
    _dense.attend(q, start, stored, expand, scoring, sink_logits, out, lse)
    assert all(count <= _dense.BLOCK for _, count in asked)
    return out, lse


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("length", "count"), [(0, 1), (0, 100), (47, 24), (48, 25), (49, 1), (80, 40), (130, 75), (200, 23)]
)
def test_agrees_with_float64_and_the_cpu_backend(length, count, rotated, options):
    pool, (sequence,) = make_pool([length])
    step = pool.step([sequence], [count])
    q = normal(count, HEADS, D, seed=3)
    k, v = normal(count, KV, D, seed=4), normal(count, KV, D, seed=5)
    for appended in (False, True):
        if appended:
            step.append(0, k, v, rotated=rotated)
        out, lse = dense(step, q, length, rotated, **options)
        stored = step.expand(0, 0, rotated, like=q)
        want, want_lse = expected(q, *stored, length, **options)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=2e-6)
        theirs, their_lse = step.attend(0, q, **options, return_lse=True, rotated=rotated)
        # The backend multiplies records in integers.
        torch.testing.assert_close(out, theirs, rtol=1e-3, atol=5e-4)
        torch.testing.assert_close(lse, their_lse, rtol=1e-4, atol=5e-4)


def test_a_row_that_sees_nothing_is_zero_even_beside_a_sink_of_no_weight():
    pool, (sequence,) = make_pool([30])
    step = pool.step([sequence], [50])
    q = normal(50, HEADS, D, seed=3)
    sinks = torch.full((HEADS,), -torch.inf)
    sinks[1] = 2
    out, lse = dense(step, q, 30, False, window=10, sink_logits=sinks)
    assert out[9:].eq(0).all()
    assert out[:9].ne(0).any(-1).all()
    assert torch.isneginf(lse[9:, 0]).all()
    assert lse[9:, 1].eq(2).all()


def test_nan_in_a_query_stays_in_its_row_and_head():
    pool, (sequence,) = make_pool([100])
    step = pool.step([sequence], [30])
    q = normal(30, HEADS, D, seed=3)
    clean, _ = dense(step, q, 100, False)
    q[7, 2, 5] = torch.nan
    out, lse = dense(step, q, 100, False)
    assert out[7, 2].isnan().all()
    assert lse[7, 2].isnan()
    out[7, 2] = clean[7, 2]
    assert torch.equal(out, clean)


def test_autocast_changes_nothing():
    pool, (sequence,) = make_pool([100])
    step = pool.step([sequence], [30])
    q = normal(30, HEADS, D, seed=3)
    plain = dense(step, q, 100, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, plain, dense(step, q, 100, False)))


def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, **sides):
    """What the operator of torch computes: queries and keys end together, and windows count from there."""
    assert (cu_q, cu_k, max_q, max_k) == (None, None, q.shape[1], k.shape[1])
    assert (dropout, causal, debug) == (0.0, False, False)
    left, right = (-1 if side is None else side for side in sides.values())
    assert list(sides) == ["window_size_left", "window_size_right"]
    # As the operator does it: a side of all keys is none, and one without the other is as wide as the keys.
    left, right = (-1 if side >= max_k else side for side in (left, right))
    hidden = torch.zeros(max_q, max_k, dtype=torch.bool)
    if left >= 0 or right >= 0:
        left, right = (max_k if side < 0 else side for side in (left, right))
        distance = torch.arange(max_k) - (torch.arange(max_q)[:, None] + max_k - max_q)
        hidden = (distance > right) | (-distance > left)
    shared = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(shared, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) * scale
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    # A row without keys would be reported with +inf: it must not be asked for.
    assert lse.isfinite().all()
    out = torch.einsum("bhqk,bkhd->bqhd", (scores - lse[..., None]).exp(), v)
    return out.half(), lse.float(), None, None, None


@pytest.mark.parametrize(
    "options", [{}, {"window": 45}, {"window": 1}, {"window": 7}, {"window": 39}, {"window": 200}]
)
@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize(("length", "count"), [(0, 100), (7, 60), (48, 25), (80, 40), (130, 75), (200, 23)])
def test_flash_is_asked_for_what_the_products_compute(monkeypatch, length, count, appended, options):
    pool, (sequence,) = make_pool([length])
    step = pool.step([sequence], [count])
    q = normal(count, HEADS, D, seed=3).half()
    if appended:
        step.append(0, normal(count, KV, D, seed=4), normal(count, KV, D, seed=5))
    want, want_lse = dense(step, q, length, False, **options)
    monkeypatch.setattr(_dense, "_flash_forward", flash_forward)
    monkeypatch.setattr(_dense, "_has_flash", lambda q, scoring: True)
    taken = []
    for name in ("flash_block", "product_block"):
        block = getattr(_dense, name)
        monkeypatch.setattr(
            _dense, name, lambda *its, name=name, block=block: (taken.append(name), block(*its))[1]
        )
    out, lse = dense(step, q, length, False, **options)
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    if appended or length >= count:
        assert set(taken) <= {"flash_block"}
    if appended:
        assert taken


class OnStream:
    """A step of the CPU that is called as one on a device is."""

    def __init__(self, step, counts):
        self.step, self.counts = step, counts
        self.stored, self.lengths = step.stored, step.lengths

    def append(self, layer, k, v, rotated):
        self.step.append(layer, k, v, rotated, False)

    def attend(self, layer, q, out, lse, *options_and_more):
        *options, most_columns = options_and_more
        whole, whole_lse = torch.empty_like(out), torch.empty(q.shape[:2])
        self.step.attend(layer, q, whole, whole_lse, *options)
        row = 0
        for count in self.counts:
            if count * SHARED <= most_columns:
                out[row : row + count] = whole[row : row + count]
                if lse is not None:
                    lse[row : row + count] = whole_lse[row : row + count]
            row += count
        return max(self.counts) * SHARED > most_columns

    def expand(self, layer, index, k, v, first, rotated):
        assert k.dtype == v.dtype == torch.float16
        self.step.expand(layer, index, k, v, first, rotated)


@pytest.mark.parametrize(
    ("rotated", "name"), list(itertools.product((False, True), ("plain", "window", "sinks", "all")))
)
def test_short_and_long_sequences_of_one_step(monkeypatch, rotated, name):
    """Short ones are left to the kernel, long ones are attended densely: each gets its own rows."""
    lengths, counts = [100, 0, 70, 30, 128], [30, 1, 0, 90, 21]
    for name_of in ("_FUSED_COLUMNS", "_FUSED_COLUMNS_WITH_OPTIONS"):
        monkeypatch.setattr(kvarn.step, name_of, 64)
    pool, sequences = make_pool(lengths, "float16")
    plain = pool.step(sequences, counts)
    step = kvarn.Step(OnStream(plain._step, counts), tuple(counts), pool.layers, "float16", 0)
    asked = []
    own = _dense.attend
    monkeypatch.setattr(_dense, "attend", lambda q, *rest: (asked.append(len(q)), own(q, *rest)))
    q = normal(sum(counts), HEADS, D, seed=3).half()
    k, v = (normal(sum(counts), KV, D, seed=seed).half() for seed in (4, 5))
    for appended in (False, True):
        if appended:
            step.append(0, k, v, rotated=rotated)
        asked.clear()
        options = OPTIONS[name]
        out, lse = step.attend(0, q, **options, return_lse=True, rotated=rotated)
        want, want_lse = plain.attend(0, q, **options, return_lse=True, rotated=rotated)
        assert asked == [30, 90]  # 21 · 3 columns are not more than 64
        torch.testing.assert_close(out, want, rtol=4e-3, atol=4e-3)
        torch.testing.assert_close(lse, want_lse, rtol=2e-3, atol=2e-3)
        assert torch.equal(step.attend(0, q, **options, rotated=rotated), out)


class TestExpandARange:
    @pytest.mark.parametrize("sink_tokens", [0, 16, 64])
    @pytest.mark.parametrize("rotated", [False, True])
    def test_is_a_part_of_the_whole(self, sink_tokens, rotated):
        cfg = CFG.replace(sink_tokens=sink_tokens)
        pool = kvarn.Pool(cfg, layers=2, kv_heads=KV, pages=8, slots=8, dtype="float32")
        sequence = pool.create()
        k, v = (np.random.default_rng(seed).standard_normal((150, KV, D), np.float32) for seed in (1, 2))
        with pool.step([sequence], [150]) as step:
            for layer in range(2):
                step.append(layer, k, v)
            whole = step.expand(1, 0, rotated)
            for first, count in ((0, 150), (0, 1), (15, 2), (16, 1), (60, 70), (63, 66), (149, 1), (150, 0)):
                for got, want in zip(
                    step.expand(1, 0, rotated, first=first, count=count), whole, strict=True
                ):
                    np.testing.assert_array_equal(got, want[first : first + count])
        for got, want in zip(pool.expand(sequence, 1, rotated, first=31), whole, strict=True):
            np.testing.assert_array_equal(got, want[31:])

    @pytest.mark.parametrize(
        ("asked", "text"),
        [
            ({"first": 31}, "first 31: expected 0 to 30"),
            ({"first": -1}, "first -1: expected 0 to 30"),
            ({"first": 10, "count": 21}, "count 21: expected 0 to 20"),
            ({"count": -1}, "count -1: expected 0 to 30"),
        ],
    )
    def test_tokens_that_are_not_stored_are_refused(self, asked, text):
        pool, (sequence,) = make_pool([30])
        with pytest.raises(kvarn.ShapeError, match=text):
            pool.expand(sequence, 0, **asked)
        with pytest.raises(kvarn.ShapeError, match=text):
            pool.step([sequence], [1]).expand(0, 0, **asked)
