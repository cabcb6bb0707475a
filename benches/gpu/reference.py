"""Attention in float64, which peers are checked against."""

import torch


def reference(q, k, v):
    """Causal attention in float64: the queries are the newest tokens.

    Args:
        q: [batch, heads, q_len, head_dim].
        k, v: [batch, kv_heads, tokens, head_dim].
    """
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    queries, keys = scores.shape[-2:]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def distance(out, expected):
    """‖out − expected‖ / ‖expected‖; NaN counts as infinity."""
    found = float((out.double() - expected).norm() / expected.norm())
    return found if found == found else float("inf")
