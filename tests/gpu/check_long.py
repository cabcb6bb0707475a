"""Long chunks on a GPU: `python tests/gpu/check_long.py [--times-only | --no-times] [--json FILE]`.

Chunks beyond a few query columns are attended by expanding what is stored and dense attention. Checked
against float64 over what the pool stores, beside the fused kernel at the same chunks, and bit by bit: the
same call twice, alone and in a batch. Then both ways are timed, so that the number of columns
can be chosen from which the dense way is taken. Ends with counts; the exit status is 1 if anything failed.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
import traceback

import kvarn
import kvarn.step
import torch
from check import COUNTS, DEVICE, Twin, nan0
from kvarn import _dense

DENSE, FUSED = 0, 1 << 30


@contextlib.contextmanager
def fused_up_to(columns):
    """The fused kernel attends up to this many columns, dense attention beyond."""
    before = kvarn.step._FUSED_COLUMNS, kvarn.step._FUSED_COLUMNS_WITH_OPTIONS
    kvarn.step._FUSED_COLUMNS = kvarn.step._FUSED_COLUMNS_WITH_OPTIONS = columns
    try:
        yield
    finally:
        kvarn.step._FUSED_COLUMNS, kvarn.step._FUSED_COLUMNS_WITH_OPTIONS = before


@contextlib.contextmanager
def blocks_of(block, rows, scores=1 << 24):
    """Small blocks, so that short sequences have many of them."""
    before = _dense.BLOCK, _dense.ROWS, _dense.SCORES
    _dense.BLOCK, _dense.ROWS, _dense.SCORES = block, rows, scores
    try:
        yield
    finally:
        _dense.BLOCK, _dense.ROWS, _dense.SCORES = before


def check_ranges():
    """Expansion of a range gives the bits of that part of the whole."""
    for d, g, sinks in ((64, 64, None), (96, 128, 16), (128, 128, None), (128, 64, 0), (256, 64, 16)):
        cfg = kvarn.Config(key_bits=3, value_bits=3, group=g, head_dim=d, sink_tokens=sinks)
        pool = kvarn.Pool(cfg, layers=1, kv_heads=3, pages=16, slots=8, device=DEVICE)
        sequence = pool.create()
        length = 5 * g + 37
        x = torch.randn(length, 3, d, device=DEVICE, dtype=torch.float16)
        with pool.step([sequence], [length]) as step:
            step.append(0, x, -x)
        for rotated, dtype in ((False, torch.float16), (True, torch.bfloat16)):
            like = torch.empty(0, device=DEVICE, dtype=dtype)
            whole = pool.expand(sequence, 0, rotated, like=like)
            for first, count in (
                (0, length),
                (1, 1),
                (15, 2),
                (16, 16),
                (63, 66),
                (g - 1, 2),
                (g + 5, 3 * g),
                (length - 1, 1),
            ):
                part = pool.expand(sequence, 0, rotated, like=like, first=first, count=count)
                for got, want in zip(part, whole, strict=True):
                    if not torch.equal(got, want[first : first + count]):
                        COUNTS.fail(f"{cfg} rotated {rotated}: tokens {first} and {count} more differ")
        COUNTS.cases += 1
    print("ranges: done", flush=True)


VARIANTS = (
    {},
    {"window": 100},
    {"window": 1},
    {"softcap": 20.0},
    {"scale": 0.1},
    {"window": 333, "softcap": 30.0, "scale": 0.1},
)
SHAPES = (  # head dim, tile, bits, KV heads, query heads per KV head
    (128, 128, (4, 2), 2, 4),
    (64, 64, (3, 3), 1, 7),
    (96, 128, (2, 2), 2, 1),
    (256, 64, (8, 8), 1, 8),
    (128, 64, (8, 4), 1, 16),
    (96, 64, (4, 4), 2, 3),
)


def check_against_f64():
    """Every option at every shape, in small blocks: ragged batches, before and after append."""
    for index, (d, g, bits, kv, group) in enumerate(SHAPES):
        for at, options in enumerate(VARIANTS):
            started = time.time()
            # The default, everything dense, and everything fused.
            mode = (None, DENSE, FUSED)[(index + at) % 3]
            threshold = kvarn.step._FUSED_COLUMNS if mode is None else mode
            with fused_up_to(threshold), blocks_of(192, 96, 1 << 20):
                made = Twin(
                    d=d,
                    g=g,
                    bits=bits,
                    kv=kv,
                    dtype=torch.bfloat16 if (index + at) % 2 else torch.float16,
                    sinks=(None, 0, 16)[index % 3],
                    recent=(0, 40)[at % 2],
                    seed=100 * index + at,
                )
                which = [made.create() for _ in range(3)]
                sinks = torch.linspace(-2, 2, kv * group, device=DEVICE) if at % 2 else None
                for counts, hold in (
                    ([3 * g + 7, 1, 190], 0),
                    ([g + 30, 200, 2], [3, 0, 0]),
                    ([97, 1, 300], 0),
                ):
                    made.step(which, counts, hold, group=group, options=options, sinks=sinks)
            COUNTS.cases += 1
            print(
                f"d{d} g{g} k{bits[0]}v{bits[1]} ratio {group} {options} up to {threshold} fused: "
                f"{time.time() - started:.1f} s",
                flush=True,
            )


def check_long_history():
    """Blocks of the usual size: chunks behind 20,000 tokens."""
    made = Twin(d=128, g=128, bits=(4, 2), kv=2, dtype=torch.float16, pages=256, seed=3)
    i = made.create()
    made.step([i], [20_000], 0, group=4, compare=False, attend=False)
    for count, options in ((300, {}), (64, {"window": 9_000}), (129, {"softcap": 20.0})):
        made.step([i], [count], 0, group=4, options=options)
    COUNTS.cases += 1
    print("long history: done", flush=True)


def filled(length, *, kv=8, heads=32, d=128, name="kvarn_k4v2_g128", batch=1):
    """A CUDA pool with sequences of `length` tokens."""
    cfg = kvarn.Config(name, head_dim=d)
    # Room for the longest chunk behind it.
    pages = batch * ((length + 4096) // cfg.group + 2)
    pool = kvarn.Pool(cfg, layers=1, kv_heads=kv, pages=pages, slots=4 * batch + 4, device=DEVICE)
    sequences = [pool.create() for _ in range(batch)]
    random = torch.Generator(device=DEVICE).manual_seed(length)
    for sequence in sequences:
        left = length
        while left > 0:
            n = min(left, 8192)
            k, v = (torch.randn(n, kv, d, generator=random, device=DEVICE).half() for _ in range(2))
            with pool.step([sequence], [n]) as step:
                step.append(0, k, v)
            left -= n
    return pool, sequences


def check_fused_and_dense():
    """Both ways give the same within their rounding, also where float64 scores would not fit."""
    for length, count in ((4_096, 512), (32_768, 2_048), (1_000, 4_096)):
        pool, (sequence,) = filled(length)
        q = torch.randn(count, 32, 128, device=DEVICE).half()
        k, v = (torch.randn(count, 8, 128, device=DEVICE).half() for _ in range(2))
        step = pool.step([sequence], [count])
        step.append(0, k, v)
        for options in ({}, {"window": 1_000}, {"softcap": 15.0}):
            with fused_up_to(FUSED):
                fused, fused_lse = step.attend(0, q, **options, return_lse=True)
            with fused_up_to(DENSE):
                dense, dense_lse = step.attend(0, q, **options, return_lse=True)
            error = (dense.double() - fused.double()).norm(dim=-1) / fused.double().norm(dim=-1)
            off = (dense_lse - fused_lse).abs().max()
            COUNTS.vectors += error.numel()
            if not (error.max() < 8e-3 and off < 5e-3):
                COUNTS.fail(
                    f"{count} after {length} {options}: fused and dense differ by {float(error.max()):.1e}, "
                    f"lse by {float(off):.1e}"
                )
            print(f"{count} after {length} {options}: {float(error.max()):.1e} apart", flush=True)
        step.abandon()
        COUNTS.cases += 1


@fused_up_to(DENSE)
def check_bits():
    """Repeated, in a batch: the same bits. No capture. NaN in one head of one query stays there."""
    options = {"window": 700, "sink_logits": torch.linspace(-2, 2, 8, device=DEVICE)}
    pool, (a, b, c) = filled(1_500, kv=2, heads=8, batch=3)
    random = torch.Generator(device=DEVICE).manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=random, device=DEVICE).half()

    # The same tokens alone and between others.
    twin, (d,) = filled(1_500, kv=2, heads=8)
    count = 400
    k, v, q = normal(count, 2, 128), normal(count, 2, 128), normal(count, 8, 128)
    others = normal(51, 2, 128), normal(51, 2, 128), normal(51, 8, 128)
    alone, batch = twin.step([d], [count]), pool.step([b, a, c], [50, count, 1])
    alone.append(0, k, v)
    between = [torch.cat([o[:50], x, o[50:]]) for o, x in zip(others, (k, v, q), strict=True)]
    batch.append(0, between[0], between[1])
    for step, queries in ((alone, q), (batch, between[2])):
        first, again = (step.attend(0, queries, **options, return_lse=True) for _ in range(2))
        if not all(map(torch.equal, map(nan0, first), map(nan0, again))):
            COUNTS.fail("dense attention is not repeatable")
    one = alone.attend(0, q, **options)
    if not torch.equal(one, batch.attend(0, between[2], **options)[50 : 50 + count]):
        COUNTS.fail("dense attention alone and in a batch differ")
    bad = q.clone()
    bad[17, 3, 5] = math.nan
    out = alone.attend(0, bad, **options)
    if not out[17, 3].isnan().all():
        COUNTS.fail("a NaN in a query vanished")
    out[17, 3] = one[17, 3]
    if not torch.equal(out, one):
        COUNTS.fail("a NaN in a query spread")
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            alone.attend(0, q, **options)
        COUNTS.fail("dense attention was captured: a replay would read the tables of another step")
    except kvarn.CudaError:
        pass
    alone.abandon()
    batch.abandon()
    COUNTS.cases += 1
    print("bits: done", flush=True)


def microseconds(call, repeats=7):
    """Median time of a call on the device, and the memory it took beyond what was there."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() - before


