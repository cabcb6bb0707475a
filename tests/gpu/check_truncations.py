"""Truncations into records on a GPU: `python tests/gpu/check_truncations.py`.

A cut writes to the slot what expansion gives of the record, to the bit, and no other byte; it agrees with
the CPU's cut of the same record to a rounding. Attention over what was cut is compared with float64 over what
is stored, as in check.py. Also: streams, captures and replays, a pool without a free slot, `KVarNCache.crop`,
and how long a cut takes.
"""

import sys
import time
import traceback

import check
import kvarn
import numpy as np
import torch

LAYERS = 2


def table(of):
    return np.from_dlpack(of).tolist()


def slots_of(pool, layer):
    """Bits of the slots [slots, kv_heads, 2, group, head_dim] of a layer."""
    return torch.from_dlpack(pool.slots[layer]).view(torch.int16)


def take_over(made):
    """The CPU pool gets the bytes of the CUDA pool: from here on both go on from the same."""
    torch.cuda.synchronize()
    for layer in range(LAYERS):
        slots_of(made.cpu, layer).copy_(slots_of(made.gpu, layer).cpu())
        here, there = (torch.from_dlpack(pool.pages[layer]) for pool in (made.cpu, made.gpu))
        here.copy_(there.cpu())


def check_cut(check, made, whole, length, sealed):
    """Cuts a fork in both pools; returns its place among the sequences."""
    counts, cfg = check.COUNTS, made.cfg
    fork = made.fork(whole)
    (cpu, gpu), (_, gpu_whole) = made.sequences[fork], made.sequences[whole]
    name = f"{cfg}, {sealed} sealed tiles, cut to {length}"
    slots = [slots_of(made.gpu, layer).clone() for layer in range(LAYERS)]
    pages = [torch.from_dlpack(made.gpu.pages[layer]).clone() for layer in range(LAYERS)]
    unsealed = made.gpu.stats().unsealed
    made.cpu.truncate(cpu, length)
    made.gpu.truncate(gpu, length)
    torch.cuda.synchronize()
    for attribute in ("length", "committed"):
        if getattr(cpu, attribute) != getattr(gpu, attribute):
            counts.fail(f"truncations: {name}: {attribute} differs")
    if (table(cpu.block_table), table(cpu.slot_table)) != (table(gpu.block_table), table(gpu.slot_table)):
        counts.fail(f"truncations: {name}: tables differ")
    tile, tokens = divmod(length, cfg.group)
    cut = tokens > 0 and tile < sealed
    decoded = cut and not (tile == 0 and cfg.sink_tokens)
    if made.gpu.stats().unsealed - unsealed != int(decoded):
        counts.fail(f"truncations: {name}: {made.gpu.stats()}")
    for layer in range(LAYERS):
        now = slots_of(made.gpu, layer)
        written = torch.zeros_like(now, dtype=torch.bool)
        if decoded:
            slot = table(gpu.slot_table)[tile]
            written[slot, :, :, :tokens] = True
            ours, theirs = (
                torch.from_dlpack(pool.slots[layer])[slot, :, :, :tokens].double().cpu()
                for pool in (made.gpu, made.cpu)
            )
            largest = theirs.abs().amax(-1, keepdim=True)
            tolerance = 2.0**-10 * theirs.abs() + 4e-5 * largest + 6e-8
            if not ((ours - theirs).abs() <= tolerance).all():
                worst = float(((ours - theirs).abs() / tolerance).max())
                counts.fail(f"truncations: {name}, layer {layer}: {worst:.2f} tolerances from the CPU")
            counts.vectors += ours.shape[0] * 2 * tokens
        if not torch.equal(now[~written], slots[layer][~written]):
            counts.fail(f"truncations: {name}, layer {layer}: other slots changed")
        if not torch.equal(torch.from_dlpack(made.gpu.pages[layer]), pages[layer]):
            counts.fail(f"truncations: {name}, layer {layer}: pages changed")
        if not cut or decoded:
            # What the slot holds is what expansion gives of the record: the same kernel, the same rounding.
            like = torch.empty(0, dtype=torch.float16, device=check.DEVICE)
            before = made.gpu.expand(gpu_whole, layer, rotated=True, like=like, count=length)
            after = made.gpu.expand(gpu, layer, rotated=True, like=like)
            if not all(torch.equal(x, y) for x, y in zip(before, after, strict=True)):
                counts.fail(f"truncations: {name}, layer {layer}: other bits than before the cut")
    counts.cases += 1
    return fork


