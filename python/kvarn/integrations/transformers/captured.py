"""Decoding with a CUDA graph: one step of a whole model, captured once and replayed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvarn import (
    CapacityError,
    CudaError,
    CudaUnavailableError,
    DeviceError,
    DTypeError,
    Pool,
    ShapeError,
    StateError,
    StaticArrays,
)
from kvarn.integrations.transformers.errors import UnsupportedError
from kvarn.integrations.transformers.forward import ForwardPass
from kvarn.integrations.transformers.rows import Rows
from kvarn.integrations.transformers.static_cache import KVarNStaticCache


class CapturedDecoder:
    """Decodes one token a row at a time, each step by one launch of a CUDA graph.

    The host then plans a step, once for all layers, and runs no Python of the model. The first call runs
    the model eagerly if the cache holds back more than one token of a row, as it does behind a prompt; the
    next one captures, which runs the model twice; later ones replay. A graph serves rows of any lengths up to
    `max_tokens`. After `KVarNStaticCache.reset`, or with another number of rows, the next call captures anew.
    Between calls the cache can be used in any other way::

        model.set_attn_implementation("kvarn")
        cache = KVarNStaticCache(model.config, "kvarn_k4v2_g128", max_tokens=4096)
        logits = model(prompt, attention_mask=mask, past_key_values=cache).logits
        decoder = CapturedDecoder(model, cache)
        while True:
            logits = decoder(logits[:, -1:].argmax(-1))

    The attention has the bits of an eager step. There is no mask: what rows store is seen, and they store no
    padding. If a call raises, the rows are as they were before it.

    Args:
        model: a causal language model of transformers on a CUDA device, with ``"kvarn"`` attention, or such a
            model compiled by ``torch.compile`` (without CUDA graphs of its own).
        cache: its cache, which holds at least a token.
        max_tokens: most tokens of a row, for which the graph's launches have room; None: those of the cache.

    Raises:
        CudaUnavailableError: torch has no CUDA device.
        DeviceError: the model is elsewhere.
        UnsupportedError: the model's attention is not ``"kvarn"``, or a layer is not a full-attention layer.
        CapacityError: max_tokens is more than the cache takes.
    """

    def __init__(self, model: Any, cache: KVarNStaticCache, *, max_tokens: int | None = None) -> None:
        self.device = _cuda_device(model)
        attention = model.config.get_text_config(decoder=True)._attn_implementation
        if attention != "kvarn":
            raise UnsupportedError(
                f"attention implementation {attention!r} with a CapturedDecoder: expected 'kvarn'; call "
                "model.set_attn_implementation('kvarn')"
            )
        for number, layer in enumerate(cache.layers):
            if layer not in cache.kvarn_layers:
                raise UnsupportedError(
                    f"layer {number} ({type(layer).__name__}) of the cache with a CapturedDecoder: expected "
                    "full attention in every layer, as a capture runs the model twice and takes back only "
                    "what rows store; decode with a compiled model"
                )
        most = cache.rows.settings.max_tokens
        if max_tokens is not None and not 1 <= max_tokens <= most:
            raise CapacityError(
                f"max_tokens {max_tokens} of a CapturedDecoder: expected 1 to {most}, what its cache takes; "
                "make the KVarNStaticCache with a larger max_tokens"
            )
        self.model = model
        self.cache = cache
        self.max_tokens = most if max_tokens is None else max_tokens
        self._graph: Any = None
        # What the graph was captured for: it reads the pool's memory, and arrays of one number of rows.
        self._pool: Pool | None = None
        self._batch = 0

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Decode one token of every row.

        Args:
            input_ids: integers [batch, 1], on any device.
            position_ids: integers [batch, 1]; None: how many tokens each row has, padding not counted.

        Returns:
            Logits [batch, 1, vocabulary], a tensor of its own.

        Raises:
            StateError: the cache holds nothing yet.
            ShapeError: another shape.
            DTypeError: not integers.
            CapacityError: a row would have more than max_tokens, or the pool is too small.
            CudaError: the model cannot be captured, because it waits for the device, or CUDA failed.
        """
        rows = self.cache.rows
        rows.abandon()
        batch = len(rows.sequences)
        self._check(rows, input_ids, position_ids)
        lengths = [sequence.length for sequence in rows.sequences]
        if position_ids is None:
            position_ids = torch.tensor(lengths)[:, None]
        with torch.no_grad():
            if rows.pool is not self._pool or batch != self._batch:
                self._graph = None
                self._pool, self._batch = rows.pool, batch
                self._inputs = [
                    torch.zeros(batch, 1, dtype=torch.int64, device=self.device) for _ in range(2)
                ]
            for held, given in zip(self._inputs, (input_ids, position_ids), strict=True):
                _send(held, given)
            # A graph has room for what a step of one token seals, not for all that a prompt left uncommitted.
            if any(sequence.length > sequence.committed + 1 for sequence in rows.sequences):
                with decoding(rows, None):
                    return self._forward()
            if self._graph is None:
                self._capture(rows)
            with decoding(rows, self._arrays) as forward:
                assert forward.step is not None
                forward.step.replay(self._graph)
            return self._logits.clone()

    def _check(self, rows: Rows, input_ids: Tensor, position_ids: Tensor | None) -> None:
        """Raise if the next step cannot be made; nothing is changed."""
        if not any(sequence.length for sequence in rows.sequences):
            raise StateError(
                "a CapturedDecoder over an empty cache: expected a prompt; run the model on it with this "
                "cache first"
            )
        shape = len(rows.sequences), 1
        for name, given in (("input_ids", input_ids), ("position_ids", position_ids)):
            if given is not None and given.shape != shape:
                raise ShapeError(
                    f"{name} {list(given.shape)}: expected {list(shape)}, one token for each row of the cache"
                )
            if given is not None and (given.is_floating_point() or given.dtype == torch.bool):
                raise DTypeError(f"{name} of {given.dtype}: expected integers, as torch.int64")
        if rows.columns >= rows.settings.max_tokens:
            raise CapacityError(
                f"{rows.columns + 1} tokens: expected at most max_tokens={rows.settings.max_tokens}; make "
                "the KVarNStaticCache with a larger max_tokens"
            )
        longest = max(sequence.length for sequence in rows.sequences)
        if longest >= self.max_tokens:
            raise CapacityError(
                f"{longest + 1} tokens of a row: expected at most {self.max_tokens}, the max_tokens of this "
                "CapturedDecoder; make one with more for the same cache"
            )

    def _capture(self, rows: Rows) -> None:
        """Record the model's step; the rows stay as they are."""
        assert rows.pool is not None
        self._arrays = rows.pool.static_arrays([1] * self._batch, tokens=self.max_tokens)
        # Everything that the step allocates for good is allocated by a run before the capture.
        with decoding(rows, self._arrays, keep=False):
            self._forward()
        graph = torch.cuda.CUDAGraph()
        with decoding(rows, self._arrays, keep=False):
            try:
                with recording(graph, self.device):
                    self._logits = self._forward()
            except (RuntimeError, CudaError) as error:
                raise CudaError(
                    "the model cannot be captured into a CUDA graph: expected a forward pass that neither "
                    "waits for the device nor allocates outside of torch; decode with a compiled model: "
                    f"{error}"
                ) from error
        self._graph = graph

    def _forward(self) -> Tensor:
        ids, positions = self._inputs
        logits: Tensor = self.model(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).logits
        return logits


