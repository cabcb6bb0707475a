"""Sequences that are saved, loaded, offloaded and restored on a GPU: `python tests/gpu/check_saved.py`.

Files of CPU and CUDA pools are read by both, and written again as the same bytes; attention over what was
loaded has the same bits as over what was saved. Offloading and restoring run on streams of their own, beside
work that wants the same pages, and around replays of a graph. Ends with times of long sequences.
"""

import io
import sys
import time
import traceback

import check
import kvarn
import torch

DEVICE = "cuda"
SHAPES = (
    {"d": 128, "g": 128, "bits": (4, 2), "kv": 2, "sinks": None, "recent": 0},
    {"d": 64, "g": 64, "bits": (3, 3), "kv": 1, "sinks": 16, "recent": 40},
    {"d": 96, "g": 64, "bits": (8, 8), "kv": 2, "sinks": 0, "recent": 0},
)


def saved(pool, sequence):
    file = io.BytesIO()
    pool.save(sequence, file)
    return file.getvalue()


def loaded(pool, data):
    return pool.load(io.BytesIO(data))


def forward(pool, sequences, counts, rows, hold=0, **options):
    """One finished step of the first rows of (k, v, q); what attention gave in each layer."""
    tokens = sum(counts)
    k, v, q = (x[:tokens] for x in rows)
    with pool.step(sequences, counts, hold, **options) as step:
        outputs = []
        for layer in range(len(pool.layers)):
            step.append(layer, k, v)
            outputs.append(step.attend(layer, q))
    return outputs


def same(counts, what, xs, ys):
    if not all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True)):
        counts.fail(f"saved: {what}: other bits")


def equal(counts, what, x, y):
    if x != y:
        where = next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
        counts.fail(f"saved: {what}: {len(x)} and {len(y)} bytes differ from byte {where} on")


def check_files(check):
    """CPU file to CUDA pool and back, and the other way, at many lengths; then both go on."""
    counts = check.COUNTS
    for shape in SHAPES:
        g = shape["g"]
        for length, hold in ((1, 0), (g, 0), (2 * g + 20, 7), (5 * g + 41, 0), (6 * g, 3)):
            made, other = (check.Twin(**shape, dtype=torch.float16, seed=length) for _ in range(2))
            noise = other.create()
            other.step([noise], [3 * g + 9], 0, group=4, compare=False)
            a = made.create()
            made.step([a], [length], hold, group=4, compare=False)
            cpu, gpu = made.sequences[a]
            for name, pool, sequence in (("CPU", made.cpu, cpu), ("CUDA", made.gpu, gpu)):
                data = saved(pool, sequence)
                there = loaded(other.gpu, data)
                here = loaded(other.cpu, data)
                text = f"{name} file of {length} tokens of {made.cfg}"
                equal(counts, text + ", by a CUDA pool", saved(other.gpu, there), data)
                equal(counts, text + ", by a CPU pool", saved(other.cpu, here), data)
                again = loaded(made.gpu, saved(other.cpu, here))
                rows = [made.normal(70, n, shape["d"]) for n in (shape["kv"], shape["kv"], 4 * shape["kv"])]
                outputs = [
                    forward(made.gpu, [gpu if name == "CUDA" else loaded(made.gpu, data)], [70], rows, 3),
                    forward(other.gpu, [there], [70], rows, 3),
                    forward(made.gpu, [again], [70], rows, 3),
                ]
                for others in outputs[1:]:
                    same(counts, text + ", attention", outputs[0], others)
                equal(counts, text + ", gone on", saved(other.gpu, there), saved(made.gpu, again))
                counts.cases += 1


def check_streams(check):
    """A stream that is busy offloads while another takes the pages; restoring on a third."""
    counts = check.COUNTS
    g = 64
    made = check.Twin(d=128, g=g, bits=(4, 2), kv=2, sinks=0, dtype=torch.float16, seed=51, pages=20, slots=8)
    pool = made.gpu
    a, b = pool.create(), pool.create()
    rows = [made.normal(15 * g + 3, n, 128) for n in (2, 2, 8)]
    forward(pool, [a], [15 * g + 3], rows)
    before = saved(pool, a)
    # The first offload pins memory, which the next ones use.
    pool.offload(a)
    pool.restore(a)
    out, back = torch.cuda.Stream(), torch.cuda.Stream()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    out.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(out):
        start.record()
        torch.cuda._sleep(600_000_000)
        stop.record()
        began = time.perf_counter()
        pool.offload(a)
        took = time.perf_counter() - began
    # Ten pages: five are free, the others are those that are still being copied.
    other = [made.normal(10 * g, n, 128) for n in (2, 2, 8)]
    forward(pool, [b], [10 * g], other)
    asleep = start.elapsed_time(stop) / 1e3
    print(f"  offload returned after {took * 1e3:.2f} ms, behind a stream busy for {asleep * 1e3:.0f} ms")
    if took > asleep / 2:
        counts.fail("saved: offload waits for the stream")
    equal(counts, "offloaded on a busy stream", saved(pool, a), before)
    try:
        pool.restore(a)
        counts.fail("saved: restored into a pool without room")
    except kvarn.CapacityError as error:
        if "15 pages with 10 free" not in str(error):
            counts.fail(f"saved: {error}")
    stats = pool.stats()
    if (stats.pages_used, stats.offloaded_sequences) != (10, 1):
        counts.fail(f"saved: {stats}")
    held = saved(pool, b)
    with torch.cuda.stream(out):
        out.wait_stream(torch.cuda.default_stream())
        torch.cuda._sleep(100_000_000)
        pool.offload(b)
    with torch.cuda.stream(back):
        pool.restore(a)
    torch.cuda.current_stream().wait_stream(back)
    new = [x[:3] for x in rows]
    other = check.Twin(d=128, g=g, bits=(4, 2), kv=2, sinks=0, dtype=torch.float16, seed=52).gpu
    expected = forward(other, [loaded(other, before)], [3], new)
    same(counts, "restored on another stream", forward(pool, [a], [3], new), expected)
    equal(counts, "offloaded behind another", saved(pool, b), held)
    counts.cases += 1