def check_cuts(check):
    """Every kernel that decodes, cut in each tile; then the sequence goes on and seals again."""
    shapes = [
        {"d": d, "g": g, "bits": bits, "sinks": sinks, "recent": recent}
        for index, (d, g) in enumerate((d, g) for d in (128, 64, 96, 256) for g in (128, 64))
        for sinks, recent, bits in (
            (0, 0, check.PAIRS[index % 6]),
            (None, 40, check.PAIRS[(index + 2) % 6]),
            (16, 0, check.PAIRS[(index + 4) % 6]),
        )
    ]
    for index, shape in enumerate(shapes):
        g = shape["g"]
        dtype = (torch.float16, torch.bfloat16)[index % 2]
        made = check.Twin(**shape, kv=2, dtype=dtype, seed=60 + index, pages=24, slots=40)
        noise, whole = made.create(), made.create()
        made.step([noise], [g + 5], 0, group=4, compare=False, attend=False)
        made.step([whole], [4 * g + 21], 3, group=4, compare=False)
        take_over(made)
        sealed = sum(page >= 0 for page in table(made.sequences[whole][1].block_table))
        sealed += made.cfg.sink_tokens == g
        for length in (1, 17, g - 1, g, g + 1, 2 * g - 16, 2 * g + 64, 3 * g - 5, 4 * g + 20):
            fork = check_cut(check, made, whole, length, sealed)
            take_over(made)
            made.step([fork, noise], [3, 1], [1, 0], group=4)
            made.step([fork], [g], 0, group=4)
            made.step([fork, whole], [1, 0], 0, group=4)
            # And into what was sealed just now, once more.
            take_over(made)
            if length + 3 > g and length % g:
                again = made.fork(fork)
                for pool, sequence in zip((made.cpu, made.gpu), made.sequences[again], strict=True):
                    pool.truncate(sequence, length - length % g + 1)
                take_over(made)
                made.step([again], [2], 0, group=4)
                for pool, sequence in zip((made.cpu, made.gpu), made.sequences[again], strict=True):
                    pool.free(sequence)
            for pool, sequence in zip((made.cpu, made.gpu), made.sequences[fork], strict=True):
                pool.free(sequence)
        print(f"  {made.cfg}: done", flush=True)


def append(pool, sequences, counts, rows):
    with pool.step(sequences, counts) as step:
        for layer in range(len(pool.layers)):
            step.append(layer, *(x[: sum(counts)] for x in rows))


def check_streams(check):
    """A cut on a busy stream waits for what is before it there, and the host for neither."""
    counts = check.COUNTS
    made = check.Twin(d=128, g=64, bits=(4, 2), kv=2, sinks=0, dtype=torch.float16, seed=71, slots=8)
    pool, stream = made.gpu, torch.cuda.Stream()
    rows = [made.normal(300, 2, 128) for _ in range(2)]
    first, second = pool.create(), pool.create()
    # Loads and allocates.
    append(pool, [first], [300], rows)
    pool.truncate(first, 130)
    append(pool, [first], [1], rows)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(600_000_000)
        append(pool, [second], [300], rows)
        began = time.perf_counter()
        pool.truncate(second, 130)
        took = time.perf_counter() - began
        busy = not stream.query()
        append(pool, [second], [1], rows)
    stream.synchronize()
    print(f"  a cut on a busy stream returned after {took * 1e3:.2f} ms", flush=True)
    if not busy:
        counts.fail("truncations: the host waited for the stream")
    # The same without haste.
    third = pool.create()
    append(pool, [third], [300], rows)
    torch.cuda.synchronize()
    pool.truncate(third, 130)
    torch.cuda.synchronize()
    append(pool, [third], [1], rows)
    for layer in range(LAYERS):
        pairs = zip(pool.expand(second, layer), pool.expand(third, layer), strict=True)
        if not all(torch.equal(x, y) for x, y in pairs):
            counts.fail(f"truncations: layer {layer} differs on a busy stream")
    counts.cases += 1


