"""Attention of new tokens of several sequences: to their own raw keys and values, and to what is stored."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kvarn import Step
from kvarn.integrations.transformers.dense import Scoring, add_past, causal_attention, chunk_attention

# Queries, keys and values of the new tokens of one sequence, each [heads, tokens, head_dim].
Row = tuple[Tensor, Tensor, Tensor]


def prompts_attention(rows: Iterable[Row], scoring: Scoring) -> Tensor:
    """Attend within each of several prompts, of which nothing is stored yet.

    Returns:
        [tokens of all rows, heads, head_dim] in the queries' dtype.
    """
    return torch.cat([causal_attention(q[None], k[None], v[None], scoring)[0] for q, k, v in rows])


def chunks_attention(step: Step, layer: int, q: Tensor, rows: Iterable[Row], scoring: Scoring) -> Tensor:
    """Attend to what is stored of each sequence and to its raw new tokens, before they are appended.

    Args:
        step: the step of these sequences.
        layer: layer of the pool.
        q: queries of all rows, [tokens, heads, head_dim].
        rows: the new tokens of each sequence, in the step's order.
        scoring: how scores become weights.

    Returns:
        Like q.
    """
    # The sink logits take part once, with the own chunk.
    past, past_norm = step.attend(layer, q, scoring.scale, scoring.window, scoring.softcap, return_lse=True)
    first = 0
    for row in rows:
        first = add_past(chunk_attention(*row, scoring), past, past_norm, first)
    return past


def stored_attention(step: Step, layer: int, q: Tensor, scoring: Scoring) -> Tensor:
    """Attend to all that is stored, the new tokens included, after they were appended.

    Args and result as of `chunks_attention`.
    """
    return step.attend(layer, q, scoring.scale, scoring.window, scoring.softcap, scoring.sink_logits)
