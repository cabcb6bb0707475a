"""Prefix sharing on a CUDA pool. `python tests/gpu/check_prefixes.py`.

A sequence that starts with published tiles gives, to the bit, the outputs, records and slots of one that
computed its prefix on the same device, and keeps them while others displace what nobody holds.
"""

import sys
import traceback

import kvarn
import numpy as np
import torch

DEVICE = "cuda"
LAYERS, KV_HEADS, HEADS = 2, 2, 8


class Rows:
    """K, V and queries of one prompt: of the tokens from `first` on, the same in whichever step they come."""

    def __init__(self, tokens, head_dim, dtype, seed):
        random = torch.Generator().manual_seed(seed)
        shape = (LAYERS, tokens, 2 * KV_HEADS + HEADS, head_dim)
        self.rows = torch.randn(shape, generator=random).to(dtype).to(DEVICE)

    def of(self, layer, first, last):
        rows = self.rows[layer, first:last]
        return [part.contiguous() for part in rows.split([KV_HEADS, KV_HEADS, HEADS], dim=1)]


def run(pool, sequence, rows, last):
    """Appends the tokens up to `last`; returns the attention of each layer."""
    first, outputs = sequence.length, []
    with pool.step([sequence], [last - first]) as step:
        for layer in range(LAYERS):
            k, v, q = rows.of(layer, first, last)
            step.append(layer, k, v)
            outputs.append(step.attend(layer, q))
    return outputs


def differ(pool, sequence, other, alone):
    """Whether the two sequences hold other bytes."""
    stored = sequence.length % pool.cfg.group
    for kind, table in (("pages", "block_table"), ("slots", "slot_table")):
        ours, theirs = (np.from_dlpack(getattr(one, table)) for one in (sequence, alone))
        if ((ours >= 0) != (theirs >= 0)).any():
            return True
        here, there = (torch.from_numpy(ids[ids >= 0]).long().to(DEVICE) for ids in (ours, theirs))
        for layer in range(LAYERS):
            x = torch.from_dlpack(getattr(pool, kind)[layer])[here]
            y = torch.from_dlpack(getattr(other, kind)[layer])[there]
            if kind == "slots" and stored:
                # Behind the last token its slot may hold anything.
                x[-1, :, :, stored:] = y[-1, :, :, stored:] = 0
            if not torch.equal(x, y):
                return True
    return False


def check_start(fail, *, head_dim, group, sinks, recent, dtype):
    cfg = kvarn.Config(
        key_bits=4, value_bits=2, group=group, head_dim=head_dim, sink_tokens=sinks, recent_tokens=recent
    )
    shape = {"layers": LAYERS, "kv_heads": KV_HEADS, "slots": 16, "device": DEVICE}
    pool, other = (kvarn.Pool(cfg, pages=12, **shape) for _ in range(2))
    # Whatever is read without having been written spreads.
    for memory in (*pool.pages, *other.pages):
        torch.from_dlpack(memory).fill_(0xFF)
    for memory in (*pool.slots, *other.slots):
        torch.from_dlpack(memory).view(torch.int16).fill_(0x7FFF)
    tokens = 3 * group + recent + 7
    rows = Rows(tokens + 4 * group, head_dim, dtype, seed=group + recent)
    keys = kvarn.prefix_keys(range(3 * group), group)

    first = pool.create()
    run(pool, first, rows, tokens)
    if pool.publish(first, keys) != 3:
        fail(f"{cfg}: expected 3 tiles to be published")
    pool.free(first)
    for tiles in (1, 2, 3):
        alone, started = other.create(), pool.create(keys[:tiles])
        if started.length != tiles * group:
            fail(f"{cfg}: {started.length} tokens to start with, expected {tiles * group}")
        # In the same steps from here on: a long chunk may be attended by another kernel than a short one.
        run(other, alone, rows, tiles * group + recent)
        step_ends = [tokens, tokens + 1, tokens + 3, tokens + group, tokens + group + 1]
        if recent:
            run(pool, started, rows, tiles * group + recent)
        for end in step_ends:
            for x, y in zip(run(pool, started, rows, end), run(other, alone, rows, end), strict=True):
                if not torch.equal(x, y):
                    fail(f"{cfg} {dtype}, {tiles} tiles, up to {end}: outputs differ")
        if differ(pool, started, other, alone):
            fail(f"{cfg} {dtype}, {tiles} tiles: stored bytes differ")
        for layer in range(LAYERS):
            pair = [one.expand(of, layer, like=rows.rows) for one, of in ((pool, started), (other, alone))]
            if not all(torch.equal(x, y) for x, y in zip(*pair, strict=True)):
                fail(f"{cfg} {dtype}, {tiles} tiles: expansions differ")
        pool.free(started)
        other.free(alone)

    # Others displace what nobody holds, and leave what somebody does.
    held, filler = pool.create(keys[:2]), pool.create()
    # One page more than are free without the third tile; a tile that is a sink as a whole has none.
    pages = pool.stats().pages_free + int(cfg.sink_tokens == group)
    run(pool, filler, Rows(pages * group + recent, head_dim, dtype, seed=99), pages * group + recent)
    stats = pool.stats()
    if pool.match_prefix(keys) != 2 or stats.prefix_evictions != 1:
        fail(f"{cfg}: {stats} after the pool was filled, expected two tiles of three to be published")
    pool.free(filler)
    alone = other.create()
    run(other, alone, rows, 2 * group + recent)
    if recent:
        run(pool, held, rows, 2 * group + recent)
    for x, y in zip(run(pool, held, rows, tokens), run(other, alone, rows, tokens), strict=True):
        if not torch.equal(x, y):
            fail(f"{cfg} {dtype}: outputs differ after others displaced tiles")


def check_prefixes(fail):
    """Calls `fail` with a text for each difference. Returns how many cases were tried."""
    cases = [
        {"head_dim": 128, "group": 128, "sinks": None, "recent": 0, "dtype": torch.float16},
        {"head_dim": 64, "group": 64, "sinks": 16, "recent": 40, "dtype": torch.bfloat16},
        {"head_dim": 96, "group": 64, "sinks": 0, "recent": 0, "dtype": torch.float16},
        {"head_dim": 256, "group": 64, "sinks": None, "recent": 70, "dtype": torch.bfloat16},
    ]
    for case in cases:
        try:
            check_start(fail, **case)
        except Exception:
            fail(f"prefixes of {case}: {traceback.format_exc()}")
    print("prefixes: done", flush=True)
    return len(cases)


def main():
    failures = []

    def fail(text):
        failures.append(text)
        print(f"FAILED {text}", flush=True)

    print(f"kvarn {kvarn.__version__} on {torch.cuda.get_device_name()}", flush=True)
    cases = check_prefixes(fail)
    print(f"{cases} cases, {len(failures)} failed")
    sys.exit(int(bool(failures)))


if __name__ == "__main__":
    main()
