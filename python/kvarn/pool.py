"""The cache memory of one model: a pool of pages and slots, its sequences, and the steps that extend them.

A **page** holds the records of one sealed tile of all KV heads, a **slot** the 16-bit K and V of one tile that is a
sink or not sealed yet; one page id and one slot id serve all layers. A **step** is one forward pass of a batch.

Everywhere NumPy arrays or torch tensors on the CPU come in, and the same kind goes out. Calls may come from several
threads; arrays, and views of a pool's memory, must not be written by another thread while a call runs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from kvarn import _kvarn
from kvarn._arrays import Array, empty, empty_like
from kvarn._kvarn import Config, Memory, Sequence, Stats
from kvarn.codec import EncodeCounts
from kvarn.errors import DeviceError, DTypeError, ShapeError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    AnyArray = NDArray[Any] | torch.Tensor

__all__ = ["LayerShape", "Pool", "Sequence", "Stats", "Step"]


class LayerShape(NamedTuple):
    """What one layer caches per token.

    Attributes:
        kv_heads: KV heads.
        head_dim: Channels of a head, a multiple of 16 from 16 to 256.
    """

    kv_heads: int
    head_dim: int


class Pool:
    """Pages and slots for all layers of one model, and the sequences that use them.

    Memory is reserved at once and taken as it is used, so a pool may be made larger than what is used.

    Attributes:
        cfg: The configuration.
        layers: A LayerShape for each layer.
        dtype: Element type of the slots: "float16" or "float32".
    """

    def __init__(
        self,
        cfg: Config,
        *,
        layers: int | Iterable[tuple[int, int]],
        kv_heads: int | None = None,
        pages: int,
        slots: int,
        dtype: object = "float16",
        device: object = "cpu",
    ) -> None:
        """Reserves the memory.

        Args:
            cfg: Bit widths, tile length, encoder, sinks, recent window; and the head dim if `layers` is a number.
            layers: Number of layers; or a LayerShape for each, where layers differ.
            kv_heads: KV heads of each layer, if `layers` is a number.
            pages: Sealed tiles that fit, over all sequences.
            slots: 16-bit tiles that fit. A sequence needs up to [sinks > 0] + 2·ceil((recent_tokens + group + hold - 1)
                / group), hold being the most tokens that its steps hold back.
            dtype: Type of k, v: "float16", "bfloat16" (slots are then float16) or "float32"; torch's and NumPy's types
                are known too.
            device: "cpu".

        Raises:
            ShapeError: A number is out of range, or `kv_heads` does not go with `layers`.
            ConfigError: A head dim is not supported.
            DTypeError: An unknown type.
            DeviceError: Another device.
            CapacityError: The system has not as much address space.
        """
        if str(device) != "cpu":
            text = f"device {str(device)!r}: expected 'cpu'; this version of kvarn has a CPU backend only"
            raise DeviceError(text)
        self.cfg = cfg
        self.dtype = _slot_dtype(dtype)
        shapes = _layer_shapes(layers, kv_heads, cfg)
        self._pool = _kvarn.Pool(cfg, shapes, pages, slots, self.dtype == "float32")
        self.layers = tuple(LayerShape(*shape) for shape in self._pool.layers)

    def create(self) -> Sequence:
        """A new, empty sequence."""
        return self._pool.create()

    def free(self, sequence: Sequence) -> None:
        """Forgets a sequence and gives back its pages and slots.

        Raises:
            StateError: It was freed before, is in an open step, or belongs to another pool.
        """
        self._pool.free(sequence)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Keeps the first `length` tokens; those kept are committed.

        Raises:
            StateError: `length` lies in a sealed tile (the text names the boundary); or as in `free`.
            ShapeError: `length` is beyond the sequence.
        """
        self._pool.truncate(sequence, length)

    def step(
        self, sequences: Iterable[Sequence], counts: Iterable[int], hold: int | Iterable[int] = 0
    ) -> Step:
        """Plans one forward pass and reserves the pages and slots that it needs: all of them, or nothing changes.

        Args:
            sequences: The batch, each sequence once.
            counts: New tokens of each. 0 is allowed where tokens that were held are committed.
            hold: Newest tokens, of those, that stay uncommitted: one number for all, or one each, at most its count.
                What was held before is committed. Only committed tokens are sealed.

        Raises:
            CapacityError: Too few free pages or slots; the text says which sequence lacked what.
            ShapeError: Lists or numbers that do not fit together.
            StateError: A sequence was freed, is in another open step, or belongs to another pool.
        """
        sequences = list(sequences)
        holds = [hold] * len(sequences) if isinstance(hold, int) else list(hold)
        return Step(self._pool.step(sequences, list(counts), holds))

    @overload
    def expand(
        self, sequence: Sequence, layer: int, rotated: bool = False, *, like: Array
    ) -> tuple[Array, Array]: ...

    @overload
    def expand(
        self, sequence: Sequence, layer: int, rotated: bool = False, *, like: None = None
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...

    def expand(
        self, sequence: Sequence, layer: int, rotated: bool = False, *, like: Any = None
    ) -> tuple[Any, Any]:
        """Decodes a sequence in one layer, without the tokens of an open step.

        Args:
            sequence: The sequence.
            layer: The layer.
            rotated: Leave the result in the rotated (Hadamard) frame.
            like: An array whose kind and type the result takes. None: NumPy, in the type of the slots.

        Returns:
            K and V, [length, kv_heads, head_dim].

        Raises:
            StateError: The sequence was freed, or belongs to another pool.
            ShapeError: No such layer.
        """
        if like is None:
            like = np.empty(0, self.dtype)
        length = sequence.length
        # A layer that does not exist is refused below, by the call that knows the range.
        shape = self.layers[layer] if 0 <= layer < len(self.layers) else LayerShape(0, 0)
        k, v = (empty((length, *shape), like) for _ in range(2))
        self._pool.expand(sequence, layer, k, v, rotated)
        return k, v

    def stats(self) -> Stats:
        """How full the pool is, and what its encoders met."""
        return self._pool.stats()

    @cached_property
    def pages(self) -> tuple[Memory, ...]:
        """The pages of each layer, uint8 [pages, kv_heads, record_bytes].

        Views by ``numpy.from_dlpack`` or ``torch.from_dlpack`` share the memory and keep it alive. Writing through them
        changes what is cached.
        """
        return tuple(self._pool.pages(layer) for layer in range(len(self.layers)))

    @cached_property
    def slots(self) -> tuple[Memory, ...]:
        """The slots of each layer, [slots, kv_heads, 2, group, head_dim] of `dtype`, K before V, rotated.

        Shared as `pages` are.
        """
        return tuple(self._pool.slots(layer) for layer in range(len(self.layers)))

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"<kvarn.Pool {self.cfg.name}, {len(self.layers)} layers, {stats.pages_used}/{stats.pages} pages, "
            f"{stats.slots_used}/{stats.slots} slots, {stats.sequences} sequences, {self.dtype}>"
        )


