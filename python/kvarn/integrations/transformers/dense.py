"""Dense attention over raw K and V: a prompt without a past, and the own part of a chunk behind a past."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Scores held at once by `chunk_attention`: 2^22 float32 are 16 MiB, whatever the chunk's length.
_SCORES = 1 << 22


@dataclass(frozen=True)
class Scoring:
    """How products of queries and keys become the weights of values.

    Attributes:
        scale: factor of the products.
        window: query i sees key j if i - j < window; None: every key up to its own.
        softcap: scores become softcap * tanh(scores / softcap).
        sink_logits: [heads] float32, a logit per head that takes part in the softmax and has no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def capped(self, scores: Tensor) -> Tensor:
        """Return scaled products of queries and keys as scores."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def norm(self, scores: Tensor) -> Tensor:
        """Return the natural log of the softmax denominators of scores [..., heads, queries, keys]."""
        norm = scores.logsumexp(-1)
        return norm if self.sink_logits is None else torch.logaddexp(norm, self.sink_logits[:, None])


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return the mask of the last `queries` of `keys` tokens, bool [queries, keys], True where it sees."""
    positions = torch.arange(keys, device=device)
    distance = positions[keys - queries :, None] - positions
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Causal attention of a chunk to itself.

    Args:
        q: queries, [batch, heads, tokens, head_dim].
        k: keys, [batch, kv_heads, tokens, head_dim]; heads is a multiple of kv_heads.
        v: values, like k.
        scoring: how scores become weights.

    Returns:
        [batch, tokens, heads, head_dim] in q's dtype.
    """
    window = scoring.window
    if scoring.softcap is None and scoring.sink_logits is None and (window is None or window >= q.shape[2]):
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scoring.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)
    batch, heads, tokens, head_dim = q.shape
    out = q.new_empty(batch, tokens, heads, head_dim)
    for row, chunk in zip(out, zip(q, k, v, strict=True), strict=True):
        first = 0
        for block, _ in chunk_attention(*chunk, scoring):
            row[first : first + len(block)] = block
            first += len(block)
    return out


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Iterator[tuple[Tensor, Tensor]]:
    """Causal attention of one row's chunk to itself, with the logarithm of its normaliser.

    Computed in float32, a block of queries at a time: memory does not grow with the square of the chunk.

    Args:
        q: queries, [heads, tokens, head_dim].
        k: keys, [kv_heads, tokens, head_dim].
        v: values, like k.
        scoring: how scores become weights.

    Yields:
        The output [queries, heads, head_dim] and the natural log-sum-exp [queries, heads] of the next block
        of queries, both float32.
    """
    heads, tokens, head_dim = q.shape
    kv_heads = k.shape[0]
    shared = heads // kv_heads
    k, v = k.float(), v.float()
    block = max(1, _SCORES // max(1, heads * tokens))
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        first = 0 if scoring.window is None else max(0, start - scoring.window + 1)
        queries = (
            q[:, start:stop].float().reshape(kv_heads, shared * (stop - start), head_dim) * scoring.scale
        )
        scores = (queries @ k[:, first:stop].transpose(1, 2)).view(heads, stop - start, stop - first)
        scores = scoring.capped(scores)
        seen = causal_mask(stop - start, stop - first, scoring.window, q.device)
        norm = scoring.norm(scores.masked_fill_(~seen, -torch.inf))
        weights = scores.sub_(norm[..., None]).exp_().view(kv_heads, shared * (stop - start), stop - first)
        out = (weights @ v[:, first:stop]).view(heads, stop - start, head_dim)
        yield out.transpose(0, 1), norm.T


def add_past(blocks: Iterable[tuple[Tensor, Tensor]], past: Tensor, past_lse: Tensor, first: int) -> int:
    """Combine attention of a row's queries to two disjoint sets of tokens, in place.

    Args:
        blocks: the output and log-sum-exp of one block of queries after the other, as of `chunk_attention`;
            its set is never empty.
        past: output over the other set, [tokens of all rows, heads, head_dim]; becomes that over both.
        past_lse: float32 [tokens of all rows, heads]; -inf where a query sees no token of the past.
        first: the row's first token.

    Returns:
        The token behind the row's last.
    """
    for out, lse in blocks:
        at = slice(first, first := first + len(out))
        share = torch.sigmoid(past_lse[at] - lse)[..., None]
        past[at] = torch.lerp(out, past[at].float(), share)
    return first


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Attention under any mask, in float32, a block of queries at a time.

    Args:
        q: queries, [batch, heads, queries, head_dim].
        k: keys, [batch, kv_heads, keys, head_dim].
        v: values, like k.
        mask: [batch or 1, heads or 1, queries, keys], bool (True is seen) or added to the scores.
        scoring: how scores become weights; its window is not read.

    Returns:
        [batch, queries, heads, head_dim] in q's dtype; 0 where a query sees nothing.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    shared = heads // kv_heads
    k, v = k.float(), v.float()
    out = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype, device=q.device)
    block = max(1, _SCORES // (batch * heads * keys))
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        part = q[:, :, start:stop].float().reshape(batch, kv_heads, shared * (stop - start), head_dim)
        scores = (part * scoring.scale @ k.transpose(2, 3)).view(batch, heads, stop - start, keys)
        scores = scoring.capped(scores)
        rows = mask[:, :, start:stop]
        scores = scores.masked_fill(~rows, -torch.inf) if mask.dtype == torch.bool else scores + rows
        norm = scoring.norm(scores)
        # A row of -inf, which sees nothing, has the norm -inf too.
        weights = (scores - norm.clamp_min(torch.finfo(torch.float32).min)[..., None]).exp()
        weights = weights.view(batch, kv_heads, shared * (stop - start), keys)
        out[:, start:stop] = (
            (weights @ v).view(batch, heads, stop - start, head_dim).transpose(1, 2).to(q.dtype)
        )
    return out
