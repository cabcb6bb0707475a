"""What fits into a number of bytes: the arithmetic of a pool, without making one."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from kvarn._device import cuda_index
from kvarn._kvarn import Config, most_workspace_bytes
from kvarn._layers import LayerShape, layer_shapes, slot_dtype
from kvarn.errors import CapacityError, ShapeError

# Lengths are int32.
_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class Capacity:
    """Pages and slots that fit, and what they hold.

    ``Pool(cfg, layers=capacity.layers, pages=capacity.pages, slots=capacity.slots, …)`` takes `bytes` bytes,
    and on CUDA up to `workspace_bytes` more on each stream that attends.

    Attributes:
        cfg: The configuration.
        layers: A LayerShape for each layer.
        sequences: Sequences that there are slots for.
        pages: Sealed tiles, over all sequences.
        slots: 16-bit tiles, over all sequences.
        page_bytes: One page in all layers: what a sealed tile takes.
        slot_bytes: One slot in all layers.
        workspace_bytes: Most that partial results of attention take on a stream; 0 on the CPU. They grow to
            it with long chunks, and many long sequences. Static arrays have their own.
        tokens_per_sequence: Tokens that every sequence can have at the same time.
        sixteen_bit_bytes_per_token: What a token takes in all layers of a dense 16-bit cache.
    """

    cfg: Config
    layers: tuple[LayerShape, ...]
    sequences: int
    pages: int
    slots: int
    page_bytes: int
    slot_bytes: int
    workspace_bytes: int
    tokens_per_sequence: int
    sixteen_bit_bytes_per_token: int

    @property
    def bytes(self) -> int:
        """All pages and slots."""
        return self.pages * self.page_bytes + self.slots * self.slot_bytes

    @property
    def bytes_per_token(self) -> float:
        """What a sealed token takes in all layers, parameters and padding included."""
        return self.page_bytes / self.cfg.group


def capacity(
    cfg: Config,
    memory: int,
    *,
    layers: int | Iterable[tuple[int, int]],
    kv_heads: int | None = None,
    sequences: int = 1,
    hold: int = 0,
    dtype: object = "float16",
    device: object = "cpu",
) -> Capacity:
    """Says what fits into `memory` bytes.

    Slots come first, as many as the sequences can ever hold at once, and on CUDA the partial results of
    attention on one stream; the rest becomes pages. On top come the tables of a pool. Needs no device.

    Args:
        cfg: Bit widths, tile length, sinks, recent window; the head dim if `layers` is a number.
        memory: Bytes of pages, slots and partial results.
        layers: Number of layers; or a LayerShape for each, where layers differ.
        kv_heads: KV heads of each layer, if `layers` is a number.
        sequences: Sequences that exist at the same time.
        hold: Most tokens of a sequence that a step holds back, as for speculation.
        dtype: Type of k, v, as in `Pool`.
        device: As in `Pool`.

    Raises:
        CapacityError: All but the pages takes more than `memory`.
        ShapeError: A number is out of range, or `kv_heads` does not go with `layers`.
        ConfigError: A head dim is not supported.
        DTypeError: An unknown type.
        DeviceError: Another device.
    """
    shapes = tuple(LayerShape(*shape) for shape in layer_shapes(layers, kv_heads, cfg))
    if not shapes:
        raise ShapeError("0 layers: expected 1 or more; a pool serves at least one layer")
    memory, sequences, hold = (operator.index(number) for number in (memory, sequences, hold))
    for name, number, least in (("memory", memory, 0), ("sequences", sequences, 1), ("hold", hold, 0)):
        if number < least:
            raise ShapeError(f"{name} {number}: expected {least} or more; pass a count")
    element = 4 if slot_dtype(dtype) == "float32" else 2
    values = sum(shape.kv_heads * shape.head_dim for shape in shapes) * 2
    page_bytes = sum(shape.kv_heads * cfg.replace(head_dim=shape.head_dim).record_bytes for shape in shapes)
    slot_bytes = values * cfg.group * element
    # As `SealRule::slot_bound` of the core says.
    tail = -(-(cfg.recent_tokens + cfg.group + hold - 1) // cfg.group)
    slots = sequences * (int(cfg.sink_tokens > 0) + 2 * tail)

    def tokens_with(pages: int) -> int:
        # A tile is sealed with the last of its tokens and of the recent window behind it. A tile that is a
        # sink as a whole never gets a page.
        tiles = pages // sequences + int(cfg.sink_tokens == cfg.group) + 1
        return min(tiles * cfg.group + cfg.recent_tokens - 1, _MOST_TOKENS)

    left, workspace_bytes = memory - slots * slot_bytes, 0
    if cuda_index(device) is not None:
        most_tokens = tokens_with(max(left, 0) // page_bytes)
        workspace_bytes = most_workspace_bytes(cfg, list(shapes), most_tokens, hold)
    if left < workspace_bytes:
        beside = f" and the {workspace_bytes} of partial results" if workspace_bytes else ""
        raise CapacityError(
            f"{memory} bytes for {sequences} sequences: expected at least the {slots * slot_bytes} of their "
            f"{slots} slots{beside}; give more memory, or serve fewer sequences"
        )
    pages = (left - workspace_bytes) // page_bytes
    return Capacity(
        cfg=cfg,
        layers=shapes,
        sequences=sequences,
        pages=pages,
        slots=slots,
        page_bytes=page_bytes,
        slot_bytes=slot_bytes,
        workspace_bytes=workspace_bytes,
        tokens_per_sequence=tokens_with(pages),
        sixteen_bit_bytes_per_token=values * 2,
    )
