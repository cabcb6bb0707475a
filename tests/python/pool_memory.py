"""What calls of a CPU pool take beside the pool's own memory.

`python tests/python/pool_memory.py` prints JSON. A sequence of 8,192 tokens is stored in chunks. Then each
call runs once: its peak of resident memory over what was resident before. K and V of one layer in half
precision would be 33.6 MB, all records 57 MB.
"""

import json
import os
import pathlib
import sys
import tempfile

import kvarn
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parent / "transformers"))
from peak_memory import ALLOCATOR, ProcessMemory

LAYERS, KV_HEADS, HEADS, HEAD_DIM = 8, 8, 8, 128
TOKENS, CHUNK = 8192, 512
PRESET = "kvarn_k4v2_g128"


def peak_of(call):
    """Peak of resident memory during a call, over what was resident before."""
    memory = ProcessMemory()
    call()
    return memory.peak()


def rows(tokens, heads):
    return np.random.default_rng(tokens).standard_normal((tokens, heads, HEAD_DIM)).astype(np.float16)


def step_peak(pool, sequences, tokens):
    """Peak of a step: append and attention of all its tokens in all layers."""
    count = len(sequences) * tokens
    q, k, v = rows(count, HEADS), rows(count, KV_HEADS), rows(count, KV_HEADS)

    def run():
        step = pool.step(sequences, [tokens] * len(sequences))
        for layer in range(LAYERS):
            step.append(layer, k, v)
            step.attend(layer, q)
        step.finish()

    return peak_of(run)


def calls(pool):
    """Peaks of calls on a sequence of TOKENS tokens, by name, and the bytes of its image; frees both."""
    sequence = pool.create()
    for _ in range(TOKENS // CHUNK):
        step_peak(pool, [sequence], CHUNK)
    peaks, forks = {}, []
    peaks["decode"] = step_peak(pool, [sequence], 1)
    peaks["chunk"] = step_peak(pool, [sequence], CHUNK)
    peaks["fork"] = peak_of(lambda: forks.append(pool.fork(sequence)))
    peaks["decode of two that share"] = step_peak(pool, [sequence, *forks], 1)
    peaks["truncate into a record"] = peak_of(lambda: pool.truncate(forks[0], TOKENS // 2 + 5))
    keys = [bytes([tile] * 16) for tile in range(60)]
    peaks["publish"] = peak_of(lambda: pool.publish(sequence, keys))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "sequence"
        peaks["save"] = peak_of(lambda: pool.save(sequence, file))
        image = file.stat().st_size
    for one in (sequence, *forks):
        pool.free(one)
    pool.unpublish()
    return peaks, image


def main():
    cfg = kvarn.Config(PRESET, head_dim=HEAD_DIM)
    pool = kvarn.Pool(cfg, layers=LAYERS, kv_heads=KV_HEADS, pages=80, slots=12, dtype="float16")
    # The pool's own memory, and what threads keep for later calls, is resident from the first time on.
    calls(pool)
    peaks, image = calls(pool)
    json.dump({"peaks": peaks, "image": image}, sys.stdout)


if __name__ == "__main__":
    if not ALLOCATOR.items() <= os.environ.items():
        # Read when a process begins.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    main()
