"""A whole layer step, append and then attend: `python benches/gpu/layer.py [--out FILE]`.

One new token for each sequence, as a decode step makes it; both launches of a layer in a graph, and each of
them alone. Then what the host spends on a call through Python, and on opening and finishing a step.
"""

import statistics
import sys
import time

import kvarn
import torch
from codec import append_time
from filled import FilledPool
from report import Report, parser
from shapes import Shape, bytes_to_read
from timing import REPLAYS, cold_copies, graph_time, host_time, plain_read_time

SHAPES = [
    Shape(32, 8, 128, batch, context)
    for context, batch in (
        (4096, 1),
        (32768, 1),
        (131072, 1),
        (4096, 32),
        (32768, 8),
        (32768, 32),
        (131072, 32),
    )
]
HOST_LAYERS = 128


def layer_row(report, preset, shape, stream, replays):
    cfg = kvarn.Config(preset, head_dim=shape.head_dim)
    sizes = {"kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    must = bytes_to_read(
        [shape.tokens] * shape.batch,
        group=cfg.group,
        sink_tokens=cfg.sink_tokens,
        record_bytes=cfg.record_bytes,
        **sizes,
    )
    # The first layer carries the step's uploads and is not measured.
    layers = 1 + cold_copies(must)
    with torch.cuda.stream(stream):
        filled = FilledPool(cfg, [shape.tokens - 1] * shape.batch, kv_heads=shape.kv_heads, layers=layers)
        k, v = filled.rows(shape.batch), filled.rows(shape.batch)
        q = torch.randn(shape.batch, shape.heads, shape.head_dim, device="cuda", dtype=torch.float16)
        append_us = append_time(filled, 1, stream, replays)
        step = filled.step(1, captured=True)

        def both(layer):
            step.append(layer, k, v)
            step.attend(layer, q)

        both(0)
        measured = range(1, layers)
        both_us = graph_time(
            [lambda layer=layer: both(layer) for layer in measured], stream, replays=replays, warm=False
        )
        step.abandon()
        step = filled.step(1, captured=True)
        for layer in range(layers):
            step.append(layer, k, v)
        attend_us = graph_time(
            [lambda layer=layer: step.attend(layer, q) for layer in measured], stream, replays=replays
        )
        step.abandon()
    plain = plain_read_time(must, stream)
    report.row(
        f"{preset} {shape}: append + attend {both_us:.1f} µs, attend {attend_us:.1f}, "
        f"append {append_us:.1f}; plain read {plain:.1f} µs, {plain / both_us:.2f} of it",
        kind="layer",
        preset=preset,
        **vars(shape),
        both_us=both_us,
        attend_us=attend_us,
        append_us=append_us,
        bytes=must,
        plain_read_us=plain,
        of_plain_read=plain / both_us,
    )


def host_row(report, preset, batch, stream, repeats):
    """What the host spends on each call; a short context, so that the device never holds it up.

    Outputs are allocated before.
    """
    cfg = kvarn.Config(preset, head_dim=128)
    spent = {"step": [], "append": [], "attend": [], "finish": []}

    def timed(name, call):
        start = time.perf_counter()
        result = call()
        spent[name].append((time.perf_counter() - start) * 1e6)
        return result

    with torch.cuda.stream(stream):
        filled = FilledPool(cfg, [600] * batch, kv_heads=8, layers=HOST_LAYERS)
        k, v = filled.rows(batch), filled.rows(batch)
        q = torch.randn(batch, 32, 128, device="cuda", dtype=torch.float16)
        out = torch.empty_like(q)
        first = {"append": [], "attend": []}
        for _ in range(repeats):
            step = timed("step", lambda: filled.step(1))
            for layer in range(HOST_LAYERS):
                timed("append", lambda layer=layer, step=step: step.append(layer, k, v))
                timed("attend", lambda layer=layer, step=step: step.attend(layer, q, out=out))
                if layer == 0:
                    # Plans and uploads of the step; told apart from the other layers.
                    for name in first:
                        first[name].append(spent[name].pop())
            timed("finish", step.finish)
            torch.cuda.synchronize()
        with filled.step(1) as step:
            for layer in range(HOST_LAYERS):
                step.append(layer, k, v)
            empty_us = host_time(lambda: torch.empty_like(q))
            torch_us = host_time(lambda: torch.add(q, q, out=out))
    us = {name: statistics.median(times) for name, times in spent.items()}
    first_us = {f"first_{name}": statistics.median(times) for name, times in first.items()}
    report.row(
        f"host {preset} batch {batch}: append {us['append']:.1f} µs, attend {us['attend']:.1f}; first layer "
        f"{first_us['first_append']:.1f} and {first_us['first_attend']:.1f}; step {us['step']:.1f}, finish "
        f"{us['finish']:.1f}; beside it torch.add {torch_us:.1f}, torch.empty_like {empty_us:.1f}",
        kind="host",
        preset=preset,
        batch=batch,
        **us,
        **first_us,
        torch_add=torch_us,
        torch_empty_like=empty_us,
    )


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--presets", nargs="+", default=["kvarn_k4v2_g128"])
    arguments = arguments.parse_args()
    report = Report(arguments, "gpu/layer.py")
    kvarn.warmup()
    stream = torch.cuda.Stream()
    small = arguments.small
    replays = 10 if small else REPLAYS
    for preset in arguments.presets:
        for shape in SHAPES[:1] if small else SHAPES:
            with report.part(f"{preset} {shape}"):
                layer_row(report, preset, shape, stream, replays)
        for batch in (1,) if small else (1, 8, 32, 64):
            with report.part(f"host {preset} batch {batch}"):
                host_row(report, preset, batch, stream, repeats=3 if small else 10)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
