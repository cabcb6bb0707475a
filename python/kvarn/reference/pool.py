"""A pool of sequences over plain arrays: which token is stored how, and when.

It keeps no pages and no slots, only the values that attention reads: per layer and sequence one float32 array
of K and one of V, in the rotated frame. A token enters it rounded to the slot type; when its tile is sealed,
it is overwritten by what the record decodes to. Everything else (paging, capacity, sharing) is how a real
pool does this in less memory; only the slot of a first tile with some sinks is kept, as a truncation goes on
from it.

Moments. Tile i covers positions [i·G, (i+1)·G) of its sequence. It is sealed by the step after which the
committed length is at least (i+1)·G + R, inside `append`, so that the attention of the same step reads the
record. Positions below S keep their slot values for good: at S = G tile 0 is never sealed, at 0 < S < G it is
encoded whole and read from S on.

A truncation keeps of the tile it cuts what attention reads of it, rounded to the slot type: the tile is no
record any more, and is sealed again when it is full. A first tile with sinks goes on from its slot instead.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field, replace
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from kvarn.reference.attention import attend
from kvarn.reference.codec import SlotType, decode, encode_slots, to_slot
from kvarn.reference.rotation import matrix, rotate
from kvarn.reference.rounding import Counts
from kvarn.reference.settings import Bytes, Float32, Float64, Settings


@dataclass(frozen=True)
class Layer:
    """What one layer stores of one sequence.

    Attributes:
        k: rotated K as attention reads it, float32 [length, kv_heads, D].
        v: V, like k.
        records: record of each sealed tile, uint8 [kv_heads, record_bytes] by tile number.
        sink: slot values of K and V of the whole first tile, once it is a record and 0 < S; else None.
    """

    k: Float32
    v: Float32
    records: dict[int, Bytes] = field(default_factory=dict)
    sink: tuple[Float32, Float32] | None = None


@dataclass(eq=False)
class Sequence:
    """One sequence of a pool.

    Attributes:
        length: tokens stored.
        committed: tokens that are no draft; `length - committed` are held.
        sealed: the tiles that are records.
        layers: what each layer stores.
        live: False once freed.
    """

    length: int
    committed: int
    sealed: range
    layers: list[Layer]
    live: bool = True


class Pool:
    """Sequences of one model.

    Args:
        cfg: the configuration.
        layers: number of layers, all of the same shape.
        kv_heads: KV heads of a layer.
        dtype: slot type, "float16" for fp16 and bf16 models, "float32" for float32 models.

    Attributes:
        counts: non-finite and saturated elements of all finished steps.
        unsealed: tiles of which a truncation kept a part as their record decodes.
    """

    def __init__(self, cfg: Settings, layers: int, kv_heads: int, dtype: SlotType = "float16") -> None:
        self.cfg = cfg
        self.layers = layers
        self.kv_heads = kv_heads
        self.dtype: SlotType = dtype
        self.counts = Counts()
        self.unsealed = 0

    def create(self) -> Sequence:
        """A new, empty sequence."""
        empty = np.zeros((0, self.kv_heads, self.cfg.head_dim), np.float32)
        first = 1 if self.cfg.sink_tokens == self.cfg.group else 0
        return Sequence(0, 0, range(first, first), [Layer(empty, empty) for _ in range(self.layers)])

    def step(self, sequences: Listed[Sequence], counts: Listed[int], hold: int | Listed[int] = 0) -> Step:
        """Begin a forward pass that adds `counts[i]` tokens to `sequences[i]`.

        Args:
            sequences: each at most once.
            counts: new tokens of each sequence; 0 commits what was held.
            hold: how many of the newest tokens stay uncommitted, for all or one each; at most the count. What
                was held before is committed.

        Raises:
            ValueError: counts or holds that do not fit, a freed or repeated sequence.
        """
        holds = [hold] * len(counts) if isinstance(hold, int) else list(hold)
        if not len(sequences) == len(counts) == len(holds):
            raise ValueError(
                f"{len(sequences)} sequences, {len(counts)} counts, {len(holds)} holds: expected one each"
            )
        if len({id(sequence) for sequence in sequences}) < len(sequences):
            raise ValueError("a sequence is listed twice: expected each once; add up its counts")
        for sequence, count, held in zip(sequences, counts, holds, strict=True):
            _check_live(sequence)
            if count < 0 or not 0 <= held <= count:
                raise ValueError(f"count {count}, hold {held}: expected 0 <= hold <= count")
        return Step(self, sequences, counts, holds)

    def truncate(self, sequence: Sequence, n: int) -> None:
        """Keep the first n tokens. Held tokens that stay remain held.

        Raises:
            ValueError: n below 0 or beyond the length.
        """
        _check_live(sequence)
        if not 0 <= n <= sequence.length:
            raise ValueError(f"truncate to {n}: expected 0 to {sequence.length} (length)")
        whole = n // self.cfg.group
        cut = whole in sequence.sealed and n % self.cfg.group > 0
        self.unsealed += cut and (whole > 0 or self.cfg.sink_tokens == 0)
        sequence.layers = [self._truncated(layer, n, cut) for layer in sequence.layers]
        start, stop = sequence.sealed.start, sequence.sealed.stop
        sequence.sealed = range(start, max(start, min(stop, whole)))
        sequence.length = n
        sequence.committed = min(sequence.committed, n)

    def _truncated(self, layer: Layer, n: int, cut: bool) -> Layer:
        """The first n tokens of a layer; `cut`: the last tile kept is a record now, and is kept in part."""
        k, v, first = layer.k[:n], layer.v[:n], n // self.cfg.group * self.cfg.group
        if cut and first == 0 and layer.sink is not None:
            k, v = (values[:n] for values in layer.sink)
        elif cut:
            k, v = (
                np.concatenate((one[:first], to_slot(one[first:], self.dtype, True, Counts())))
                for one in (k, v)
            )
        records = {tile: record for tile, record in layer.records.items() if tile * self.cfg.group < first}
        return Layer(k, v, records, layer.sink if first > 0 else None)

    def free(self, sequence: Sequence) -> None:
        """Give the sequence back; it must not be used again."""
        _check_live(sequence)
        sequence.live = False
        sequence.layers = []

    def expand(self, sequence: Sequence, layer: int, rotated: bool = False) -> tuple[Float32, Float32]:
        """K and V of one layer as attention reads them, float32 [length, kv_heads, D]."""
        _check_live(sequence)
        stored = sequence.layers[layer]
        if rotated:
            return stored.k.copy(), stored.v.copy()
        return rotate(stored.k), rotate(stored.v)


class Step:
    """One forward pass of a batch; made by `Pool.step`. Nothing in the pool changes before `finish`."""

    def __init__(
        self, pool: Pool, sequences: Listed[Sequence], counts: Listed[int], holds: Listed[int]
    ) -> None:
        self._pool = pool
        self._sequences = list(sequences)
        self._counts = list(counts)
        self._before = [sequence.layers for sequence in sequences]
        self._committed = [
            sequence.length + count - held
            for sequence, count, held in zip(sequences, counts, holds, strict=True)
        ]
        self._sealed = [
            range(sequence.sealed.start, self._sealed_stop(sequence.sealed.stop, committed))
            for sequence, committed in zip(sequences, self._committed, strict=True)
        ]
        self._appended: dict[int, list[Layer]] = {}
        self._changes = Counts()
        self._finished = False

    def append(
        self, layer: int, k: npt.NDArray[np.generic], v: npt.NDArray[np.generic], rotated: bool = False
    ) -> None:
        """Store the new tokens of one layer and seal what this step seals there.

        Args:
            layer: each layer once per step.
            k: K after RoPE, [sum(counts), kv_heads, D], the sequences one after the other.
            v: V, like k.
            rotated: True if k and v are in the rotated frame already.
        """
        self._check_open()
        pool = self._pool
        shape = (sum(self._counts), pool.kv_heads, pool.cfg.head_dim)
        if k.shape != shape or v.shape != shape:
            raise ValueError(f"k {list(k.shape)}, v {list(v.shape)}: expected {list(shape)}, alike")
        if layer in self._appended or not 0 <= layer < pool.layers:
            raise ValueError(
                f"layer {layer}: expected one of {pool.layers} that was not appended in this step"
            )
        slot_k = to_slot(k, pool.dtype, rotated, self._changes)
        slot_v = to_slot(v, pool.dtype, rotated, self._changes)
        self._appended[layer] = [
            self._seal(_extended(stored[layer], slot_k[span], slot_v[span]), sealed)
            for stored, span, sealed in zip(self._before, self._spans(), self._sealed, strict=True)
        ]

    @overload
    def attend(
        self,
        layer: int,
        q: npt.NDArray[np.generic],
        scale: float | None = ...,
        window: int | None = ...,
        softcap: float | None = ...,
        sink_logits: npt.NDArray[np.generic] | None = ...,
        return_lse: Literal[False] = ...,
        rotated: bool = ...,
    ) -> Float64: ...

    @overload
    def attend(
        self,
        layer: int,
        q: npt.NDArray[np.generic],
        scale: float | None = ...,
        window: int | None = ...,
        softcap: float | None = ...,
        sink_logits: npt.NDArray[np.generic] | None = ...,
        *,
        return_lse: Literal[True],
        rotated: bool = ...,
    ) -> tuple[Float64, Float64]: ...

    def attend(
        self,
        layer: int,
        q: npt.NDArray[np.generic],
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: npt.NDArray[np.generic] | None = None,
        return_lse: bool = False,
        rotated: bool = False,
    ) -> Float64 | tuple[Float64, Float64]:
        """Attention of the new tokens, in float64, causal by position.

        Before `append` of the layer the keys are those stored before the step, the queries still at the
        positions of the new tokens. After it the new tokens are keys too, and tiles sealed in this step are
        read as records.

        Args:
            layer: the layer.
            q: [sum(counts), heads, D].
            scale: 1 / sqrt(D) if None.
            window: key j is seen if i - j < window, sinks included.
            softcap: softcap·tanh(logit / softcap).
            sink_logits: [heads], one more softmax term per head.
            return_lse: also return the natural LSE, float64 [sum(counts), heads], sink logits included.
            rotated: True if q is, and out shall be, in the rotated frame.

        Returns:
            float64 [sum(counts), heads, D].
        """
        self._check_open()
        H = matrix(self._pool.cfg.head_dim)
        turned = q.astype(np.float64) if rotated else q.astype(np.float64) @ H
        stored = self._appended.get(layer) or [before[layer] for before in self._before]
        outs, lses = [], []
        for sequence, one, span in zip(self._sequences, stored, self._spans(), strict=True):
            out, lse = attend(
                turned[span],
                one.k,
                one.v,
                scale=scale,
                window=window,
                softcap=softcap,
                sink_logits=sink_logits,
                first_position=sequence.length,
            )
            outs.append(out)
            lses.append(lse)
        out = np.concatenate(outs)
        out = out if rotated else out @ H
        return (out, np.concatenate(lses)) if return_lse else out

    def finish(self) -> None:
        """Make the step part of the pool.

        Raises:
            ValueError: a layer was not appended.
        """
        self._check_open()
        missing = [layer for layer in range(self._pool.layers) if layer not in self._appended]
        if missing:
            raise ValueError(f"layers {missing} were not appended: expected every layer before finish")
        for index, sequence in enumerate(self._sequences):
            sequence.layers = [self._appended[layer][index] for layer in range(self._pool.layers)]
            sequence.length += self._counts[index]
            sequence.committed = self._committed[index]
            sequence.sealed = self._sealed[index]
        self._pool.counts.add(self._changes)
        self._finished = True

    def _sealed_stop(self, stop: int, committed: int) -> int:
        """First tile that is not sealed; never falls, though a truncation may shorten the recent window."""
        return max(stop, (committed - self._pool.cfg.recent_tokens) // self._pool.cfg.group)

    def _seal(self, stored: Layer, sealed: range) -> Layer:
        """Replace the tiles that become records; `stored` holds their slot values, and is not changed."""
        cfg = self._pool.cfg
        k, v, records, sink = stored.k.copy(), stored.v.copy(), dict(stored.records), stored.sink
        for tile in sealed:
            if tile in records:
                continue
            start, stop = tile * cfg.group, (tile + 1) * cfg.group
            heads_first = k[start:stop].transpose(1, 0, 2), v[start:stop].transpose(1, 0, 2)
            records[tile] = encode_slots(*heads_first, cfg, self._changes)
            decoded_k, decoded_v = decode(records[tile], cfg, rotated=True)
            read_from = max(start, min(cfg.sink_tokens, stop))
            if start < read_from:
                sink = (k[start:stop].copy(), v[start:stop].copy())
            k[read_from:stop] = decoded_k.transpose(1, 0, 2)[read_from - start :]
            v[read_from:stop] = decoded_v.transpose(1, 0, 2)[read_from - start :]
        return Layer(k, v, records, sink)

    def _spans(self) -> list[slice]:
        ends = np.cumsum(self._counts, dtype=np.int64).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self._counts, strict=True)]

    def _check_open(self) -> None:
        if self._finished:
            raise ValueError("the step is finished: expected an open one; begin the next with pool.step")
        for sequence, before in zip(self._sequences, self._before, strict=True):
            _check_live(sequence)
            if sequence.layers is not before:
                raise ValueError(
                    "a sequence has changed since the step began: begin a new one with pool.step"
                )


def _extended(stored: Layer, k: Float32, v: Float32) -> Layer:
    return replace(stored, k=np.concatenate((stored.k, k)), v=np.concatenate((stored.v, v)))


def _check_live(sequence: Sequence) -> None:
    if not sequence.live:
        raise ValueError("the sequence was freed: expected a live one; make one with pool.create")
