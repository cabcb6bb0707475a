"""Times on a GPU: medians of graph replays over cold memory, medians on the host, and plain reads and writes.

Calls that are measured together read different memory, more of it than the L2 cache holds: each finds a cold
cache, as a layer of a model does.
"""

import functools
import math
import statistics
import time

import torch
import triton
import triton.language as tl

COLD_BYTES = 400e6  # several times the L2 cache of any present GPU
MOST_COPIES = 256
REPLAYS = 50
BLOCK = 16384


def cold_copies(bytes_each):
    """How many calls that read `bytes_each` bytes go into one graph."""
    return max(1, min(MOST_COPIES, math.ceil(COLD_BYTES / bytes_each)))


def graph_time(calls, stream, *, replays=REPLAYS, warm=True):
    """Median µs of one call; `calls` are captured together and replayed.

    Args:
        calls: functions without arguments whose work goes to the current stream.
        stream: the stream to capture on.
        replays: how many replays the median is of.
        warm: run the calls once before; False for what can be called only once and has run elsewhere.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        if warm:
            for call in calls:
                call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = [_between_events(graph.replay) for _ in range(replays + 3)]
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times[3:]) * 1e3 / len(calls)


def eager_time(call, count, stream, *, repeats=REPLAYS):
    """Median µs of one call on the device, for what cannot be captured: `count` calls lie between two events.

    The host must be faster than the device, or it is the host that is measured.

    Args:
        call: function of the call's number, 0 … count - 1.
        count: calls between two events.
        stream: the stream to run on.
        repeats: how many pairs of events the median is of.
    """

    def run():
        for index in range(count):
            call(index)

    with torch.cuda.stream(stream):
        times = [_between_events(run) for _ in range(repeats + 3)]
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times[3:]) * 1e3 / count


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


def _between_events(run):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return start, end


@triton.jit
def _read_kernel(pointer, count, result, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(pointer + at, mask=at < count, other=0)
    folded = tl.xor_sum(value)
    if folded == 1234567890:  # never, but the compiler does not know
        tl.store(result, folded)


@triton.jit
def _write_kernel(pointer, count, value, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(pointer + at, value, mask=at < count)


def _rotated_words(count_bytes):
    copies = cold_copies(count_bytes)
    words = torch.empty(copies, max(1, int(count_bytes) // 4), dtype=torch.int32, device="cuda")
    return words.random_()


@functools.cache
def plain_read_time(count_bytes, stream):
    """Median µs to read that many contiguous bytes."""
    memory = _rotated_words(count_bytes)
    count = memory.shape[1]
    result = torch.zeros(1, dtype=torch.int32, device="cuda")
    grid = (triton.cdiv(count, BLOCK),)
    calls = [
        lambda words=words: _read_kernel[grid](words, count, result, BLOCK=BLOCK, num_warps=8)
        for words in memory
    ]
    return graph_time(calls, stream)


@functools.cache
def plain_write_time(count_bytes, stream):
    """Median µs to write that many contiguous bytes."""
    memory = _rotated_words(count_bytes)
    count = memory.shape[1]
    grid = (triton.cdiv(count, BLOCK),)
    calls = [
        lambda words=words: _write_kernel[grid](words, count, 7, BLOCK=BLOCK, num_warps=8) for words in memory
    ]
    return graph_time(calls, stream)
