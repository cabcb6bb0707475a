"""Operators of torch over a `KVarNStaticCache`: what a compiled model holds instead of the cache.

A graph holds no Python objects, so a cache is named by its handle, int64 [1] on the CPU, as a step is in
`kvarn.torch_ops`. At run time an operator looks the cache up and does what the eager cache does. Every
operator counts as writing to the handle, though its value stays, so that compilers leave all calls, and leave
them in order. Each call plans on the host: inductor is told to leave them out of CUDA graphs.

None of the operators has a derivative.
"""

import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvarn import StateError
from kvarn.integrations.transformers.dense import Scoring

if TYPE_CHECKING:
    from kvarn.integrations.transformers.static_cache import KVarNStaticCache

# Caches as long as somebody else refers to them.
_caches: WeakValueDictionary[int, "KVarNStaticCache"] = WeakValueDictionary()
_serials = itertools.count(1)


def serial_of(cache: "KVarNStaticCache") -> int:
    """Return the number to write into a cache's handle: never used again in this process."""
    serial = next(_serials)
    _caches[serial] = cache
    return serial


def _cache(handle: Tensor) -> "KVarNStaticCache":
    serial = int(handle.item())
    cache = _caches.get(serial)
    if cache is None:
        raise StateError(
            f"cache handle {serial}: expected that of a KVarNStaticCache that exists; keep the cache while "
            "its handle is used"
        )
    return cache


def _attend(
    cache: Tensor,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    chunk = _cache(cache).kvarn_layers[layer].enter(k, v)
    return chunk.attend(q, mask, Scoring(scale, window, softcap, sink_logits)).contiguous()


def _columns(cache: Tensor, device: torch.device) -> Tensor:
    columns = _cache(cache).kvarn_layers[0].get_seq_length()
    return torch.full((), columns, dtype=torch.int64, device=device)


def _fake_attend(cache: Tensor, layer: int, q: Tensor, *_: object) -> Tensor:
    batch, heads, columns, head_dim = q.shape
    return q.new_empty(batch, columns, heads, head_dim)


def _fake_columns(cache: Tensor, device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


# The operators exist as long as this does.
_torch_library: Any = torch.library
_library = _torch_library.Library("kvarn", "FRAGMENT")
_tags = (torch.Tag.cudagraph_unsafe,)
_library.define(
    "cache_attend(Tensor(a!) cache, int layer, Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, "
    "int? window, float? softcap, Tensor? sink_logits) -> Tensor",
    tags=_tags,
)
_library.define("cache_columns(Tensor(a!) cache, Device device) -> Tensor", tags=_tags)
# One implementation for every device: the pool of the cache says where the work is done.
_library.impl("cache_attend", _attend, "CompositeExplicitAutograd")
_library.impl("cache_columns", _columns, "CompositeExplicitAutograd")
torch.library.register_fake("kvarn::cache_attend", _fake_attend, lib=_library)
torch.library.register_fake("kvarn::cache_columns", _fake_columns, lib=_library)


def attend(
    cache: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    """Append k and v to a layer and attend to it, as `Chunk.attend` does.

    Args:
        cache: the cache's handle.
        layer: index among the KVarN layers.
        q: queries, [batch, heads, columns, head_dim].
        k: new keys, [batch, kv_heads, columns, head_dim].
        v: new values, like k.
        mask: bool [batch, past and new columns] or [batch, max_tokens], False at padding; None: no padding.
        scoring: how scores become weights.

    Returns:
        [batch, columns, heads, head_dim] in the query's dtype.
    """
    out: Tensor = torch.ops.kvarn.cache_attend(
        cache, layer, q, k, v, mask, scoring.scale, scoring.window, scoring.softcap, scoring.sink_logits
    )
    return out


def columns(cache: Tensor, device: torch.device) -> Tensor:
    """Return the columns that the cache holds, int64 [] on a device, padding included."""
    held: Tensor = torch.ops.kvarn.cache_columns(cache, device)
    return held
