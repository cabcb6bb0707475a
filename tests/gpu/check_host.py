"""The host side of the CUDA backend, on a machine with a GPU: `python tests/gpu/check_host.py`.

Operators of torch, captured steps against eager ones, threads, streams, devices, borrowed memory, errors that
must come before a launch, and µs per call on the host. Every part runs even if another failed. Ends with
counts; the exit status is 1 if anything failed.
"""

import gc
import math
import statistics
import sys
import threading
import time
import traceback
import warnings
from functools import partial

import kvarn
import kvarn.torch_ops
import numpy as np
import torch
from host_model import COUNTS, DEVICE, Model, compare, same
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

# Host µs per call of append and of attend that a run must not exceed.
MOST_HOST_US = 10.0


def check_operators():
    """opcheck on CUDA; compiled models against eager ones."""
    model = Model()
    step, (q, k, v) = model.plan(), model.inputs[0]
    logits = torch.linspace(-1, 1, model.heads, device=DEVICE)
    for name in ("attend", "attend_lse"):
        op = getattr(torch.ops.kvarn, name).default
        for arguments in [(), (0.1, 40, 3.0, logits, True)]:
            torch.library.opcheck(op, (step.handle, 0, q, *arguments))
            COUNTS.checks += 1
    step.abandon()
    for util in ("test_schema", "test_autograd_registration", "test_faketensor"):
        step = model.plan()
        torch.library.opcheck(torch.ops.kvarn.append.default, (step.handle, 0, k, v), test_utils=util)
        step.abandon()
        COUNTS.checks += 1

    def forward(handle, *tensors):
        outputs = []
        for layer in range(len(tensors) // 3):
            q, k, v = tensors[3 * layer : 3 * layer + 3]
            before = torch.ops.kvarn.attend(handle, layer, q)
            torch.ops.kvarn.append(handle, layer, k, v)
            outputs += [before + q, *torch.ops.kvarn.attend_lse(handle, layer, q)]
        return outputs

    for backend in ("eager", "aot_eager", "inductor"):
        torch._dynamo.reset()
        model, twin = Model(seed=1), Model(seed=1)
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(forward, fullgraph=True, backend=counter)
        for index in range(8):
            model.refill()
            twin.refill()
            with torch.no_grad(), fresh_cache(), model.plan() as step, twin.plan() as other:
                found = compiled(step.handle, *(x for layer in model.inputs for x in layer))
                expected = forward(other.handle, *(x for layer in twin.inputs for x in layer))
            compare(f"compiled by {backend}, step {index}", [found], [expected])
        COUNTS.check(counter.frame_count == 1, f"{backend}: compiled {counter.frame_count} times")


def check_captured_step(*, d, ratio, name, batch, steps, check=False):
    """A step captured once and replayed, against the same steps without a graph."""
    shape = {"layers": 2, "batch": batch, "ratio": ratio, "d": d, "name": name, "pages": 256, "slots": 64}
    model, twin = Model(**shape, check=check), Model(**shape)
    arrays = model.static_arrays(tokens=600)
    expected = twin.run(2 + steps)
    model.refill()
    with model.plan(arrays) as step:
        found = [[x.clone() for x in model.forward(step)]]
    graph = torch.cuda.CUDAGraph()
    step = model.plan(arrays)
    with torch.cuda.graph(graph):
        outputs = model.forward(step)
    COUNTS.refused(kvarn.StateError, "call step.replay(graph)", step.finish)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for index in range(1 + steps):
        if index:
            step = model.plan(arrays)
        model.refill()
        for x in outputs:
            x.fill_(math.nan)
        # Now and then on another stream, which waits for the first and is waited for.
        stream = streams[index % 7 == 3]
        stream.wait_stream(streams[0])
        with torch.cuda.stream(stream):
            step.replay(graph)
        streams[0].wait_stream(stream)
        found.append([x.clone() for x in outputs])
        step.finish()
    compare(f"captured step, d {d}, {name}, batch {batch}", found, expected)
    for index, (a, b) in enumerate(zip(model.memory(), twin.memory(), strict=True)):
        # Pages as bytes, slots as halves.
        COUNTS.check(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"memory {index} differs at the end"
        )
    # The same arrays serve an eager step too.
    model.refill()
    twin.refill()
    with model.plan(arrays) as step, twin.plan() as other:
        compare("eager after replays", [model.forward(step)], [twin.forward(other)])
    print(f"  {steps} replays, d {d}, {name}, batch {batch}", flush=True)


def check_captured_steps():
    check_captured_step(d=128, ratio=4, name="kvarn_k4v2_g64", batch=3, steps=320)
    check_captured_step(d=64, ratio=2, name="kvarn_k4v4_g128", batch=17, steps=140)
    check_captured_step(d=128, ratio=8, name="kvarn_k4v2_g128", batch=1, steps=140)
    check_captured_step(d=128, ratio=4, name="kvarn_k4v2_g64", batch=2, steps=70, check=True)


def check_capture_refused():
    """What cannot be captured is told, and nothing is launched."""
    model = Model()
    q, k, v = model.inputs[0]

    def captured(step, call):
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the graph stays empty
            with torch.cuda.graph(graph):
                COUNTS.refused(kvarn.CudaError, "during a capture", lambda: call(step))
        step.abandon()

    captured(model.plan(), lambda step: step.attend(0, q))
    captured(model.plan(), lambda step: step.append(0, k, v))
    arrays = model.static_arrays(tokens=300)
    captured(model.plan(arrays), lambda step: step.attend(0, q))
    captured(model.plan(arrays), lambda step: step.append(0, k, v))
    COUNTS.refused(kvarn.StateError, "a step without what a graph reads", lambda: model.plan().replay(None))
    gc.collect()
    with model.plan(arrays) as step:
        model.forward(step)
        COUNTS.refused(kvarn.StateError, "an open step uses", lambda: model.plan(arrays))
    short = model.static_arrays(tokens=100)
    COUNTS.refused(kvarn.ShapeError, "with static arrays: expected at most 100", lambda: model.plan(short))
    # And everything goes on.
    with model.plan() as step:
        outputs = model.forward(step)
    COUNTS.check(all(bool(torch.isfinite(x).all()) for x in outputs), "a step after refused captures")


def check_threads():
    """Threads with pools and streams of their own, against the same work alone."""
    shapes = [{"seed": seed, "batch": 1 + seed} for seed in range(4)]
    expected = [Model(**shape).run(30) for shape in shapes]
    found, errors = [None] * len(shapes), []

    def work(index):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                found[index] = Model(**shapes[index]).run(30)
                torch.cuda.current_stream().synchronize()
        except Exception:
            errors.append(traceback.format_exc())

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(shapes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    COUNTS.check(not errors, f"threads: {errors}")
    for index in range(len(shapes)):
        if found[index] is not None:
            compare(f"thread {index}", found[index], expected[index])


def check_one_pool_of_several_threads():
    """Threads that take steps of one pool, each with its own sequence."""
    model = Model(batch=4, pages=256)
    twin = Model(batch=4, pages=256)
    rows = [[model.normal(1, heads) for heads in (8, 2, 2)] for _ in range(40)]
    found, errors = [[] for _ in range(4)], []

    def steps(of, index, outputs):
        for q, k, v in rows:
            with of.pool.step([of.sequences[index]], [1]) as step:
                for layer in range(of.layers):
                    step.append(layer, k, v)
                    outputs.append(step.attend(layer, q))

    def work(index):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                steps(model, index, found[index])
                torch.cuda.current_stream().synchronize()
        except Exception:
            errors.append(traceback.format_exc())

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    COUNTS.check(not errors, f"threads of one pool: {errors}")
    for index in range(4):
        expected = []
        steps(twin, index, expected)
        compare(f"one pool, thread {index}", [found[index]], [expected])


def check_streams():
    """Layers of one step on two streams in turn, against one stream."""
    model, twin = Model(seed=5), Model(seed=5)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for index in range(60):
        model.refill()
        twin.refill()
        torch.cuda.synchronize()
        found = []
        with model.plan() as step:
            for layer, (q, k, v) in enumerate(model.inputs):
                one, other = (first, second) if layer % 2 == 0 else (second, first)
                with torch.cuda.stream(one):
                    step.append(layer, k, v)
                other.wait_stream(one)
                with torch.cuda.stream(other):
                    found.append(step.attend(layer, q))
                one.wait_stream(other)
        torch.cuda.synchronize()
        with twin.plan() as step:
            expected = []
            for layer, (q, k, v) in enumerate(twin.inputs):
                step.append(layer, k, v)
                expected.append(step.attend(layer, q))
        compare(f"two streams, step {index}", [found], [expected])


def check_devices():
    """Pools of every device, from a thread whose current device is the first."""
    count = torch.cuda.device_count()
    expected = Model(seed=6).run(5)
    for index in range(count):
        for device in (f"cuda:{index}", torch.device("cuda", index)):
            model = Model(seed=6, device=device)
            COUNTS.check(model.pool.device == f"cuda:{index}", f"{model.pool.device} of {device}")
            if index == 0:
                compare(str(device), model.run(5), expected)
                continue
            # Random numbers of another device are the same; its streams are others.
            with torch.cuda.stream(torch.cuda.Stream(index)):
                compare(str(device), model.run(5), expected)
            torch.cuda.synchronize(index)
            q = torch.zeros(model.batch, model.heads, model.d, device="cuda:0", dtype=torch.float16)
            step = model.plan()
            COUNTS.refused(kvarn.DeviceError, "device cuda:0", lambda step=step, q=q: step.attend(0, q))
    COUNTS.refused(kvarn.CudaUnavailableError, f"cuda:{count}", lambda: Model(device=f"cuda:{count}"))
    print(f"  {count} devices", flush=True)


def check_borrowed():
    """A pool in tensors of torch, against one with its own memory."""
    twin = Model(seed=7)
    pages = [memory.shape for memory in twin.pool.pages]
    slots = [memory.shape for memory in twin.pool.slots]
    page_bytes, slot_elements = sum(math.prod(s) for s in pages), sum(math.prod(s) for s in slots)

    def memory(extra=0):
        first = torch.full((page_bytes + extra,), 0xFF, dtype=torch.uint8, device=DEVICE)
        return first, torch.full((slot_elements,), math.nan, dtype=torch.float16, device=DEVICE)

    given = memory()
    address = given[0].data_ptr()
    model = Model(seed=7, memory=given)
    COUNTS.check(torch.from_dlpack(model.pool.pages[0]).data_ptr() == address, "pages are the tensor's")
    del given
    gc.collect()
    rubbish = [torch.full((page_bytes,), 0xAA, dtype=torch.uint8, device=DEVICE) for _ in range(4)]
    compare("borrowed memory", model.run(70), twin.run(70))
    del rubbish
    a, b = memory()
    for text, wrong in {
        f"of {page_bytes + 1} bytes: expected {page_bytes} bytes": memory(1),
        "expected a multiple of 128": (memory(64)[0][64:], b),
        "memory for pages of dtype float16: expected uint8": (b, b),
        "memory for slots of dtype bfloat16: expected float16": (a, b.bfloat16()),
    }.items():
        error = kvarn.DTypeError if "dtype" in text else kvarn.ShapeError
        COUNTS.refused(error, text, lambda wrong=wrong: Model(seed=7, memory=wrong))
    COUNTS.refused(
        kvarn.ShapeError, "a contiguous output", lambda: Model(memory=(memory(page_bytes)[0][::2], b))
    )
    COUNTS.refused(kvarn.DeviceError, "device cpu", lambda: Model(memory=(a.cpu(), b)))


def check_out_of_memory():
    """More memory than there is: the step is refused, nothing is lost, and a smaller one goes on."""
    free, total = torch.cuda.mem_get_info()
    cfg = kvarn.Config("kvarn_k4v2_g128", head_dim=128)
    pages = int(1.2 * total) // (8 * cfg.record_bytes)
    pool = kvarn.Pool(cfg, layers=1, kv_heads=8, pages=pages, slots=8, device=DEVICE)
    sequence = pool.create()
    too_long = [pages * 128]
    for _ in range(2):
        COUNTS.refused(
            kvarn.CapacityError, "bytes of pages on cuda:0", partial(pool.step, [sequence], too_long)
        )
    after = torch.cuda.mem_get_info()[0]
    COUNTS.check(after > free - (64 << 20), f"{free - after} bytes were lost")
    stats = pool.stats()
    COUNTS.check((stats.open_steps, stats.pages_used, sequence.length) == (0, 0, 0), f"{stats} afterwards")
    rows = torch.randn(300, 8, 128, device=DEVICE).half()
    with pool.step([sequence], [300]) as step:
        step.append(0, rows, rows)
        out = step.attend(0, rows)
    COUNTS.check(bool(torch.isfinite(out).all()), "a step after a refused one")
    del pool, step, sequence
    gc.collect()


def check_nan():
    """A NaN in one head stays there, in a captured step too."""
    model, twin = Model(seed=8), Model(seed=8)
    arrays = model.static_arrays(tokens=400)
    graph = torch.cuda.CUDAGraph()
    with model.plan(arrays) as step:
        model.forward(step)
    with twin.plan() as step:
        twin.forward(step)
    step = model.plan(arrays)
    with torch.cuda.graph(graph):
        outputs = model.forward(step)
    for index in range(70):
        model.refill()
        twin.refill()
        if index == 3:
            model.inputs[0][1][1, 0, 7] = math.nan  # K of the second sequence, first KV head
            model.inputs[0][2][1, 0, 9] = math.inf
        if index:
            step = model.plan(arrays)
        step.replay(graph)
        step.finish()
        with twin.plan() as other:
            expected = twin.forward(other)
        group = model.heads // model.kv
        for a, b in zip(outputs, expected, strict=True):
            COUNTS.check(same(a[:, group:], b[:, group:]), f"NaN step {index}: another head changed")
            COUNTS.check(same(a[0], b[0]) and same(a[2], b[2]), f"NaN step {index}: another row changed")
        COUNTS.check(bool(torch.isfinite(outputs[2]).all()), f"NaN step {index}: output is not finite")
    # Stored as a zero, and counted once.
    COUNTS.check(model.pool.stats().non_finite == 2, f"{model.pool.stats().non_finite} counted: expected 2")


def check_large_slots():
    """Slots beyond 2^31 bytes: many sequences of one token, whose attention is its value."""
    cfg = kvarn.Config("kvarn_k4v2_g128", head_dim=128)
    count = 4400
    pool = kvarn.Pool(cfg, layers=1, kv_heads=8, pages=8, slots=2 * count, device=DEVICE)
    sequences = [pool.create() for _ in range(count)]
    q, k, v = (torch.randn(count, heads, 128, device=DEVICE).half() for heads in (16, 8, 8))
    with pool.step(sequences, [1] * count) as step:
        step.append(0, k, v)
        out = step.attend(0, q)
        last = int(np.from_dlpack(step.slot_table).max())
    place = last * 8 * 2 * 128 * 128 * 2
    expected = v.float().repeat_interleave(2, 1)
    error = float(((out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    COUNTS.check(place >= 2**31 and error < 2e-3, f"slot {last} at byte {place}: error {error:.1e}")
    print(f"  slot {last} at byte {place}, error {error:.1e}", flush=True)


def check_large_pages():
    """Pages beyond 2^31 bytes, filled in a captured step's pool: the last tile is read back."""
    cfg = kvarn.Config("kvarn_k4v2_g64", head_dim=128, sink_tokens=0)
    pages = 2_200_000_000 // (8 * cfg.record_bytes)
    pool = kvarn.Pool(cfg, layers=1, kv_heads=8, pages=pages + 8, slots=8, device=DEVICE)
    filler, last = pool.create(), pool.create()
    rows = torch.randn(64 * 512, 8, 128, device=DEVICE).half()
    left = pages
    while left > 0:
        n = 64 * min(left, 512)
        with pool.step([filler], [n]) as step:
            step.append(0, rows[:n], rows[:n])
        left -= 512
    arrays = pool.static_arrays([1], tokens=200)
    graph, outputs = torch.cuda.CUDAGraph(), []
    q, k, v = (torch.zeros(1, heads, 128, device=DEVICE, dtype=torch.float16) for heads in (16, 8, 8))
    values = torch.randn(130, 8, 128, device=DEVICE).half()
    for index in range(130):
        v.copy_(values[index : index + 1])
        with pool.step([last], [1], arrays=arrays) as step:
            if index == 0:
                step.append(0, k, v)
                step.attend(0, q)
                continue
            if index == 1:
                with torch.cuda.graph(graph):
                    step.append(0, k, v)
                    outputs.append(step.attend(0, q))
            step.replay(graph)
    page = int(np.from_dlpack(last.block_table).max())
    # Keys and queries are zero: attention is the mean of the values, which are stored in 2 bits.
    expected = values.float().mean(0).repeat_interleave(2, 0)
    stored = pool.expand(last, 0)[1].float().mean(0).repeat_interleave(2, 0)
    error = float((outputs[0][0].float() - stored).abs().max())
    place = page * 8 * cfg.record_bytes
    COUNTS.check(place >= 2**31 and error < 2e-3, f"page {page} at byte {place}: error {error:.1e}")
    far = float((stored - expected).norm() / expected.norm())
    COUNTS.check(far < 0.7, f"page {page}: stored values are {far:.2f} off")
    print(f"  page {page} at byte {place}, error {error:.1e}, quantisation {far:.2f}", flush=True)


def median_us(call, arguments):
    """Median µs on the host of calls that are not waited for."""
    times = []
    for given in arguments:
        start = time.perf_counter()
        call(*given)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def host_figures(model, rounds=30):
    """Median host µs of calls and of steps; the device is waited for between steps only."""
    layers, (q, k, v) = model.layers, model.inputs[0]
    ops = torch.ops.kvarn
    names = ("plan", "append", "attend", "attend to new", "op append", "op attend", "send", "replay")
    out = torch.empty_like(q)
    figures = {name: [] for name in names}
    for index in range(rounds):
        start = time.perf_counter()
        step = model.plan()
        figures["plan"].append((time.perf_counter() - start) * 1e6)
        if index % 2:
            figures["append"].append(median_us(step.append, [(n, k, v) for n in range(layers)]))
            given = [(n, q, None, None, None, None, False, False, out) for n in range(layers)]
            figures["attend"].append(median_us(step.attend, given))
            figures["attend to new"].append(median_us(step.attend, [(n, q) for n in range(layers)]))
        else:
            h = step.handle
            figures["op append"].append(median_us(ops.append, [(h, n, k, v) for n in range(layers)]))
            figures["op attend"].append(median_us(ops.attend, [(h, n, q) for n in range(layers)]))
        torch.cuda.synchronize()
        step.finish()

    def forward(step):
        for layer in range(layers):
            step.append(layer, k, v)
            step.attend(layer, q)

    arrays, graph = model.static_arrays(tokens=600), torch.cuda.CUDAGraph()
    with model.plan(arrays) as step:
        forward(step)
    step = model.plan(arrays)
    with torch.cuda.graph(graph):
        forward(step)
    for index in range(rounds):
        if index:
            step = model.plan(arrays)
        torch.cuda.synchronize()
        figures["send"].append(median_us(step._step.send, [(torch.cuda.current_stream().cuda_stream,)]))
        figures["replay"].append(median_us(step.replay, [(graph,)]))
        torch.cuda.synchronize()
        step.finish()
    return {name: statistics.median(times) for name, times in figures.items()}


def check_host_time():
    """Host µs per call of append and attend, with and without a graph."""
    layers = 32
    for batch in (1, 8, 64):
        model = Model(
            layers=layers, batch=batch, kv=8, name="kvarn_k4v2_g128", pages=512, slots=4 * batch + 8
        )
        us = host_figures(model)
        print(
            f"  host µs, batch {batch}: append {us['append']:.1f}, attend {us['attend']:.1f} "
            f"({us['attend to new']:.1f} with the allocation of its output), "
            f"as operators {us['op append']:.1f} and {us['op attend']:.1f}; a step: plan {us['plan']:.1f}, "
            f"sending its arrays {us['send']:.1f}, replay of {layers} layers {us['replay']:.1f} "
            f"({us['replay'] / layers:.2f} a layer)",
            flush=True,
        )
        for name in ("append", "attend"):
            text = f"host time of {name}, batch {batch}: {us[name]:.1f} µs"
            COUNTS.check(us[name] <= MOST_HOST_US, f"{text}: expected at most {MOST_HOST_US}")


PARTS = (
    check_operators,
    check_captured_steps,
    check_capture_refused,
    check_threads,
    check_one_pool_of_several_threads,
    check_streams,
    check_devices,
    check_borrowed,
    check_nan,
    check_large_slots,
    check_large_pages,
    check_host_time,
    check_out_of_memory,
)


def main():
    print(
        f"kvarn {kvarn.__version__}, torch {torch.__version__} on {torch.cuda.get_device_name()}", flush=True
    )
    kvarn.warmup(DEVICE)
    chosen = sys.argv[1:]
    for part in PARTS:
        name = part.__name__.removeprefix("check_")
        if chosen and name not in chosen:
            continue
        started = time.time()
        try:
            part()
            torch.cuda.synchronize()
        except Exception:
            traceback.print_exc()
            COUNTS.check(False, f"{name}: an exception")
        COUNTS.parts += 1
        print(f"{name}: {time.time() - started:.1f} s", flush=True)
        gc.collect()
    print(f"{COUNTS.parts} parts, {COUNTS.checks} checks, {COUNTS.failed} failed")
    sys.exit(COUNTS.failed > 0)


if __name__ == "__main__":
    main()
