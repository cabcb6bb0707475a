"""Divergence of arms from a reference arm over one text, measured in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.eval.arms import Arm

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


@dataclass(frozen=True)
class Divergence:
    """One value per predicted token, in order; n of them.

    Attributes:
        kl: float32 [n], KL(reference ‖ arm) of the next-token distributions, in nats.
        agree: bool [n], whether both have the same most likely token.
        nll: float32 [n], negative log-likelihood of the text under the arm, in nats.
        nll_reference: float32 [n], the same under the reference.
    """

    kl: NDArray[np.float32]
    agree: NDArray[np.bool_]
    nll: NDArray[np.float32]
    nll_reference: NDArray[np.float32]

    def segments(self, length: int) -> list[tuple[int, int, float, float]]:
        """Cut into runs of `length` tokens: (first, end, mean KL, share of agreement) of each."""
        cuts = [(first, min(first + length, len(self.kl))) for first in range(0, len(self.kl), length)]
        return [(a, b, float(self.kl[a:b].mean()), float(self.agree[a:b].mean())) for a, b in cuts]


def divergence(
    model: PreTrainedModel,
    ids: Sequence[int],
    reference: Arm,
    arms: Sequence[Arm],
    *,
    block: int = 128,
    prefill: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Divergence]:
    """Feed one text through every arm's cache, block by block, and compare next-token distributions.

    All arms advance together: at most two blocks of log-probabilities [block, vocabulary] exist at once.

    Args:
        model: a causal language model in evaluation mode.
        ids: the text's tokens, at least 2.
        reference: the arm that the others are measured against.
        arms: the arms to measure.
        block: tokens per forward pass. A block's own tokens see each other as the cache's rules say; a KVarN
            cache with hold=0 seals what a block completes before the next block reads it.
        prefill: tokens at the start that are fed in one pass and not scored. 0 scores everything.
        progress: called with the number of text tokens just done by all arms.

    Returns:
        A `Divergence` per arm, over the predictions of tokens max(prefill, 1) … len(ids) - 1.
    """
    if not 0 <= prefill < len(ids) or len(ids) < 2:
        raise ValueError(
            f"prefill {prefill} of {len(ids)} tokens: expected at least one token left to predict"
        )
    if block < 1:
        raise ValueError(f"block {block}: expected at least 1 token")
    tokens = torch.tensor(ids, dtype=torch.long)
    everyone = [reference, *arms]
    caches = [arm.make_cache(model, len(ids)) for arm in everyone]
    parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in arms]
    with _attention_restored(model), torch.no_grad():
        for first, end, kept in _chunks(len(ids) - 1, block, prefill):
            target = tokens[end - kept + 1 : end + 1]
            base = _log_probabilities(model, reference, caches[0], tokens[first:end], kept)
            for arm, cache, found in zip(arms, caches[1:], parts, strict=True):
                found.append(
                    _measure(base, _log_probabilities(model, arm, cache, tokens[first:end], kept), target)
                )
            if progress:
                progress(end - first)
    return [
        Divergence(*(torch.cat(column).numpy() for column in zip(*found, strict=True))) for found in parts
    ]


def _chunks(fed: int, block: int, prefill: int) -> Iterator[tuple[int, int, int]]:
    """(first, end, predictions kept) of each forward pass over `fed` tokens."""
    if prefill:
        yield 0, prefill, 1
    for first in range(prefill, fed, block):
        end = min(first + block, fed)
        yield first, end, end - first


def _log_probabilities(
    model: PreTrainedModel, arm: Arm, cache: Cache, tokens: torch.Tensor, kept: int
) -> torch.Tensor:
    """Float32 [kept, vocabulary]: log-probabilities after each of the last `kept` tokens."""
    model.set_attn_implementation(arm.attention)
    output = model(input_ids=tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=kept)
    return torch.log_softmax(output.logits[0].float(), dim=-1)


def _measure(base: torch.Tensor, other: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    kl = (base.exp() * (base - other)).sum(-1)
    agree = base.argmax(-1) == other.argmax(-1)
    column = target[:, None]
    return kl, agree, -other.gather(1, column)[:, 0], -base.gather(1, column)[:, 0]


@contextmanager
def _attention_restored(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    try:
        yield
    finally:
        model.set_attn_implementation(before)
