"""The cache memory of one model: a pool of pages and slots, its sequences, and the steps that extend them.

A **page** holds the records of one sealed tile of all KV heads, a **slot** the 16-bit K and V of one tile
that is a sink or not sealed yet; one page id and one slot id serve all layers. A **step** is one forward pass
of a batch.

Everywhere NumPy arrays or torch tensors come in, on the pool's device, and the same kind goes out. Calls may
come from several threads; arrays, and views of a pool's memory, must not be written by another thread
meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, overload

from kvarn import _kvarn
from kvarn._arrays import Array, empty
from kvarn._device import cuda_index, current_stream, default_like
from kvarn._kvarn import Config, Memory, Sequence, StaticArrays, Stats
from kvarn._layers import LayerShape, layer_shapes, slot_dtype
from kvarn._saved import load, offload, restore, save
from kvarn.errors import DeviceError, DTypeError
from kvarn.step import Step, tokens_to_expand

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["LayerShape", "Pool", "Sequence", "StaticArrays", "Stats", "Step"]


class Pool:
    """Pages and slots for all layers of one model, and the sequences that use them.

    Memory is reserved at once and taken as it is used, so a pool may be made larger than what is used.

    Attributes:
        cfg: The configuration.
        layers: A LayerShape for each layer.
        dtype: Element type of the slots: "float16" or "float32".
        device: "cpu" or "cuda:N".
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
        memory: tuple[torch.Tensor, torch.Tensor] | None = None,
        check: bool = False,
    ) -> None:
        """Reserves the memory.

        Args:
            cfg: Bit widths, tile length, encoder, sinks, recent window; the head dim if `layers` is a number.
            layers: Number of layers; or a LayerShape for each, where layers differ.
            kv_heads: KV heads of each layer, if `layers` is a number.
            pages: Sealed tiles that fit, over all sequences.
            slots: 16-bit tiles that fit. A sequence needs up to
                (sink_tokens > 0) + 2·ceil((recent_tokens + group + hold - 1) / group), hold being the most
                tokens that its steps hold back.
            dtype: Type of k, v: "float16", "bfloat16" (slots are then float16) or "float32"; torch's and
                NumPy's types are known too.
            device: "cpu", "cuda" or "cuda:N". On CUDA everything comes and goes as torch tensors of that
                device, work goes to torch's current stream, and slots are float16.
            memory: On CUDA, ``(pages, slots)`` to be used instead of memory of the pool's own: contiguous
                tensors of the device, uint8 and float16, at multiples of 128 bytes. Their sizes are those of
                all layers, one behind the other: pages · kv_heads · record_bytes of a layer's
                ``cfg.replace(head_dim=…)``, and slots · kv_heads · 2 · group · head_dim elements. The slots
                are zeroed. The pool keeps the tensors; they are written to by nobody else.
            check: For debugging, on CUDA: before every launch check that the numbers in the step's arrays
                lie in range, and that the arrays on the device are as they were sent. Every launch then
                waits for its stream.

        Raises:
            ShapeError: A number is out of range, or `kv_heads` does not go with `layers`.
            ConfigError: A head dim is not supported.
            DTypeError: An unknown type.
            DeviceError: Another device; `memory` or `check` with the CPU.
            CapacityError: The system has not as much address space.
            CudaUnavailableError: CUDA cannot be used here; the text says what is missing.
        """
        self._cuda = cuda_index(device)
        self.device = "cpu" if self._cuda is None else f"cuda:{self._cuda}"
        self.cfg = cfg
        self.dtype = slot_dtype(dtype)
        shapes = layer_shapes(layers, kv_heads, cfg)
        float32 = self.dtype == "float32"
        self._pool: _kvarn.Pool | _kvarn.CudaPool
        if self._cuda is None:
            for name, given in (("memory", memory is not None), ("check", check)):
                if given:
                    raise DeviceError(f"{name} with device 'cpu': expected none; it is for CUDA pools")
            self._pool = _kvarn.Pool(cfg, shapes, pages, slots, float32)
        else:
            if memory is not None:
                _check_pair(memory)
            self._pool = _kvarn.CudaPool(cfg, shapes, pages, slots, float32, self._cuda, memory, check)
        self.layers = tuple(LayerShape(*shape) for shape in self._pool.layers)

    def create(self, prefix: Iterable[bytes] = ()) -> Sequence:
        """A new sequence: empty, or starting with tiles that others published.

        It starts with the tiles that are published under the first of `prefix`, as many as there are in a
        row, in the same pages and sink slot, and holds them from this moment on: nothing is copied, no page
        is taken. Its ``length``, a multiple of the group, says how many tokens it has; run the model on the
        others. They are all committed, and read as records also within the recent window.

        A model gives logits for tokens that it runs on, so leave out a tile that ends with the prompt::

            sequence = pool.create(prefix=kvarn.prefix_keys(prompt[:-1], cfg.group))
            rest = prompt[sequence.length :]

        Args:
            prefix: A key of 16 bytes for each tile of the prompt, as `kvarn.prefix_keys` makes them.

        Raises:
            ShapeError: A key has not 16 bytes.
            DTypeError: A key is not bytes.
        """
        return self._pool.create(list(prefix))

    def publish(self, sequence: Sequence, keys: Iterable[bytes]) -> int:
        """Offers the first tiles of a sequence to later ones that begin with the same tokens.

        Only tiles that never change are shared: sealed ones, and the sink slot of tile 0. They stay when the
        sequence is freed, until a step needs their pages or slots; then those go first that were not used for
        longest, the later tiles of a sequence before the earlier ones, without which they could not be found.
        A use is a publication, a sequence that starts with the tile, and the end of one that has it. What a
        step has thus displaced stays gone if the step is abandoned.

        A tile is found behind the tiles that it was published behind, and in this pool only. Under a key that
        has a page already, that page stays, and later tiles are found behind it; `sequence` keeps its own
        (``stats().prefix_duplicates`` counts such tiles). Publishing again, as a sequence grows, adds what is
        new.

        Args:
            sequence: The sequence, outside open steps.
            keys: A key of 16 bytes for each of its first tiles, at most ``sequence.sealed``. It stands for
                the tokens of the tile and all before them, the model, and whatever else K and V depend on:
                see `kvarn.prefix_keys`.

        Returns:
            How many tiles were not published before.

        Raises:
            ShapeError: More keys than sealed tiles, a key twice, or not of 16 bytes.
            DTypeError: A key is not bytes.
            StateError: A tile is published under another key; or as in `free`.
        """
        return self._pool.publish(sequence, list(keys))

    def match_prefix(self, keys: Iterable[bytes]) -> int:
        """How many tiles ``create(prefix=keys)`` would start with now.

        For schedulers: nothing is held, and it is no use. Another thread may displace or add tiles before the
        sequence is created, whose ``length`` is what counts.

        Raises:
            ShapeError, DTypeError: As in `create`.
        """
        return self._pool.match_prefix(list(keys))

    def unpublish(self) -> None:
        """Publishes no tile any more, as after a change of weights. Sequences keep what they hold."""
        self._pool.unpublish()

    @property
    def fingerprint(self) -> bytes:
        """What the bytes of the pool's tiles depend on besides tokens and model, in 16 bytes.

        A digest of format version, `cfg` (but for its head dim), `dtype` and `layers`. The pool adds it to
        every key; add it to keys that leave the pool, so that they match under the same configuration only.
        """
        return self._pool.fingerprint

    def fork(self, sequence: Sequence) -> Sequence:
        """A new sequence that holds what `sequence` holds, held tokens included. Nothing is copied.

        Both use the same pages and slots from now on. A step that appends to a sequence whose last tile is
        not full, and shared, takes one slot more, for a copy of it.

        Raises:
            StateError: As in `free`.
        """
        return self._pool.fork(sequence)

    def reorder(self, sequences: Iterable[Sequence], order: Iterable[int]) -> None:
        """Makes each ``sequences[i]`` hold what ``sequences[order[i]]`` held: the rows of a beam search.

        An index may come several times; what none of the sequences holds any more is given back. The handles
        stay the same.

        Args:
            sequences: Different sequences of this pool.
            order: As many indices into them.

        Raises:
            ShapeError: Another number of indices, an index out of range, or a sequence twice.
            StateError: As in `free`; nothing is changed then.
        """
        self._pool.reorder(list(sequences), [int(index) for index in order])

    def free(self, sequence: Sequence) -> None:
        """Forgets a sequence and gives back its pages and slots.

        Raises:
            StateError: It was freed before, is in an open step, or belongs to another pool.
        """
        self._pool.free(sequence)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Keeps the first `length` tokens. Those that were held and are kept are committed by the next step.

        A cut between two tiles, or into one that is still in a slot, is exact. So is one into the first tile
        where there are sinks: its slot has all of it. Any other lies in a sealed tile: what is kept of it is
        decoded into a free slot, rounded to `dtype`, and goes on from there; when the tile is full it is
        sealed again. Such tiles are counted in ``stats().unsealed``. Forks keep what they have.

        On CUDA the decoding goes to torch's current stream, which must not be captured into a graph.

        Args:
            sequence: The sequence.
            length: Tokens to keep, 0 to its length.

        Raises:
            CapacityError: The cut lies in a sealed tile and no slot is free; nothing is changed then.
            ShapeError: `length` is negative, or beyond the sequence.
            StateError: As in `free`.
            CudaError: CUDA failed, or the stream is being captured; nothing is changed then.
        """
        if isinstance(self._pool, _kvarn.Pool):
            self._pool.truncate(sequence, length)
        else:
            self._pool.truncate(sequence, length, current_stream(self._cuda or 0))

    def save(self, sequence: Sequence, file: str | os.PathLike[str] | BinaryIO) -> None:
        """Saves a sequence: its records, its slots and its lengths, with checksums; layout: docs/format.md.

        The bytes are the same on every device, wherever the sequence lies in the pool. Nothing is changed:
        held tokens are saved, and stay, uncommitted. An offloaded sequence is saved from where it is; of any
        other, host memory holds a copy, as large as the file, until it is written. On CUDA the copy comes
        after the work of torch's current stream, and is waited for. Other threads may use the pool meanwhile;
        a step of this sequence then takes one slot more, if its last one is not full.

        Args:
            sequence: The sequence.
            file: A path, where the file appears whole or not at all; or a binary file object, such as
                ``io.BytesIO()``.

        Raises:
            StateError: As in `free`.
            CapacityError: The system has not as much memory as the sequence takes.
            DTypeError: `file` is neither.
            OSError: The file cannot be written.
        """
        save(self._pool, self._cuda, sequence, file)

    def load(self, file: str | os.PathLike[str] | BinaryIO) -> Sequence:
        """A new sequence from what `save` wrote, of any pool with the same layers, configuration and type.

        Every byte is checked first. On CUDA the copy goes to torch's current stream: work on other streams
        must be ordered behind it, by events.

        Args:
            file: A path; or a binary file object, which is read to its end.

        Raises:
            FormatError: The file is truncated, corrupted, of another version, or of a pool made otherwise
                (the text has both values); nothing is changed.
            CapacityError: Too few free pages or slots; nothing is changed.
            DTypeError: `file` is neither.
            OSError: The file cannot be read.
        """
        return load(self._pool, self._cuda, file)

    def offload(self, sequence: Sequence) -> None:
        """Moves a sequence to host memory and gives back its pages and slots; `restore` brings it back.

        Of what forks share only this sequence's part is given back. Until it is restored, the sequence can be
        saved and freed, and has lengths; nothing else. On CUDA torch's current stream copies, to pinned
        memory, and the host does not wait. Pages and slots count as used until they are copied (`stats` waits
        for that); a step that needs them waits. The next image of about the same size uses the same memory.

        Raises:
            StateError: It is offloaded already; or as in `free`.
            CapacityError: The system has not as much memory.
            CudaError: torch's current stream is being captured.
        """
        offload(self._pool, self._cuda, sequence)

    def restore(self, sequence: Sequence) -> None:
        """Brings an offloaded sequence back, bit by bit as it was.

        On CUDA torch's current stream copies: work on other streams must be ordered behind it, by events.

        Raises:
            CapacityError: Too few free pages or slots; nothing is changed.
            StateError: It is not offloaded, was freed, or belongs to another pool.
            CudaError: torch's current stream is being captured.
        """
        restore(self._pool, self._cuda, sequence)

    def static_arrays(self, counts: Iterable[int], tokens: int) -> StaticArrays:
        """Device arrays at addresses that stay, so that a captured CUDA graph serves many steps.

        Run a step with them once, so that everything is allocated; capture a step with them, inside
        ``torch.cuda.graph``; then `Step.replay` runs the graph for the captured step and every later one::

            arrays = pool.static_arrays([1] * len(sequences), tokens=4096)
            with pool.step(sequences, [1] * len(sequences), arrays=arrays) as step:
                forward(step)
            graph = torch.cuda.CUDAGraph()
            with pool.step(sequences, [1] * len(sequences), arrays=arrays) as step:
                with torch.cuda.graph(graph):
                    forward(step)
                step.replay(graph)
            with pool.step(sequences, [1] * len(sequences), arrays=arrays) as step:
                step.replay(graph)

        The results have the same bits as without a graph. One step at a time uses the arrays, which must
        outlive the graphs.

        Args:
            counts: New tokens of each sequence in every step: launches must be of one size.
            tokens: Length of the longest sequence, the step's tokens included, that they have room for.

        Raises:
            DeviceError: A CPU pool, which has no graphs.
            ShapeError: No new tokens, or `tokens` below a count.
        """
        if isinstance(self._pool, _kvarn.Pool):
            raise DeviceError("static arrays on the CPU: expected a CUDA pool; leave them out")
        return self._pool.static_arrays(list(counts), tokens)

    def step(
        self,
        sequences: Iterable[Sequence],
        counts: Iterable[int],
        hold: int | Iterable[int] = 0,
        *,
        arrays: StaticArrays | None = None,
    ) -> Step:
        """Plans one forward pass and reserves the pages and slots that it needs: all, or nothing changes.

        Args:
            sequences: The batch, each sequence once.
            counts: New tokens of each. With 0 a step only commits what was held.
            hold: Newest tokens, of those, that stay uncommitted: one number for all, or one each, at most its
                count. What was held before is committed. Only committed tokens are sealed.
            arrays: Of `static_arrays`, for a step that is captured into a CUDA graph or replays one.

        Raises:
            CapacityError: Too few free pages or slots; the text says which sequence lacked what.
            ShapeError: Lists or numbers that do not fit together, or not into `arrays`.
            StateError: A sequence was freed, is in another open step, or belongs to another pool; another
                open step uses `arrays`.
        """
        sequences = list(sequences)
        holds = [hold] * len(sequences) if isinstance(hold, int) else list(hold)
        counts = tuple(counts)
        step: _kvarn.Step | _kvarn.CudaStep
        if isinstance(self._pool, _kvarn.Pool):
            if arrays is not None:
                raise DeviceError("static arrays with a CPU pool: expected None; leave them out")
            step = self._pool.step(sequences, list(counts), holds)
        else:
            step = self._pool.step(sequences, list(counts), holds, arrays)
        return Step(step, counts, self.layers, self.dtype, self._cuda)

    @overload
    def expand(
        self,
        sequence: Sequence,
        layer: int,
        rotated: bool = False,
        *,
        like: Array,
        first: int = 0,
        count: int | None = None,
    ) -> tuple[Array, Array]: ...

    @overload
    def expand(
        self,
        sequence: Sequence,
        layer: int,
        rotated: bool = False,
        *,
        like: None = None,
        first: int = 0,
        count: int | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...

    def expand(
        self,
        sequence: Sequence,
        layer: int,
        rotated: bool = False,
        *,
        like: Any = None,
        first: int = 0,
        count: int | None = None,
    ) -> tuple[Any, Any]:
        """Decodes a sequence in one layer, without the tokens of an open step.

        Args:
            sequence: The sequence.
            layer: The layer.
            rotated: Leave the result in the rotated (Hadamard) frame.
            like: An array whose kind and type the result takes. None: the type of the slots, in NumPy or, on
                CUDA, torch.
            first: Position of the first token to decode.
            count: Tokens to decode. None: all from `first` on.

        Returns:
            K and V, [count, kv_heads, head_dim].

        Raises:
            StateError: The sequence was freed, or belongs to another pool.
            ShapeError: No such layer or tokens.
        """
        if like is None:
            like = default_like(self.dtype, self._cuda)
        count = tokens_to_expand(sequence.length, first, count)
        # A layer that does not exist is refused below, by the call that knows the range.
        shape = self.layers[layer] if 0 <= layer < len(self.layers) else LayerShape(0, 0)
        k, v = (empty((count, *shape), "like", like) for _ in range(2))
        self._pool.expand(sequence, layer, k, v, first, rotated)
        return k, v

    def stats(self) -> Stats:
        """How full the pool is, and what its encoders met."""
        return self._pool.stats()

    @cached_property
    def pages(self) -> tuple[Memory, ...]:
        """The pages of each layer, uint8 [pages, kv_heads, record_bytes].

        Views by ``numpy.from_dlpack`` or ``torch.from_dlpack`` share the memory and keep it alive. Writing
        through them changes what is cached.
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
            f"<kvarn.Pool {self.cfg.name}, {len(self.layers)} layers, {self.dtype}, "
            f"{stats.pages_used} of {stats.pages} pages, {stats.slots_used} of {stats.slots} slots, "
            f"{stats.sequences} sequences>"
        )


def _check_pair(memory: object) -> None:
    if not isinstance(memory, tuple):
        kind = f"type {type(memory).__name__}"
    elif len(memory) != 2:
        kind = f"{len(memory)} parts"
    else:
        return
    raise DTypeError(f"memory of {kind}: expected (pages, slots); pass a tuple of two tensors")
