"""A step: one forward pass of a batch over every layer of a pool."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from kvarn import _kvarn
from kvarn._arrays import Array, empty, empty_like
from kvarn._device import current_stream, default_like, refuse_non_finite
from kvarn._kvarn import Memory
from kvarn.codec import EncodeCounts
from kvarn.errors import DeviceError, ShapeError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    AnyArray = NDArray[Any] | torch.Tensor

__all__ = ["Step"]

# Query columns of a sequence (new tokens times query heads per KV head) up to which the fused kernel attends.
# It reads what is stored once for 16 columns; for more it is cheaper to expand it once:
# tests/gpu/check_long.py times both. With a window or a softcap the dense way is slower for long, and only
# saves the room of the fused kernel's partial results.
_FUSED_COLUMNS = 2048
_FUSED_COLUMNS_WITH_OPTIONS = 16384


class Step:
    """One forward pass of a batch, made by `Pool.step`.

    In each layer: `append`, and `attend` before it (what was stored before the step) or after it (all). Then
    `finish`. As a context manager it finishes when the block ends, and is abandoned if the block raises.
    A step that is dropped unfinished is abandoned: the pool is as it was.
    """

    __slots__ = ("__weakref__", "_counts", "_cuda", "_dtype", "_handle", "_layers", "_open", "_step")

    def __init__(
        self,
        step: _kvarn.Step | _kvarn.CudaStep,
        counts: tuple[int, ...],
        layers: tuple[tuple[int, int], ...],
        dtype: str,
        cuda: int | None = None,
    ) -> None:
        self._step = step
        self._counts = counts
        self._cuda = cuda
        self._layers = layers
        self._dtype = dtype
        self._open = True
        self._handle: torch.Tensor | None = None

    def append(
        self, layer: int, k: AnyArray, v: AnyArray, rotated: bool = False, check: bool = False
    ) -> EncodeCounts | None:
        """Stores keys and values of one layer and seals the tiles that this step seals. Once per layer.

        Args:
            layer: The layer.
            k: Keys after RoPE, [sum(counts), kv_heads, head_dim] in the type of the pool, any strides of the
                first two dimensions; the rows of each sequence in batch order.
            v: Values, of the same shape and type.
            rotated: The input is in the rotated (Hadamard) frame already.
            check: Refuse NaN and infinities. Otherwise they are stored as 0 and counted.

        Returns:
            How many elements were not finite, and how many values saturated. None on CUDA, where nobody waits
            for the count: `Pool.stats` has the totals.

        Raises:
            ShapeError: A shape or stride does not fit, or no such layer.
            DTypeError: A type other than the pool's.
            NonFiniteError: With `check`, names tensor, layer, token and head.
            StateError: The step is finished or abandoned, or the layer was appended to.
        """
        if isinstance(self._step, _kvarn.Step):
            return EncodeCounts(*self._step.append(layer, k, v, rotated, check))
        if check:
            refuse_non_finite("k", layer, k)
            refuse_non_finite("v", layer, v)
        self._step.append(layer, k, v, rotated)
        return None

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
        out: Array | None = None,
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
        out: Array | None = None,
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
        out: Array | None = None,
    ) -> Array | tuple[Array, Array]:
        """Attention of the step's queries over what is stored, causal by position.

        On CUDA, sequences with many new tokens are attended by expanding what is stored, a part at a time,
        and dense attention in 16 bit, which cannot be captured in a graph. What can: `Pool.static_arrays`.

        Args:
            layer: The layer.
            q: Queries after RoPE, [sum(counts), heads, head_dim], heads a multiple of the layer's KV heads:
                float16, bfloat16 or float32.
            scale: Factor of the logits. None: 1/sqrt(head_dim).
            window: The query at position i sees key j if i - j < window, sinks too. None: all.
            softcap: Logits become softcap·tanh(logit/softcap). None: they do not.
            sink_logits: float32 [heads]: a logit per query head, part of the softmax, without a value.
            return_lse: Return ``(out, lse)``.
            rotated: `q` is in the rotated (Hadamard) frame, and the output stays so.
            out: Where the output goes: contiguous, of the shape and type of `q`, in memory of its own. None:
                to a new array.

        Returns:
            The output, of the shape and type of `q`; with `return_lse` also the natural logarithm of each
            softmax denominator, sink logits included, float32 [sum(counts), heads]. A query that sees no key
            gets zeros.

        Raises:
            ShapeError: A shape or a number does not fit, or no such layer.
            DTypeError: A type is not supported.
            TensorError: `out` shares memory with `q`, or cannot be written to.
            StateError: The step is finished or abandoned.
            CudaError: A capture without static arrays, or of a long chunk; CUDA failed.
        """
        if out is None:
            out = empty_like("q", q)
        lse = empty(tuple(q.shape[:2]), "q", q, float32=True) if return_lse else None
        options = scale, window, softcap, sink_logits, rotated
        if isinstance(self._step, _kvarn.Step):
            self._step.attend(layer, q, out, lse, *options)
        else:
            most_columns = (
                _FUSED_COLUMNS if window is None and softcap is None else _FUSED_COLUMNS_WITH_OPTIONS
            )
            if self._step.attend(layer, q, out, lse, *options, most_columns):
                self._attend_densely(self._step, layer, q, out, lse, *options, most_columns)
        return out if lse is None else (out, lse)

    def _attend_densely(
        self,
        step: _kvarn.CudaStep,
        layer: int,
        q: Any,
        out: Any,
        lse: Any,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sink_logits: Any,
        rotated: bool,
        most_columns: int,
    ) -> None:
        """Attends for the sequences that the fused kernel left out; the arguments are checked."""
        # torch is there: the queries are torch tensors.
        import torch

        from kvarn import _dense

        kv_heads, head_dim = self._layers[layer]
        scoring = _dense.Scoring(head_dim**-0.5 if scale is None else scale, window, softcap)
        k = v = torch.empty(0)
        lengths, row = np.from_dlpack(step.lengths), 0
        for index, count in enumerate(self._counts):
            rows = slice(row, row + count)
            row += count
            if count * (q.shape[1] // kv_heads) <= most_columns:
                continue
            stored = step.stored(layer, index)
            if len(k) < min(stored, _dense.BLOCK):
                shape = min(stored, _dense.BLOCK), kv_heads, head_dim
                k, v = (torch.empty(shape, dtype=torch.float16, device=q.device) for _ in range(2))

            def expand(first: int, count: int, index: int = index, k: Any = k, v: Any = v) -> tuple[Any, Any]:
                step.expand(layer, index, k[:count], v[:count], first, rotated)
                return k[:count], v[:count]

            _dense.attend(
                q[rows],
                int(lengths[index]) - count,
                stored,
                expand,
                scoring,
                sink_logits,
                out[rows],
                None if lse is None else lse[rows],
            )

    @overload
    def expand(
        self,
        layer: int,
        index: int,
        rotated: bool = False,
        *,
        like: Array,
        first: int = 0,
        count: int | None = None,
    ) -> tuple[Array, Array]: ...

    @overload
    def expand(
        self,
        layer: int,
        index: int,
        rotated: bool = False,
        *,
        like: None = None,
        first: int = 0,
        count: int | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...

    def expand(
        self,
        layer: int,
        index: int,
        rotated: bool = False,
        *,
        like: Any = None,
        first: int = 0,
        count: int | None = None,
    ) -> tuple[Any, Any]:
        """Decodes what `attend` sees of one sequence: with the step's tokens once they are appended.

        Args:
            layer: The layer.
            index: Place of the sequence in the batch.
            rotated: Leave the result in the rotated (Hadamard) frame.
            like: An array whose kind and type the result takes. None: as in `Pool.expand`.
            first: Position of the first token to decode.
            count: Tokens to decode. None: all from `first` on.

        Returns:
            K and V, [count, kv_heads, head_dim].

        Raises:
            ShapeError: No such layer, sequence or tokens.
            StateError: The step is finished or abandoned.
        """
        count = tokens_to_expand(self._step.stored(layer, index), first, count)
        if like is None:
            like = default_like(self._dtype, self._cuda)
        k, v = (empty((count, *self._layers[layer]), "like", like) for _ in range(2))
        self._step.expand(layer, index, k, v, first, rotated)
        return k, v

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Runs a CUDA graph that was captured with a step of the same static arrays, as this step.

        The graph appends to every layer. It runs on torch's current stream, behind the sending of this
        step's arrays; its inputs are the caller's to fill in before, on the same stream.

        Args:
            graph: The graph; whatever has a method ``replay()``, which may run several graphs.

        Raises:
            StateError: The step has no static arrays, or nothing was captured with them; a layer was
                appended to; the step is closed.
            CapacityError: The step does not fit into the static arrays.
            DeviceError: A CPU pool, which has no graphs.
            CudaError: CUDA failed.
        """
        if isinstance(self._step, _kvarn.Step):
            raise DeviceError("replay on the CPU: expected a step of a CUDA pool; call append and attend")
        self._step.send(current_stream(self._cuda or 0))
        graph.replay()
        self._step.replayed()

    @property
    def handle(self) -> torch.Tensor:
        """What names the step to the operators of `kvarn.torch_ops`: int64 [1] on the CPU."""
        if self._handle is None:
            from kvarn import torch_ops

            self._handle = torch_ops.handle_of(self)
        return self._handle

    def finish(self) -> None:
        """Makes the step the state of its sequences: lengths move, slots of sealed tiles are given back.

        Raises:
            StateError: A layer was not appended to (the step stays open), or the step is closed already.
        """
        self._step.finish()
        self._open = False

    def abandon(self) -> None:
        """Takes the step back: the pool is as it was. Does nothing to a closed step."""
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


def tokens_to_expand(stored: int, first: int, count: int | None) -> int:
    """`count`, or how many of `stored` tokens there are from `first` on.

    Raises:
        ShapeError: `first` or `count` is out of range.
    """
    if not 0 <= first <= stored:
        raise ShapeError(f"first {first}: expected 0 to {stored}, the tokens stored; pass one of these")
    if count is None:
        return stored - first
    if not 0 <= count <= stored - first:
        raise ShapeError(
            f"count {count}: expected 0 to {stored - first}, the tokens stored from {first} on; pass fewer"
        )
    return count