def check_graphs(check):
    """A graph that was captured before goes on behind cuts; a cut into a record never enters a capture."""
    counts = check.COUNTS
    made = check.Twin(d=128, g=64, bits=(4, 2), kv=2, dtype=torch.float16, seed=73)
    pool, stream = made.gpu, torch.cuda.Stream()
    a = pool.create()
    append(pool, [a], [300], [made.normal(300, 2, 128) for _ in range(2)])
    torch.cuda.synchronize()
    arrays = pool.static_arrays([1], tokens=400)
    k, v, q = (made.normal(1, n, 128) for n in (2, 2, 8))

    def forward(step):
        outputs = []
        for layer in range(LAYERS):
            step.append(layer, k, v)
            outputs.append(step.attend(layer, q))
        return outputs

    with torch.cuda.stream(stream):
        warm = pool.step([a], [1], arrays=arrays)
        forward(warm)
        warm.abandon()
        other = pool.fork(a)
        graph = torch.cuda.CUDAGraph()
        step = pool.step([a], [1], arrays=arrays)
        with torch.cuda.graph(graph, stream=stream):
            out = forward(step)
            try:
                pool.truncate(other, 150)
                counts.fail("truncations: a record was cut during a capture")
            except kvarn.CudaError as error:
                if "a cut into a record during a capture" not in str(error):
                    counts.fail(f"truncations: {error}")
            # Between tiles it is only the tables.
            pool.truncate(other, 128)
        step.replay(graph)
        step.finish()
        for length in (299, 280, 200, 150, 70, 65, 40):
            pool.truncate(a, length)
            fork = pool.fork(a)
            with pool.step([fork], [1]) as step:
                eager = forward(step)
            pool.free(fork)
            with pool.step([a], [1], arrays=arrays) as step:
                step.replay(graph)
            torch.cuda.synchronize()
            if not all(torch.equal(x, y) for x, y in zip(out, eager, strict=True)):
                counts.fail(f"truncations: a replay behind a cut to {length} differs from an eager step")
    counts.cases += 1


def check_refusals(check):
    """Without a free slot, and with lengths that are none, nothing changes."""
    counts = check.COUNTS
    made = check.Twin(d=64, g=64, bits=(4, 4), kv=1, sinks=0, dtype=torch.float16, seed=75, slots=1)
    pool, sequence = made.gpu, made.gpu.create()
    append(pool, [sequence], [150], [made.normal(150, 1, 64) for _ in range(2)])

    def state():
        torch.cuda.synchronize()
        memory = [
            x
            for layer in range(LAYERS)
            for x in (slots_of(pool, layer), torch.from_dlpack(pool.pages[layer]))
        ]
        return str(pool.stats()), table(sequence.block_table), sequence.length, [x.clone() for x in memory]

    for length, error, text in (
        (100, kvarn.CapacityError, "expected a free slot for tile 1, which is sealed, with 0 of 1 free"),
        (151, kvarn.ShapeError, "expected at most its length, 150"),
        (-1, kvarn.ShapeError, "length -1: expected 0 or more"),
    ):
        before = state()
        try:
            pool.truncate(sequence, length)
            counts.fail(f"truncations: {length} was not refused")
        except error as raised:
            if text not in str(raised):
                counts.fail(f"truncations: {raised}")
        after = state()
        if before[:3] != after[:3] or not all(
            torch.equal(*pair) for pair in zip(before[3], after[3], strict=True)
        ):
            counts.fail(f"truncations: {length} was refused, and changed something")
    pool.truncate(sequence, 128)
    pool.truncate(sequence, 100)
    if pool.stats().unsealed != 1:
        counts.fail(f"truncations: {pool.stats()}")
    counts.cases += 1