def measure(path):
    """Times of both ways, 32 query and 8 KV heads of 128 channels, k4v2, beside SDPA over a 16-bit cache."""
    rows = []
    print(f"{'history':>8} {'new':>6} {'options':>18} {'fused':>9} {'dense':>9} {'sdpa':>9} µs  dense memory")
    for length in (4_096, 32_768):
        pool, (sequence,) = filled(length)
        dense_k, dense_v = (x.transpose(0, 1)[None] for x in pool.expand(sequence, 0))
        for count in (16, 32, 64, 128, 256, 512, 1_024, 2_048):
            q = torch.randn(count, 32, 128, device=DEVICE).half()
            step = pool.step([sequence], [count])
            for options in ({}, {"softcap": 30.0}, {"window": 2_048}):

                def attend(step=step, q=q, options=options):
                    step.attend(0, q, **options, return_lse=True)

                row = {"history": length, "new": count, "columns": 4 * count, "options": options}
                for name, columns in (("fused", FUSED), ("dense", DENSE)):
                    try:
                        with fused_up_to(columns):
                            row[f"{name}_us"], row[f"{name}_bytes"] = microseconds(attend)
                    except Exception as error:  # one way failing leaves the other's figure
                        COUNTS.fail(f"{name}, {row}: {error}")
                        row[f"{name}_us"], row[f"{name}_bytes"] = math.nan, 0
                row["sdpa_us"] = math.nan
                if not options:
                    row["sdpa_us"], _ = microseconds(
                        lambda q=q, k=dense_k, v=dense_v: torch.nn.functional.scaled_dot_product_attention(
                            q.transpose(0, 1)[None], k, v, enable_gqa=True
                        )
                    )
                rows.append(row)
                print(
                    f"{length:8} {count:6} {options!s:>18} {row['fused_us']:9.0f} {row['dense_us']:9.0f} "
                    f"{row['sdpa_us']:9.0f}     {row['dense_bytes'] / 2**20:.0f} MiB",
                    flush=True,
                )
            step.abandon()
    if path:
        found = {
            "device": torch.cuda.get_device_name(),
            "command": "python tests/gpu/check_long.py",
            "rows": rows,
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times-only", action="store_true", help="no checks")
    parser.add_argument("--no-times", action="store_true", help="checks only")
    parser.add_argument("--json", help="file for the times")
    options = parser.parse_args()
    print(
        f"kvarn {kvarn.__version__} on {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True
    )
    parts = []
    if not options.times_only:
        parts += [check_ranges, check_bits, check_fused_and_dense, check_long_history, check_against_f64]
    if not options.no_times:
        parts.append(lambda: measure(options.json))
    for part in parts:
        try:
            part()
        except Exception:
            COUNTS.fail(f"{getattr(part, '__name__', part)}:\n{traceback.format_exc()}")
    status = COUNTS.finish()
    errors = f" (median of medians {statistics.median(COUNTS.errors):.1e})" if COUNTS.errors else ""
    print(
        f"{COUNTS.cases} cases, {COUNTS.vectors} output vectors{errors}, {COUNTS.near} up to a quarter "
        f"beyond the contract, {COUNTS.failed} failed"
    )
    sys.exit(status)


if __name__ == "__main__":
    main()
