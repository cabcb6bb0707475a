"""Dense attention over raw K and V: a prompt without a past, and the own part of a chunk behind a past."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Scores held at once by `chunk_attention`: 2^22 float32 are 16 MiB, whatever the chunk's length.
_SCORES = 1 << 22


def causal_mask(queries: int, keys: int, window: int | None = None) -> Tensor:
    """Return the mask of the last `queries` of `keys` tokens, bool [queries, keys], True where a key is seen."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Causal attention of a chunk to itself.

    Args:
        q: queries, [batch, heads, tokens, head_dim].
        k: keys, [batch, kv_heads, tokens, head_dim]; heads is a multiple of kv_heads.
        v: values, like k.
        scale: factor of the scores.
        window: token i sees token j if i - j < window.
        softcap: scores become softcap * tanh(scores / softcap).
        sink_logits: [heads], a logit per head that takes part in the softmax and has no value.

    Returns:
        [batch, tokens, heads, head_dim] in q's dtype.
    """
    if softcap is None and sink_logits is None and (window is None or window >= q.shape[2]):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)
    rows = [
        chunk_attention(*row, scale=scale, window=window, softcap=softcap, sink_logits=sink_logits)[0]
        for row in zip(q, k, v, strict=True)
    ]
    return torch.stack(rows).to(q.dtype)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of one row's chunk to itself, with the logarithm of its normaliser.

    Computed in float32, a block of queries at a time: memory does not grow with the square of the chunk.

    Args:
        q: queries, [heads, tokens, head_dim].
        k: keys, [kv_heads, tokens, head_dim].
        v: values, like k.
        scale: factor of the scores.
        window: token i sees token j if i - j < window.
        softcap: scores become softcap * tanh(scores / softcap).
        sink_logits: [heads], as in `causal_attention`.

    Returns:
        The output [tokens, heads, head_dim] and the natural log-sum-exp [tokens, heads], both float32.
    """
    heads, tokens, head_dim = q.shape
    kv_heads = k.shape[0]
    shared = heads // kv_heads
    k, v = k.float(), v.float()
    out = torch.empty(tokens, heads, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    block = max(1, _SCORES // max(1, heads * tokens))
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        first = 0 if window is None else max(0, start - window + 1)
        queries = q[:, start:stop].float().reshape(kv_heads, shared * (stop - start), head_dim)
        scores = (queries @ k[:, first:stop].transpose(1, 2)).view(heads, stop - start, stop - first) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = (
            torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        )
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(hidden, -torch.inf)
        norm = scores.logsumexp(-1)
        if sink_logits is not None:
            norm = torch.logaddexp(norm, sink_logits.float()[:, None])
        weights = (scores - norm[..., None]).exp().view(kv_heads, shared * (stop - start), stop - first)
        out[start:stop] = (weights @ v[:, first:stop]).view(heads, stop - start, head_dim).transpose(0, 1)
        lse[start:stop] = norm.T
    return out, lse


def merge(out: Tensor, lse: Tensor, past_out: Tensor, past_lse: Tensor) -> Tensor:
    """Combine attention over two disjoint sets of tokens.

    Args:
        out: float32 [tokens, heads, head_dim]; its set is never empty.
        lse: float32 [tokens, heads].
        past_out: like out, in any dtype.
        past_lse: like lse; -inf where a query sees no token of the past.

    Returns:
        float32 [tokens, heads, head_dim].
    """
    share = torch.sigmoid(past_lse - lse)[..., None]
    return torch.lerp(out, past_out.float(), share)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention under any mask, in float32, a block of queries at a time.

    Args:
        q: queries, [batch, heads, queries, head_dim].
        k: keys, [batch, kv_heads, keys, head_dim].
        v: values, like k.
        mask: [batch or 1, heads or 1, queries, keys], bool (True is seen) or added to the scores.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap), before the mask.
        sink_logits: [heads], as in `causal_attention`.

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
        scores = (part @ k.transpose(2, 3)).view(batch, heads, stop - start, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows = mask[:, :, start:stop]
        scores = scores.masked_fill(~rows, -torch.inf) if mask.dtype == torch.bool else scores + rows
        norm = scores.logsumexp(-1, keepdim=True)
        if sink_logits is not None:
            norm = torch.logaddexp(norm, sink_logits.float()[:, None, None])
        weights = (scores - norm.clamp_min(torch.finfo(torch.float32).min)).exp()
        weights = weights.view(batch, kv_heads, shared * (stop - start), keys)
        out[:, start:stop] = (weights @ v).view(batch, heads, stop - start, head_dim).transpose(1, 2).to(q.dtype)
    return out