class DecodingPass(ForwardPass):
    """A forward pass of one token for every row, planned before the model runs.

    Args:
        rows: the rows of the cache.
        arrays: what a captured graph reads; None for an eager pass.
    """

    def __init__(self, rows: Rows, arrays: StaticArrays | None) -> None:
        super().__init__(rows, 1)
        batch = len(rows.sequences)
        assert rows.pool is not None
        self.counts = [1] * batch
        self._index = None
        self._live = list(range(batch))
        self.step = rows.pool.step(rows.sequences, self.counts, hold=min(1, rows.hold), arrays=arrays)
        self.planned = True

    @property
    def complete(self) -> bool:
        """Never: `decoding` finishes the pass, as layers of a captured one run later."""
        return False

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """Return None: new columns are tokens, and rows store no others."""
        return None


@contextmanager
def decoding(rows: Rows, arrays: StaticArrays | None, *, keep: bool = True) -> Iterator[DecodingPass]:
    """Open a pass for what runs in the block; then finish it.

    Args:
        rows: the rows of the cache, without an open pass.
        arrays: what a captured graph reads; None for an eager pass.
        keep: whether the pass counts; otherwise, or if the block raises, the rows are as they were.
    """
    rows.forward = forward = DecodingPass(rows, arrays)
    try:
        yield forward
        if keep:
            forward.finish()
    finally:
        if rows.forward is not None:
            rows.abandon()


@contextmanager
def recording(graph: Any, device: torch.device) -> Iterator[None]:
    """Record the work of the block into a graph; whatever happens, the current stream is the same after."""
    current = torch.cuda.current_stream(device)
    own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    # torch leaves the graph's stream current if a capture fails.
    with torch.cuda.stream(current), torch.cuda.graph(graph, stream=own):
        yield


def _cuda_device(model: Any) -> torch.device:
    device: torch.device = model.device
    if device.type == "cuda":
        return device
    if not torch.cuda.is_available():
        raise CudaUnavailableError(
            "CapturedDecoder: torch finds no CUDA device, and CPUs have no graphs; compile the model for a "
            "KVarNStaticCache instead"
        )
    raise DeviceError(
        f"CapturedDecoder with a model on {device}: expected a CUDA device; move it with model.to('cuda')"
    )


def _send(held: Tensor, given: Tensor) -> None:
    """Copy to the device without waiting for it."""
    if given.device.type == "cpu" and held.device.type == "cuda":
        # Pinned memory is kept by torch until the copy is done.
        given = given.pin_memory()
    held.copy_(given, non_blocking=True)
