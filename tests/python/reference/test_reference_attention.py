import math

import numpy as np
import pytest
from kvarn.reference import attend


def naive(q, k, v, scale, window, softcap, sinks, first):
    """One query, head and key at a time, with Python floats."""
    n, heads, D = q.shape
    m, kv_heads, _ = k.shape
    out, lse = np.zeros((n, heads, D)), np.zeros((n, heads))
    for i in range(n):
        for h in range(heads):
            g = h // (heads // kv_heads)
            logits = {}
            for j in range(m):
                if j <= first + i and (window is None or first + i - j < window):
                    x = scale * float(np.dot(q[i, h].astype(float), k[j, g].astype(float)))
                    logits[j] = softcap * math.tanh(x / softcap) if softcap else x
            total = math.fsum(math.exp(x) for x in logits.values())
            total += math.exp(sinks[h]) if sinks is not None else 0.0
            lse[i, h] = math.log(total) if total else -math.inf
            for j, x in logits.items():
                out[i, h] += math.exp(x) / total * v[j, g].astype(float)
    return out, lse


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "first"), [(5, 5, None), (3, 9, None), (1, 9, None), (3, 4, 4), (2, 3, 9), (2, 0, 0)]
)
def test_against_the_definition(heads, window, softcap, sinks, n, m, first, rng):
    q = rng.standard_normal((n, heads, 16)).astype(np.float32)
    k, v = rng.standard_normal((2, m, 2, 16)).astype(np.float32)
    logits = rng.standard_normal(heads) if sinks else None
    for scale in (None, 0.7):
        out, lse = attend(
            q, k, v, scale=scale, window=window, softcap=softcap, sink_logits=logits, first_position=first
        )
        start = m - n if first is None else first
        want = naive(q, k, v, 0.25 if scale is None else scale, window, softcap, logits, start)
        np.testing.assert_allclose(out, want[0], atol=1e-13)
        np.testing.assert_allclose(lse, want[1], atol=1e-13)


def test_a_query_without_keys_gives_zeros(rng):
    q = rng.standard_normal((1, 2, 16))
    k = v = rng.standard_normal((3, 1, 16))
    out, lse = attend(q, k, v, window=2, first_position=10)
    assert not out.any()
    assert (lse == -np.inf).all()
    out, lse = attend(q, k, v, window=2, first_position=10, sink_logits=np.array([0.5, -2.0]))
    assert not out.any()
    np.testing.assert_allclose(lse, [[0.5, -2.0]])


def test_large_logits_do_not_overflow(rng):
    q = np.full((1, 1, 16), 1e3)
    k = np.stack([np.full((1, 16), 1e3), np.full((1, 16), -1e3)])
    v = rng.standard_normal((2, 1, 16))
    out, lse = attend(q, k, v)
    np.testing.assert_array_equal(out[0], v[0])
    np.testing.assert_allclose(lse, 4e6)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 3, 16), (4, 2, 16), (4, 2, 16)),
        ((1, 2, 16), (4, 2, 16), (5, 2, 16)),
        ((1, 2, 32), (4, 2, 16), (4, 2, 16)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v):
    with pytest.raises(ValueError, match=r"expected \[n, heads, D\]"):
        attend(np.zeros(q), np.zeros(k), np.zeros(v))
