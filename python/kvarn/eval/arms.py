"""An arm: one kind of cache under comparison, and the attention implementation that reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import kvarn
from kvarn.eval.dense import DENSE_DTYPES, dense_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


@dataclass(frozen=True)
class Arm:
    """One kind of cache.

    Attributes:
        name: what to show.
        attention: the attention implementation the model runs under, such as "kvarn" or "sdpa".
        make_cache: (model, max_tokens) to an empty cache for one sequence of at most `max_tokens` tokens.
    """

    name: str
    attention: str
    make_cache: Callable[[PreTrainedModel, int], Cache]


def dense_arm(dtype: str) -> Arm:
    """A dense cache that stores `dtype`: "fp32", "bf16" or "fp16"."""
    if dtype not in DENSE_DTYPES:
        raise kvarn.KvarnError(f"dense cache {dtype!r}: expected one of {', '.join(DENSE_DTYPES)}")
    return Arm(dtype, "sdpa", lambda model, max_tokens: dense_cache(model, dtype))


def kvarn_arm(preset: str, *, refit: bool = True, hold: int | None = None, name: str | None = None) -> Arm:
    """A KVarN cache.

    Args:
        preset: a preset name, such as "kvarn_k4v2_g128".
        refit: False is KVarN as published.
        hold: tokens kept uncommitted at each step; None follows the rule of `KVarNCache`, 0 commits at once.
        name: what to show; the preset, marked "(published)" without refit, by default.
    """

    def make_cache(model: PreTrainedModel, max_tokens: int) -> Cache:
        cache: Cache = kvarn.KVarNCache(model.config, preset, hold=hold, max_tokens=max_tokens, refit=refit)
        return cache

    return Arm(name or (preset if refit else f"{preset} (published)"), "kvarn", make_cache)