class Step:
    """One forward pass of a batch, made by `Pool.step`.

    In each layer: `append`, and `attend` before it (what was stored before the step) or after it (everything). Then
    `finish`. As a context manager it finishes when the block ends, and is abandoned if the block raises. A step that
    is dropped unfinished is abandoned: the pool is as it was.
    """

    __slots__ = ("_open", "_step")

    def __init__(self, step: _kvarn.Step) -> None:
        self._step = step
        self._open = True

    def append(
        self, layer: int, k: AnyArray, v: AnyArray, rotated: bool = False, check: bool = False
    ) -> EncodeCounts:
        """Stores keys and values of one layer and seals the tiles that this step seals. Once per layer.

        Args:
            layer: The layer.
            k: Keys after RoPE, [sum(counts), kv_heads, head_dim] in the type of the pool, any strides of the first two
                dimensions; the rows of each sequence in batch order.
            v: Values, of the same shape and type.
            rotated: The input is in the rotated (Hadamard) frame already.
            check: Refuse NaN and infinities. Otherwise they are stored as 0 and counted.

        Returns:
            How many elements were not finite, and how many values saturated.

        Raises:
            ShapeError: A shape or stride does not fit, or no such layer.
            DTypeError: A type other than the pool's.
            NonFiniteError: With `check`, names tensor, layer, token and head.
            StateError: The step is finished or abandoned, or the layer was appended to.
        """
        return EncodeCounts(*self._step.append(layer, k, v, rotated, check))

    @overload
    def attend(
        self,
        layer: int,
        q: Array,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: AnyArray | None = None,
        return_lse: Literal[False] = False,
        rotated: bool = False,
    ) -> Array: ...

    @overload
    def attend(
        self,
        layer: int,
        q: Array,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: AnyArray | None = None,
        *,
        return_lse: Literal[True],
        rotated: bool = False,
    ) -> tuple[Array, Array]: ...

    def attend(
        self,
        layer: int,
        q: Array,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: AnyArray | None = None,
        return_lse: bool = False,
        rotated: bool = False,
    ) -> Array | tuple[Array, Array]:
        """Attention of the step's queries over what is stored, causal by position.

        Args:
            layer: The layer.
            q: Queries after RoPE, [sum(counts), heads, head_dim], heads a multiple of the layer's KV heads: float16,
                bfloat16 or float32.
            scale: Factor of the logits. None: 1/sqrt(head_dim).
            window: The query at position i sees key j if i - j < window, sinks too. None: all.
            softcap: Logits become softcap·tanh(logit/softcap). None: they do not.
            sink_logits: float32 [heads]: one logit per query head that takes part in the softmax without a value.
            return_lse: Return ``(out, lse)``.
            rotated: `q` is in the rotated (Hadamard) frame, and the output stays so.

        Returns:
            The output, of the shape and type of `q`; with `return_lse` also the natural logarithm of each softmax
            denominator, sink logits included, float32 [sum(counts), heads]. A query that sees no key gets zeros.

        Raises:
            ShapeError: A shape or a number does not fit, or no such layer.
            DTypeError: A type is not supported.
            StateError: The step is finished or abandoned.
        """
        out = empty_like(q)
        lse = empty(tuple(q.shape)[:2], q, float32=True) if return_lse else None
        self._step.attend(layer, q, out, lse, scale, window, softcap, sink_logits, rotated)
        return out if lse is None else (out, lse)

    def finish(self) -> None:
        """Makes the step the state of its sequences: lengths move, slots of sealed tiles are given back.

        Raises:
            StateError: A layer was not appended to (the step stays open); or it was finished or abandoned before.
        """
        self._step.finish()
        self._open = False

    def abandon(self) -> None:
        """Takes the step back: the pool is as it was. Does nothing to a step that is finished or abandoned."""
        self._step.abandon()
        self._open = False

    @property
    def tokens(self) -> int:
        """New tokens of all sequences: rows of k, v and q."""
        return self._step.tokens

    @property
    def first_rows(self) -> Memory:
        """First row of each sequence, then `tokens`: int32 [sequences + 1], read-only."""
        return self._step.first_rows

    @property
    def block_table(self) -> Memory:
        """Page of each tile after append, -1 where there is none: int32 [sequences, tiles], read-only."""
        return self._step.block_table

    @property
    def slot_table(self) -> Memory:
        """Slot of each tile after append, -1 where there is none: int32 [sequences, tiles], read-only."""
        return self._step.slot_table

    @property
    def lengths(self) -> Memory:
        """Tokens of each sequence after the step: int32 [sequences], read-only."""
        return self._step.lengths

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._open:
            return
        try:
            if kind is None:
                self.finish()
        finally:
            self.abandon()


def _slot_dtype(dtype: object) -> Literal["float16", "float32"]:
    name = dtype.__name__ if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
    if name in ("float16", "bfloat16"):
        return "float16"
    if name == "float32":
        return "float32"
    raise DTypeError(f"dtype {name}: expected float16, bfloat16 or float32; choose the type of k and v")


def _layer_shapes(
    layers: int | Iterable[tuple[int, int]], kv_heads: int | None, cfg: Config
) -> list[tuple[int, int]]:
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
