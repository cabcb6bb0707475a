"""Dense caches that store a type of their own choice, whatever type the model computes in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of the dense caches and the type each stores."""


class StoredLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A dynamic layer that keeps K and V in `storage` and widens them when they are read."""

    def __init__(self, storage: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storage = storage

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K and V [B, Hkv, n, D]; return all of both [B, Hkv, S, D] in the type they came in."""
        narrow = key_states.to(self.storage), value_states.to(self.storage)
        keys, values = super().update(*narrow, *args, **kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)


def dense_cache(model: PreTrainedModel, name: str) -> DynamicCache:
    """A `DynamicCache` whose full-attention layers store the type `name` (a key of `DENSE_DTYPES`).

    Where that is the model's own type this is the stock cache. Otherwise reading widens the whole cache at
    every step, which is part of the time such a cache takes.
    """
    cache = DynamicCache(config=model.config)
    storage = DENSE_DTYPES[name]
    if storage != model.dtype:
        cache.layers = [
            StoredLayer(storage) if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]
    return cache
