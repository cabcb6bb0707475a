"""Encoding and appending on this CPU: `python benches/cpu_encode.py [--out FILE]`.

- encode: tile pairs (one of K, one of V) per second of `kvarn.encode`, from float32 tiles.
- seal: the same of a pool, whole tiles of one long step, from float16 rows.
- append: one token for each of 64 sequences, nothing sealed: µs a layer, step after step.
- append cold: the same, each step behind a read of 256 MB.
- fill: the same token fills a tile of every sequence: µs a layer.

Head dim 128. Encode and seal with and without refit, with one thread and with two; each number of threads in
a process of its own, as kvarn takes its threads once. Medians.
"""

import multiprocessing
import statistics
import sys

import kvarn
import numpy as np
import torch
from cpu import processor, tables
from cpu.timing import COLD_BYTES, seconds_of
from gpu.filled import FilledPool
from gpu.report import Report, parser
from gpu.shapes import PRESETS

HEAD_DIM, KV_HEADS = 128, 8
SEQUENCES, LAYERS = 64, 32
# Steps of append that are measured, and those before them, until caches hold what they can.
STEPS, WARM_STEPS = 40, 12


def pairs_per_s(preset, refit, pairs, runs):
    """Tile pairs per second of encode."""
    cfg = kvarn.Config(preset, head_dim=HEAD_DIM, refit=refit)
    torch.manual_seed(0)
    k, v = torch.randn(2, pairs, cfg.group, HEAD_DIM)
    kvarn.encode(k, v, cfg)
    return pairs / statistics.median(seconds_of(lambda: kvarn.encode(k, v, cfg)) for _ in range(runs))


def append_us(preset, length, sequences, layers, steps, warm_steps=0, cold=False):
    """Median µs of append in one layer, of one token for each sequence of `length` tokens.

    The first layer, which takes the step's pages and slots, is not measured.

    Args:
        steps: steps that are measured.
        warm_steps: steps before these.
        cold: read other memory before each step.
    """
    cfg = kvarn.Config(preset, head_dim=HEAD_DIM)
    filled = FilledPool(cfg, [length] * sequences, kv_heads=KV_HEADS, layers=1 + layers, device="cpu")
    k, v = filled.rows(sequences), filled.rows(sequences)
    # NumPy reads with one thread, and leaves none that looks for more work.
    other = np.ones(COLD_BYTES // 4, np.float32) if cold else np.ones(0)
    times = []
    for number in range(warm_steps + steps):
        step = filled.step(1)
        other.sum()
        step.append(0, k, v)
        for layer in range(1, 1 + layers):
            seconds = seconds_of(lambda step=step, layer=layer: step.append(layer, k, v))
            if number >= warm_steps:
                times.append(seconds)
        step.abandon()
    return statistics.median(times) * 1e6


def sealed_pairs_per_s(preset, refit, pairs, runs):
    """Tile pairs per second of append, of a step of whole tiles of one sequence without sinks."""
    cfg = kvarn.Config(preset, head_dim=HEAD_DIM, refit=refit, sink_tokens=0)
    tokens = pairs // KV_HEADS * cfg.group
    filled = FilledPool(cfg, [0], kv_heads=KV_HEADS, layers=1 + runs, room=tokens + cfg.group, device="cpu")
    k, v = filled.rows(tokens), filled.rows(tokens)
    step = filled.step(tokens)
    times = [seconds_of(lambda layer=layer: step.append(layer, k, v)) for layer in range(1 + runs)]
    step.abandon()
    return pairs / statistics.median(times[1:])


def encode_rows(report, processes, arguments, pairs):
    """Rows of encode and seal: the threads of a row beside each other."""
    kinds = {"encode": pairs_per_s, "seal": sealed_pairs_per_s}
    for kind, function in kinds.items():
        for preset in arguments.presets:
            for refit in (False, True):
                for threads, process in processes.items():
                    with report.part(f"{kind} {preset} refit {refit} threads {threads}"):
                        found = process.apply(function, (preset, refit, pairs, arguments.runs))
                        report.row(
                            f"{kind} {preset} refit {'on ' if refit else 'off'} threads {threads}: "
                            f"{found:.0f} pairs/s, {found / threads:.0f} a thread",
                            kind=kind,
                            preset=preset,
                            head_dim=HEAD_DIM,
                            refit=refit,
                            row_threads=threads,
                            pairs=pairs,
                            pairs_per_s=found,
                            pairs_per_s_and_thread=found / threads,
                        )


def append_row(report, processes, kind, preset, sequences, **settings):
    threads = max(processes)
    us = processes[threads].apply(append_us, (preset,), dict(settings, sequences=sequences))
    report.row(
        f"{kind} {preset} threads {threads}: a token of {sequences} sequences: {us:.1f} µs a layer",
        kind=kind,
        preset=preset,
        head_dim=HEAD_DIM,
        row_threads=threads,
        sequences=sequences,
        us=us,
    )


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--presets", nargs="+", default=PRESETS)
    arguments.add_argument("--append-preset", default="kvarn_k4v2_g128")
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, processor.THREADS])
    arguments.add_argument("--runs", type=int, default=7)
    arguments = arguments.parse_args()
    pairs, sequences = 512, SEQUENCES
    if arguments.small:
        pairs, sequences, arguments.runs = 8, 4, 2
        arguments.presets = arguments.presets[:1]
    neighbours = processor.Neighbours()
    report = Report(arguments, "cpu_encode.py", processor.name(), **processor.facts(max(arguments.threads)))
    context = multiprocessing.get_context("spawn")
    processes = {threads: context.Pool(1, processor.use_threads, (threads,)) for threads in arguments.threads}
    encode_rows(report, processes, arguments, pairs)
    group = kvarn.Config(arguments.append_preset, head_dim=HEAD_DIM).group
    steps, warm_steps, layers = (2, 1, 2) if arguments.small else (STEPS, WARM_STEPS, LAYERS)
    # Half a tile behind the sinks, or all of it but one token.
    half = {"length": group + group // 2, "layers": layers, "steps": steps}
    settings = {
        "append": dict(half, warm_steps=warm_steps),
        "append cold": dict(half, cold=True),
        "fill": {"length": 2 * group - 1, "layers": min(layers, 2), "steps": arguments.runs},
    }
    for kind, of_kind in settings.items():
        with report.part(kind):
            append_row(report, processes, kind, arguments.append_preset, sequences, **of_kind)
    for process in processes.values():
        process.close()
        process.join()
    tables.show(report, "cpu_encode", neighbours)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
