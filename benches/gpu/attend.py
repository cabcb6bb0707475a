"""Decode attention on a GPU: `python benches/gpu/attend.py [--out FILE]`.

For each shape and preset: one launch of attend in a layer of a pool (rotations, sinks, tail and merge
included), beside a plain read of the same bytes and the fastest of torch's SDPA backends on a 16-bit cache
of the same tokens (with the query heads of a KV head folded into the query length too). Everything rotates
over more memory than the L2 cache holds; medians of graph replays. Correctness is checked by
tests/gpu/check.py.
"""

import argparse
import json
import math
import statistics
import subprocess
import time

import kvarn
import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SHAPES = [(8, 32768), (32, 4096), (1, 131072), (1, 32768), (1, 4096), (32, 32768)]
PRESETS = ["kvarn_k4v4_g128", "kvarn_k4v2_g128", "kvarn_k3v3_g128", "kvarn_k2v2_g128"]
COLD = 400e6  # bytes to rotate over, several times the L2 cache


@triton.jit
def read_kernel(pointer, count, result, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(pointer + at, mask=at < count, other=0)
    folded = tl.xor_sum(value)
    if folded == 1234567890:  # never, but the compiler does not know
        tl.store(result, folded)


def plain_read(memory, result):
    words = memory.view(torch.int32)
    read_kernel[(triton.cdiv(words.numel(), 16384),)](words, words.numel(), result, BLOCK=16384, num_warps=8)


def graph_time(calls, stream, replays=50):
    """Median µs of one call; `calls` are captured together so that each finds a cold cache."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for _ in range(replays + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
    return statistics.median(s.elapsed_time(e) * 1e3 / len(calls) for s, e in times[3:])


def host_time(call, count=300):
    """Median µs on the host of one call, nothing waited for."""
    torch.cuda.synchronize()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
        if len(times) % 50 == 0:
            torch.cuda.synchronize()
    return statistics.median(times)


def sdpa_time(batch, context, stream):
    """The fastest backend on a 16-bit cache, µs."""
    each = batch * context * KV_HEADS * HEAD_DIM * 4
    copies = max(1, math.ceil(COLD / each))
    kv = [
        torch.randn(2, batch, KV_HEADS, context, HEAD_DIM, device="cuda", dtype=torch.float16)
        for _ in range(copies)
    ]
    q = torch.randn(batch, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.float16)
    folded = q.view(batch, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    best = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        for name, query, gqa in (("gqa", q, True), ("folded", folded, False)):

            def call(k, v, query=query, gqa=gqa, backend=backend):
                with sdpa_kernel(backend):
                    torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=gqa)

            try:
                best[f"{backend.name} {name}"] = graph_time(
                    [lambda k=x[0], v=x[1]: call(k, v) for x in kv], stream
                )
            except RuntimeError:
                continue  # the backend does not serve this shape
    return min(best.items(), key=lambda item: item[1])


def kvarn_row(preset, batch, context, stream):
    cfg = kvarn.Config(preset, head_dim=HEAD_DIM)
    tiles = context // cfg.group
    each = batch * KV_HEADS * (tiles * cfg.record_bytes + 4 * cfg.group * HEAD_DIM * 2)
    layers = max(1, math.ceil(COLD / each))
    pool = kvarn.Pool(
        cfg, layers=layers, kv_heads=KV_HEADS, pages=batch * tiles, slots=4 * batch + 8, device="cuda"
    )
    sequences = [pool.create() for _ in range(batch)]
    chunk = 128 * max(1, 256 // batch)
    filler = torch.randn(batch * chunk, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.float16)
    with torch.cuda.stream(stream):
        stored = 0
        while stored < context - cfg.group // 2:
            count = min(chunk, context - cfg.group // 2 - stored)
            rows = filler[: batch * count]
            with pool.step(sequences, [count] * batch) as step:
                for layer in range(layers):
                    step.append(layer, rows, rows)
            stored += count
        arrays = pool.static_arrays([1] * batch, tokens=stored + 1)  # a captured attend needs them
        step = pool.step(sequences, [1] * batch, arrays=arrays)
        one = filler[:batch]
        q = torch.randn(batch, HEADS, HEAD_DIM, device="cuda", dtype=torch.float16)
        append_host = []
        for layer in range(layers):
            start = time.perf_counter()
            step.append(layer, one, one)
            append_host.append((time.perf_counter() - start) * 1e6)
        step.attend(0, q)
        attend_host = host_time(lambda: step.attend(0, q))
    calls = [lambda layer=layer: step.attend(layer, q) for layer in range(layers)]
    us = graph_time(calls, stream)
    step.abandon()
    # Bytes of one layer that the call must read: sealed records, the sink, the stored part of the tail.
    sealed = (stored // cfg.group) - 1
    tail = stored + 1 - (sealed + 1) * cfg.group
    token = KV_HEADS * HEAD_DIM * 4
    must = batch * (sealed * KV_HEADS * cfg.record_bytes + (cfg.group + tail) * token)
    memory = torch.empty(layers, must // 4 * 4, dtype=torch.uint8, device="cuda").random_(0, 255)
    result = torch.zeros(1, dtype=torch.int32, device="cuda")
    plain = graph_time([lambda m=m: plain_read(m, result) for m in memory], stream)
    return {
        "preset": preset,
        "batch": batch,
        "context": stored + 1,
        "us": us,
        "bytes": must,
        "gb_per_s": must / us / 1e3,
        "plain_read_us": plain,
        "of_plain_read": plain / us,
        "attend_host_us": attend_host,
        "append_host_us": statistics.median(append_host),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="write the rows as JSON")
    parser.add_argument("--commit", help="commit to note; default: asked of git")
    arguments = parser.parse_args()
    commit = (
        arguments.commit
        or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    )
    device = torch.cuda.get_device_name()
    print(
        f"kvarn {kvarn.__version__} {commit[:10]} on {device}; "
        f"heads {HEADS}/{KV_HEADS}, D {HEAD_DIM}, float16"
    )
    stream = torch.cuda.Stream()
    rows = []
    for batch, context in SHAPES:
        peer, peer_us = sdpa_time(batch, context, stream)
        for preset in PRESETS:
            row = kvarn_row(preset, batch, context, stream)
            row |= {"peer": peer, "peer_us": peer_us, "times_peer": peer_us / row["us"]}
            rows.append(row)
            print(
                f"{preset} batch {batch:2d} context {row['context']:6d}: {row['us']:7.1f} µs, "
                f"{row['gb_per_s']:5.0f} GB/s, {row['of_plain_read']:.2f} of plain read, "
                f"{row['times_peer']:.2f} × {peer} ({peer_us:.1f} µs), "
                f"host µs: attend {row['attend_host_us']:.1f}, append {row['append_host_us']:.1f}",
                flush=True,
            )
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(
                {"device": device, "commit": commit, "command": "python benches/gpu/attend.py", "rows": rows},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
