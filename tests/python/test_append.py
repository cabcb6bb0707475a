"""Appending to many sequences at once: each is stored as it would be alone, whatever the others hold."""

import numpy as np
import pytest
from kvarn import Config, Pool

SEQUENCES, KV_HEADS = 40, 8


def bad_rows(rng, tokens, head_dim, dtype):
    """Rows of K and V with a few elements that must be counted, in some heads of some tokens."""
    k, v = rng.standard_normal((2, tokens, KV_HEADS, head_dim)).astype(dtype)
    for token, head in [(0, 0), (1, 7), (1, 3), (7, 2), (tokens - 1, 7)]:
        k[token, head, 5] = np.nan
        v[token, head, [0, head_dim - 1]] = np.inf
    v[4, 4] = 65504
    return k, v


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("counts", [[1] * SEQUENCES, [1, 0, 3, 2, KV_HEADS + 1] * (SEQUENCES // 5)])
def test_what_must_be_counted_does_not_touch_other_rows(counts, head_dim, dtype):
    cfg = Config("kvarn_k4v2_g64", head_dim=head_dim)
    k, v = bad_rows(np.random.default_rng(1), sum(counts), head_dim, dtype)
    pool = Pool(cfg, layers=1, kv_heads=KV_HEADS, pages=1, slots=2 * SEQUENCES, dtype=dtype)
    sequences = [pool.create() for _ in counts]
    # A third of them share a slot with a fork, and take a copy of it before they write.
    with pool.step(sequences, [1] * SEQUENCES) as step:
        step.append(0, k[:1].repeat(SEQUENCES, 0), v[:1].repeat(SEQUENCES, 0))
    forks = [pool.fork(sequence) for sequence in sequences[::3]]
    before = pool.stats()
    with pool.step(sequences, counts) as step:
        counted = step.append(0, k, v)
    stats = pool.stats()
    assert (stats.non_finite - before.non_finite, counted.non_finite) == (15, 15)
    assert stats.saturated - before.saturated == counted.saturated
    assert (counted.saturated > 0) == (dtype == "float16")

    alone = Pool(cfg, layers=1, kv_heads=KV_HEADS, pages=1, slots=1, dtype=dtype)
    first, saturated = 0, 0
    for sequence, count in zip(sequences, counts, strict=True):
        other = alone.create()
        for rows, of in [(slice(0, 1), 1), (slice(first, first + count), count)]:
            with alone.step([other], [of]) as step:
                saturated += step.append(0, k[rows], v[rows]).saturated
        for got, want in zip(pool.expand(sequence, 0), alone.expand(other, 0), strict=True):
            assert np.array_equal(got, want)
        alone.free(other)
        first += count
    assert counted.saturated + before.saturated == saturated
    for fork in forks:
        assert np.isfinite(pool.expand(fork, 0)[0]).all()
