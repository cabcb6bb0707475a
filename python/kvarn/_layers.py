"""What the layers of a pool cache, as its callers say it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Literal, NamedTuple

from kvarn._kvarn import Config
from kvarn.errors import DTypeError, ShapeError


class LayerShape(NamedTuple):
    """What one layer caches per token.

    Attributes:
        kv_heads: KV heads.
        head_dim: Channels of a head, a multiple of 16 from 16 to 256.
    """

    kv_heads: int
    head_dim: int


def slot_dtype(dtype: object) -> Literal["float16", "float32"]:
    """The element type of slots for k and v of a type."""
    name = dtype.__name__ if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
    if name in ("float16", "bfloat16"):
        return "float16"
    if name == "float32":
        return "float32"
    raise DTypeError(f"dtype {name}: expected float16, bfloat16 or float32; choose the type of k and v")


def layer_shapes(
    layers: int | Iterable[tuple[int, int]], kv_heads: int | None, cfg: Config
) -> list[tuple[int, int]]:
    """(kv_heads, head_dim) of each layer."""
    if isinstance(layers, Iterable):
        if kv_heads is not None:
            text = (
                f"kv_heads {kv_heads} beside a list of layers: expected one or the other; leave kv_heads out"
            )
            raise ShapeError(text)
        return [(shape[0], shape[1]) for shape in layers]
    if kv_heads is None:
        raise ShapeError(
            f"kv_heads None with {layers} layers: expected the KV heads of a layer; pass kv_heads="
        )
    return [(kv_heads, cfg.head_dim)] * operator.index(layers)
