"""Attention of a long chunk: stored tokens expanded block by block, dense attention over each, merged.

The fused kernel decodes what is stored anew for every few queries; from some number of queries on it is
cheaper to decode once and multiply densely. Memory is bounded, whatever the lengths: K and V of `BLOCK`
tokens in 16 bit, the float32 output of `ROWS` queries, and `SCORES` float32 scores where matrix products are
taken instead of flash attention, which has no softcap.

K and V are expanded in the frame of the queries, so nothing is rotated here. They are float16 for bfloat16
queries too: bfloat16 would lose three of their bits. How a sequence is cut depends on its own positions only,
so results are the same alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 8192
# At most half of `BLOCK`: then only a history shorter than the chunk gives blocks of fewer keys than queries.
ROWS = 4096
SCORES = 1 << 24

Expand = Callable[[int, int], tuple[Tensor, Tensor]]

_flash_forward = torch.ops.aten._flash_attention_forward


@dataclass(frozen=True)
class Scoring:
    """How products of queries and keys become the weights of values.

    Attributes:
        scale: Factor of the products.
        window: The query at position i sees key j if i - j < window; None: all up to its own.
        softcap: Scores become softcap·tanh(score / softcap); None: they do not.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


def attend(
    q: Tensor,
    start: int,
    stored: int,
    expand: Expand,
    scoring: Scoring,
    sink_logits: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Causal attention of the queries of one sequence over its stored tokens.

    Args:
        q: Queries, [tokens, heads, head_dim], the first at position `start`.
        start: Position of the first query.
        stored: Tokens that are stored, at positions 0 to `stored` - 1.
        expand: Gives K and V, [count, kv_heads, head_dim], of `count` tokens from `first` on, in the frame
            of the queries: float16 on CUDA. They may be overwritten by the next call.
        scoring: How products become weights.
        sink_logits: float32 [heads], a logit per head, part of the softmax, without a value; or None.
        out: Written: like `q`. Zeros where a query sees nothing.
        lse: Written: natural logarithm of the softmax denominators, sink logits included, float32 [tokens,
            heads]; or None.
    """
    # Under autocast the products of float32 tensors would be those of a 16-bit type.
    with torch.autocast(q.device.type, enabled=False):
        for top in range(0, len(q), ROWS):
            rows = slice(top, min(top + ROWS, len(q)))
            merged = _Merged(q[rows])
            end = min(stored, start + rows.stop)
            first = 0 if scoring.window is None else max(0, start + top - scoring.window + 1)
            for at, count in _blocks(first, end):
                _add_block(merged, q[rows], start + top, at, count, expand, scoring)
            if sink_logits is not None:
                merged.add_sinks(sink_logits)
            out[rows] = merged.out
            if lse is not None:
                lse[rows] = merged.lse


def _blocks(first: int, end: int) -> Iterator[tuple[int, int]]:
    """First token and count of as few blocks of `BLOCK` tokens as there can be, of about the same size."""
    if first >= end:
        return
    size = -(-(end - first) // -(-(end - first) // BLOCK))
    for at in range(first, end, size):
        yield at, min(size, end - at)


class _Merged:
    """Attention over the blocks so far: the output, float32, and the natural log-sum-exp, -inf for none."""

    def __init__(self, q: Tensor) -> None:
        self.out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        self.lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Adds a block of which each of `rows` sees a token."""
        share = torch.sigmoid(lse - self.lse[rows])[..., None]
        self.out[rows] = torch.lerp(self.out[rows], out.float(), share)
        self.lse[rows] = torch.logaddexp(self.lse[rows], lse)

    def add_sinks(self, logits: Tensor) -> None:
        """Adds tokens of these logits, [heads], without values."""
        total = torch.logaddexp(self.lse, logits)
        # Where a row sees nothing and its sink is -inf too, the output is 0 whatever the share.
        self.out *= (self.lse - total).exp().nan_to_num(0.0)[..., None]
        self.lse = total


def _add_block(
    merged: _Merged, q: Tensor, start: int, first: int, count: int, expand: Expand, scoring: Scoring
) -> None:
    """Adds the tokens from `first` on for those queries, the first at `start`, that see some of them."""
    low = max(0, first - start)
    high = len(q)
    if scoring.window is not None:
        high = min(high, first + count - 1 + scoring.window - start)
    if low >= high:
        return
    k, v = expand(first, count)
    # Queries within the block, then those behind it, from which no key is hidden by being newer.
    behind = max(low, min(high, first + count - start))
    for rows in (slice(low, behind), slice(behind, high)):
        queries = rows.stop - rows.start
        if queries == 0:
            continue
        ahead = start + rows.start - first
        crowded = queries > count and _hides(queries, 1, ahead, scoring.window)
        block = flash_block if _has_flash(q, scoring) and not crowded else product_block
        merged.add(rows, *block(q[rows], k, v, ahead, scoring))


def _has_flash(q: Tensor, scoring: Scoring) -> bool:
    """Whether flash attention can be taken."""
    return q.is_cuda and scoring.softcap is None


def flash_block(q: Tensor, k: Tensor, v: Tensor, ahead: int, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Attention to one block by torch's flash attention; arguments and results as of `product_block`.

    Without softcap. The last query is at the last key, or all are behind it; with a window that hides a key,
    there are no more queries than keys.
    """
    queries, keys = len(q), len(k)
    # Of n queries and m keys, query i sees the keys from i + m - n - left to i + m - n + right.
    right = 0 if ahead < keys - 1 else None
    left = None
    if _hides(queries, 1, ahead, scoring.window):
        left = keys - queries - ahead + int(scoring.window or 0) - 1
    out, lse, *_ = _flash_forward(
        q.half()[None],
        k[None],
        v[None],
        None,
        None,
        queries,
        keys,
        0.0,
        False,
        False,
        scale=scoring.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out[0], lse[0].T


def product_block(q: Tensor, k: Tensor, v: Tensor, ahead: int, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Attention to one block by matrix products in float32, some queries at a time.

    Args:
        q: Queries, [queries, heads, head_dim], each of which sees a key.
        k: Keys, [keys, kv_heads, head_dim].
        v: Values, like k.
        ahead: Position of the first query less that of the first key, at least 0: query i sees the keys up
            to i + ahead and, with a window, from i + ahead - window + 1 on.
        scoring: How products become weights.

    Returns:
        Output [queries, heads, head_dim] and natural log-sum-exp, float32 [queries, heads].
    """
    heads, head_dim = q.shape[1:]
    keys, kv_heads = k.shape[:2]
    shared = heads // kv_heads
    k, v = (x.float().transpose(0, 1) for x in (k, v))
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    step = max(1, SCORES // (heads * keys))
    for top in range(0, len(q), step):
        rows = slice(top, min(top + step, len(q)))
        count = rows.stop - top
        part = q[rows].float().view(count, kv_heads, shared, head_dim).permute(1, 2, 0, 3)
        products = part.reshape(kv_heads, shared * count, head_dim) @ k.transpose(1, 2)
        scores = products.mul_(scoring.scale).view(kv_heads, shared, count, keys)
        if scoring.softcap is not None:
            scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
        if _hides(count, keys, ahead + top, scoring.window):
            scores.masked_fill_(_hidden(count, keys, ahead + top, scoring.window, q.device), -torch.inf)
        norm = scores.logsumexp(-1)
        weights = scores.sub_(norm[..., None]).exp_().view(kv_heads, shared * count, keys)
        values = (weights @ v).view(kv_heads, shared, count, head_dim)
        out[rows] = values.permute(2, 0, 1, 3).reshape(count, heads, head_dim)
        lse[rows] = norm.permute(2, 0, 1).reshape(count, heads)
    return out, lse


def _hides(queries: int, keys: int, ahead: int, window: int | None) -> bool:
    """Whether a key is hidden from a query."""
    return ahead < keys - 1 or (window is not None and queries - 1 + ahead >= window)


def _hidden(queries: int, keys: int, ahead: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys are hidden from which queries, bool [queries, keys]."""
    distance = torch.arange(ahead, ahead + queries, device=device)[:, None] - torch.arange(
        keys, device=device
    )
    return distance < 0 if window is None else (distance < 0) | (distance >= window)