def check_crop(check):
    """`KVarNCache.crop` into records: the fused attention against the decoded one, turn after turn."""
    from check_transformers import SHAPE, distance, generate
    from kvarn import KVarNCache
    from transformers import LlamaConfig, LlamaForCausalLM

    counts, total = check.COUNTS, 0
    for dtype, limit in ((torch.float16, 6e-3), (torch.bfloat16, 3e-2)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(check.DEVICE, dtype).eval()
        ids = torch.randint(2, 199, (2, 400), device=check.DEVICE)
        for sinks in (None, 16, 0):
            for length in (30, 64, 100, 191, 250):
                found = []
                for attention in ("kvarn", "sdpa"):
                    cache = KVarNCache(model.config, "kvarn_k8v8_g64", sink_tokens=sinks, hold=0)
                    generate(model, attention, cache, ids, torch.ones_like(ids), 4)
                    cache.crop(length - cache.get_seq_length())
                    prompt = torch.cat([ids[:, :length], ids[:, 300:370]], 1)
                    found.append(generate(model, attention, cache, prompt, torch.ones_like(prompt), 40))
                worst, steps = distance(*found)
                total += steps
                counts.cases += 1
                text = f"crop to {length}, {sinks} sinks, {dtype}: {worst:.1e}, {steps} steps"
                if worst > limit:
                    counts.fail(f"truncations: {text}")
                else:
                    print(f"  {text}", flush=True)
    # Where the best two tokens are level the two part early; seldom enough.
    if total < 30 * 8:
        counts.fail(f"truncations: {total} steps of 30 answers alike: expected eight each and more")


def check_times(check):
    """What a cut into a record costs, of 32 layers."""
    cfg = kvarn.Config("kvarn_k4v2_g128", head_dim=128)
    pool = kvarn.Pool(cfg, layers=32, kv_heads=8, pages=40, slots=16, device="cuda")
    sequence = pool.create()
    k = torch.randn(4096, 8, 128, device="cuda", dtype=torch.float16)
    append(pool, [sequence], [4096], (k, k))
    for length in (4095, 3951, 4000):
        host, device = [], []
        for _ in range(20):
            fork = pool.fork(sequence)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            began = time.perf_counter()
            pool.truncate(fork, length)
            host.append((time.perf_counter() - began) * 1e6)
            stop.record()
            torch.cuda.synchronize()
            device.append(start.elapsed_time(stop) * 1e3)
            pool.free(fork)
        print(
            f"  cut to {length} of 4096 tokens, 32 layers: {np.median(host):.0f} µs on the host, "
            f"{np.median(device):.0f} µs until it is done",
            flush=True,
        )
    check.COUNTS.cases += 1


PARTS = (check_cuts, check_streams, check_graphs, check_refusals, check_crop, check_times)


def main():
    """All parts. What fails is counted, and the others go on."""
    for part in PARTS:
        started = time.time()
        try:
            part(check)
            torch.cuda.synchronize()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            check.COUNTS.fail(f"truncations: {part.__name__} raised")
        print(f"truncations: {part.__name__} done in {time.time() - started:.1f} s", flush=True)
    status = check.COUNTS.finish()
    found = check.COUNTS
    print(f"{found.cases} cases, {found.vectors} vectors, {found.failed} failed")
    sys.exit(status)


if __name__ == "__main__":
    main()