def check_replays(check):
    """A graph that was captured before goes on with a sequence that was away; no copy enters a capture."""
    counts = check.COUNTS
    made = check.Twin(d=128, g=64, bits=(4, 2), kv=2, dtype=torch.float16, seed=53)
    pool, stream = made.gpu, torch.cuda.Stream()
    a, noise = pool.create(), pool.create()
    rows = [made.normal(200, n, 128) for n in (2, 2, 8)]
    forward(pool, [a], [200], rows)
    b = pool.fork(a)
    torch.cuda.synchronize()
    arrays = pool.static_arrays([1], tokens=400)
    one = [x[:1] for x in rows]
    k, v, q = one

    def layers(step):
        outputs = []
        for layer in range(2):
            step.append(layer, k, v)
            outputs.append(step.attend(layer, q))
        return outputs

    with torch.cuda.stream(stream):
        warm = pool.step([a], [1], arrays=arrays)
        layers(warm)
        warm.abandon()
        graph = torch.cuda.CUDAGraph()
        step = pool.step([a], [1], arrays=arrays)
        with torch.cuda.graph(graph, stream=stream):
            out = layers(step)
            try:
                pool.offload(b)
                counts.fail("saved: offloaded during a capture")
            except kvarn.CudaError as error:
                if "during a capture" not in str(error):
                    counts.fail(f"saved: {error}")
        step.replay(graph)
        step.finish()
        for number in range(3):
            pool.offload(a)
            forward(pool, [noise], [70], rows)
            pool.restore(a)
            eager = forward(pool, [b], [1], one)
            if number == 0:
                # The fork is a step behind.
                eager = forward(pool, [b], [1], one)
            with pool.step([a], [1], arrays=arrays) as step:
                step.replay(graph)
            torch.cuda.synchronize()
            same(counts, f"replay {number} of a restored sequence", out, eager)
    counts.cases += 1


def check_times(check):
    """How long it takes to move 32 layers of 32 K tokens, whose pages lie together, and some that do not."""
    counts = check.COUNTS
    cfg = kvarn.Config("kvarn_k4v2_g128", head_dim=128)
    pool = kvarn.Pool(cfg, layers=32, kv_heads=8, pages=600, slots=16, device=DEVICE)
    k = torch.randn(32_768, 8, 128, device=DEVICE, dtype=torch.float16)
    together, one, two = pool.create(), pool.create(), pool.create()

    def append(sequences, tokens):
        with pool.step(sequences, [tokens] * len(sequences)) as step:
            for layer in range(32):
                step.append(layer, k[: tokens * len(sequences)], k[: tokens * len(sequences)])

    append([together], 32_768)
    for _ in range(64):
        append([one, two], 128)
    for name, sequence in (("together", together), ("every second page", one)):
        data = saved(pool, sequence)
        for number in range(3):
            torch.cuda.synchronize()
            marks = [time.perf_counter()]
            for move in (pool.offload, pool.restore):
                move(sequence)
                marks.append(time.perf_counter())
                torch.cuda.synchronize()
                marks.append(time.perf_counter())
            size = len(data) / 1e9
            out, back = marks[2] - marks[0], marks[4] - marks[2]
            kind = "pinned anew" if number == 0 else "again"
            print(
                f"  {name}, {size * 1e3:.0f} MB, {kind}: offload {size / out:.1f} GB/s "
                f"(returns after {(marks[1] - marks[0]) * 1e3:.1f} ms), restore {size / back:.1f} GB/s "
                f"(returns after {(marks[3] - marks[2]) * 1e3:.1f} ms)",
                flush=True,
            )
        equal(counts, f"times, {name}", saved(pool, sequence), data)
        counts.cases += 1


def main():
    """All parts. What fails is counted, and the others go on."""
    for part in (check_files, check_streams, check_replays, check_times):
        try:
            part(check)
            torch.cuda.synchronize()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            check.COUNTS.fail(f"saved: {part.__name__} raised")
        print(f"saved: {part.__name__} done", flush=True)
    print(f"{check.COUNTS.cases} cases, {check.COUNTS.failed} failed")
    sys.exit(check.COUNTS.failed > 0)


if __name__ == "__main__":
    main()
