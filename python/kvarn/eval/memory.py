"""Bytes that a cache holds, counted from what is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


@dataclass(frozen=True)
class CacheBytes:
    """Bytes in use, by what they hold.

    Attributes:
        pages: records of sealed tiles, parameters and padding included.
        slots: unquantised sinks and tail, whole slots, however full.
        tables: block tables, slot tables and lengths.
        dense: K and V of layers that a stock transformers layer keeps.
        tokens: length of the sequence.
    """

    pages: int
    slots: int
    tables: int
    dense: int
    tokens: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.pages + self.slots + self.tables + self.dense

    @property
    def per_token(self) -> float:
        """Bytes of all layers together per token of the sequence."""
        return self.total / max(self.tokens, 1)


def cache_bytes(cache: Cache) -> CacheBytes:
    """Count the bytes in use of a KVarN or stock cache that holds one sequence."""
    pages = slots = tables = 0
    pool = getattr(cache, "pool", None)
    if pool is not None:
        stats = pool.stats()
        pages, slots = stats.page_bytes, stats.slot_bytes
        # Two int32 entries per tile (page id, slot id) and the length of the sequence.
        tables = -(-stats.tokens // pool.cfg.group) * 2 * 4 + stats.sequences * 4
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    dense = sum(
        tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor)
    )
    return CacheBytes(pages, slots, tables, dense, cache.get_seq_length())


def sixteen_bit_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of a dense 16-bit cache of one sequence of `tokens` tokens; sliding layers keep a window."""
    config = model.config.get_text_config(decoder=True)
    heads = int(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds, _ = get_layer_types_and_kwargs(config)
    window = getattr(config, "sliding_window", None) or tokens
    kept = [min(tokens, window - 1) if kind == "sliding_attention" else tokens for kind in kinds]
    return sum(kept) * heads * int(head_dim) * 2 * 2
