"""Sequences of a CPU pool to attend to, quickly filled."""

import io

import kvarn
import torch
from gpu.filled import FilledPool
from gpu.reference import distance, reference

KV_HEADS, HEAD_DIM = 8, 128
# What a step of the longest kind appends, and more.
ROOM = 1024
# ‖out − reference‖ / ‖reference‖, with slots, queries and outputs in float16.
TOLERANCE = 3e-3


class Packed:
    """A batch of sequences of the same tokens, each in memory of its own.

    One is appended to, the others are copies that were saved and loaded. Records are encoded without refit,
    which is quicker; attention reads them the same.

    Args:
        preset: the preset's name.
        length: tokens of each sequence.
        batch: sequences.
    """

    def __init__(self, preset, length, batch):
        self.cfg = kvarn.Config(preset, head_dim=HEAD_DIM, refit=False)
        empty = [0] * (batch - 1)
        self._filled = FilledPool(
            self.cfg, [length, *empty], kv_heads=KV_HEADS, layers=1, room=length + ROOM, device="cpu"
        )
        pool, sequences = self._filled.pool, self._filled.sequences
        saved = io.BytesIO()
        pool.save(sequences[0], saved)
        for index in range(1, batch):
            pool.free(sequences[index])
            sequences[index] = pool.load(io.BytesIO(saved.getvalue()))

    def truncate(self, length):
        """Keep so many tokens of every sequence."""
        for sequence in self._filled.sequences:
            self._filled.pool.truncate(sequence, length)

    def step(self, batch, q_len):
        """An open step, `q_len` tokens appended to each of the first sequences: to be abandoned."""
        step = self._filled.pool.step(self._filled.sequences[:batch], [q_len] * batch)
        rows = batch * q_len
        step.append(0, self._filled.rows(rows), self._filled.rows(rows))
        return step


def check(preset, heads, q_len):
    """Check attend against float64 over what the step decodes to; returns the error.

    Raises:
        ArithmeticError: it is wrong.
    """
    step = Packed(preset, 700, 2).step(2, q_len)
    q = torch.randn(2 * q_len, heads, HEAD_DIM, dtype=torch.float16)
    out = step.attend(0, q)
    like = torch.empty(0, dtype=torch.float32)
    dense = [step.expand(0, index, like=like) for index in range(2)]
    k, v = (torch.stack([pair[side] for pair in dense]).transpose(1, 2) for side in range(2))
    by_sequence = (2, q_len, heads, HEAD_DIM)
    expected = reference(q.view(by_sequence).transpose(1, 2), k, v)
    error = distance(out.view(by_sequence).transpose(1, 2), expected)
    step.abandon()
    if error > TOLERANCE:
        raise ArithmeticError(
            f"kvarn {preset}: error {error:.1e} against float64, expected at most {TOLERANCE:.0e}"
        )
    return error
