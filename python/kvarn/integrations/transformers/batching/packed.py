"""One forward pass over the new tokens of many requests, one behind the other in a single row."""

from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import groupby

import torch
from torch import Tensor

import kvarn
from kvarn import Pool, ShapeError, Step
from kvarn.integrations.transformers.dense import Scoring
from kvarn.integrations.transformers.forward import FUSED_TOKENS
from kvarn.integrations.transformers.raw import chunks_attention, prompts_attention, stored_attention

# The newest token stays uncommitted, as in a `KVarNCache` that decodes: tiles are sealed at the same tokens.
HOLD = 1


class Reading(IntEnum):
    """In which order a sequence attends and appends; see `Chunk`, which has the same for a batch."""

    STORED = 0
    CHUNK = 1
    PROMPT = 2


def reading(stored: int, count: int) -> Reading:
    """Return how a sequence with `stored` tokens reads `count` new ones."""
    if not stored:
        return Reading.PROMPT
    return Reading.STORED if count <= FUSED_TOKENS else Reading.CHUNK


class PackedBatch:
    """The new tokens of several sequences on their way through the layers.

    Sequences that read alike share a step of the pool: so none is attended to twice. All steps are opened,
    finished and abandoned together.

    Args:
        pool: the pool.
        sequences: those of the batch, in the order of `reading`.
        counts: new tokens of each, at least 1.

    Raises:
        CapacityError: too few free pages or slots; nothing is changed.
    """

    def __init__(self, pool: Pool, sequences: Sequence[kvarn.Sequence], counts: Sequence[int]) -> None:
        self.pool = pool
        self.tokens = sum(counts)
        self._parts: list[_Part] = []
        kinds = [reading(sequence.length, count) for sequence, count in zip(sequences, counts, strict=True)]
        try:
            for kind, members in groupby(range(len(kinds)), kinds.__getitem__):
                places = list(members)
                part = [counts[place] for place in places]
                step = pool.step([sequences[place] for place in places], part, hold=HOLD)
                self._parts.append(_Part(kind, step, part))
        except BaseException:
            self.abandon()
            raise

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Append new keys and values to a layer, and attend to each sequence.

        Args:
            layer: layer of the model and the pool.
            query: [1, heads, tokens, head_dim], tokens of all sequences one behind the other.
            key: [1, kv_heads, tokens, head_dim].
            value: like key.
            scoring: how scores become weights.

        Returns:
            [1, tokens, heads, head_dim] in the query's dtype.

        Raises:
            ShapeError: heads or tokens differ from those of the pool and the batch.
        """
        kv_heads, head_dim = self.pool.layers[layer]
        expected = (1, kv_heads, self.tokens, head_dim)
        if key.shape != expected or value.shape != expected:
            raise ShapeError(
                f"layer {layer}: keys {list(key.shape)} and values {list(value.shape)}: expected "
                f"{list(expected)} by the model's config and the batch; serve this model by generate()"
            )
        out, first = [], 0
        for part in self._parts:
            last = first + part.tokens
            states = (query[0, :, first:last], key[0, :, first:last], value[0, :, first:last])
            out.append(part.attend(layer, *states, scoring))
            first = last
        return (out[0] if len(out) == 1 else torch.cat(out))[None]

    def finish(self) -> None:
        """Move the lengths of all sequences.

        Raises:
            StateError: a layer was not appended to; then all steps are still open.
        """
        for part in self._parts:
            part.step.finish()

    def abandon(self) -> None:
        """Leave the sequences as they were. Nothing happens to those that are finished."""
        for part in self._parts:
            part.step.abandon()


class _Part:
    """Sequences that read alike, and their step."""

    def __init__(self, kind: Reading, step: Step, counts: list[int]) -> None:
        self.kind = kind
        self.step = step
        self.counts = counts
        self.tokens = sum(counts)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Append and attend: [heads, tokens, head_dim] in, [tokens, heads, head_dim] out."""
        q, k, v = (states.transpose(0, 1) for states in (query, key, value))
        if self.kind is Reading.STORED:
            self.step.append(layer, k, v)
            return stored_attention(self.step, layer, q, scoring)
        rows = self._rows(query, key, value)
        if self.kind is Reading.CHUNK:
            out = chunks_attention(self.step, layer, q, rows, scoring)
        else:
            out = prompts_attention(rows, scoring)
        self.step.append(layer, k, v)
        return out

    def _rows(self, *states: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield from zip(*(torch.split(x, self.counts, dim=1) for x in states), strict=True)
