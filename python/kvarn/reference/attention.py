"""Attention in float64, from the definition: the ground truth of every attention path."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvarn.reference.settings import Float64


def attend(
    q: npt.NDArray[np.generic],
    k: npt.NDArray[np.generic],
    v: npt.NDArray[np.generic],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: npt.NDArray[np.generic] | None = None,
    first_position: int | None = None,
) -> tuple[Float64, Float64]:
    """Causal attention of one sequence with grouped query heads.

    The logit of query i and key j is scale·<q_i, k_j>, then softcap·tanh(logit / softcap) if a softcap is
    given. Key j is seen by the query at position i if j <= i and, with a window, i - j < window. A sink logit
    is one more term of the softmax of its head, without a value; scale and softcap do not touch it.

    Args:
        q: [n, heads, D], query i at position `first_position` + i.
        k: [m, kv_heads, D], key j at position j; heads is a multiple of kv_heads, and query head h reads KV
            head h // (heads / kv_heads).
        v: [m, kv_heads, D].
        scale: 1 / sqrt(D) if None.
        window: tokens, at least 1; None for none.
        softcap: positive; None for none.
        sink_logits: [heads]; None for none.
        first_position: m - n if None: the queries are the newest tokens.

    Returns:
        out float64 [n, heads, D] and LSE float64 [n, heads], the natural logarithm of the softmax
        denominator, sink logit included. A query that sees no key gives zeros, and -inf or its sink logit.

    Raises:
        ValueError: shapes that do not fit together.
    """
    n, heads, D = q.shape
    m, kv_heads, _ = k.shape
    if k.shape != v.shape or k.shape[2] != D or heads % kv_heads:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected [n, heads, D] and twice "
            "[m, kv_heads, D] with heads a multiple of kv_heads"
        )
    scale = 1.0 / np.sqrt(D) if scale is None else scale
    first = m - n if first_position is None else first_position

    per_group = heads // kv_heads
    query = q.astype(np.float64).reshape(n, kv_heads, per_group, D)
    logits = scale * np.einsum("ngsd,mgd->ngsm", query, k.astype(np.float64)).reshape(n, heads, m)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    age = (first + np.arange(n))[:, None] - np.arange(m)[None, :]
    seen = age >= 0
    if window is not None:
        seen &= age < window
    logits = np.where(seen[:, None, :], logits, -np.inf)

    extra = np.full(heads, -np.inf) if sink_logits is None else sink_logits.astype(np.float64)
    largest = np.maximum(logits.max(axis=-1, initial=-np.inf), extra)
    shift = np.where(np.isfinite(largest), largest, 0.0)
    weights = np.exp(logits - shift[..., None])
    total = weights.sum(axis=-1) + np.exp(extra - shift)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + shift
    probabilities = weights / np.where(total > 0, total, 1.0)[..., None]
    grouped = probabilities.reshape(n, kv_heads, per_group, m)
    out = np.einsum("ngsm,mgd->ngsd", grouped, v.astype(np.float64)).reshape(n, heads, D)
    return out, lse
