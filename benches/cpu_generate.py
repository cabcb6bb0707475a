"""Decode speed of whole models on this CPU: `python benches/cpu_generate.py [--out FILE]`.

KVarNCache under "kvarn" beside DynamicCache under "sdpa" (which copies its tensors at every step, as it does
for every user), with the same weights, the same random keys and values in both caches, and the same tokens.
No prompt is run. Both caches take turns of a few steps, the first of which is not counted: it meets what the
other cache left of memory and threads. Medians.

- smollm2: SmolLM2-135M-Instruct in float32 at 4,000 tokens.
- llama-1b: a Llama of the shape of Llama-3.2-1B with random weights at 16 K tokens, in float32 and bfloat16.
  What counts is the type in which DynamicCache is the faster one.
"""

import gc
import statistics
import sys
import time

import torch
from cpu import processor, tables
from gpu.caches import TINY, States, make_cache, make_model
from gpu.report import Report, parser
from kvarn.eval.memory import cache_bytes
from kvarn.models import load

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TURN = 5
IMPLEMENTATIONS = {"dynamic": "sdpa", "kvarn": "kvarn"}


def step_times(model, caches, tokens):
    """Seconds of each step of each cache, without the first of a turn. Turns are of TURN tokens."""
    times = {name: [] for name in caches}
    with torch.no_grad():
        for ids in tokens.split(TURN):
            for name, cache in caches.items():
                model.set_attn_implementation(IMPLEMENTATIONS[name])
                times[name] += [step_time(model, cache, token) for token in ids][1:]
    return times


def step_time(model, cache, token):
    start = time.perf_counter()
    logits = model(input_ids=token[None, None], past_key_values=cache, use_cache=True).logits
    logits[:, -1].argmax(-1)
    return time.perf_counter() - start


def model_rows(report, name, model, context, arguments):
    """A row for each cache."""
    steps = arguments.turns * TURN
    states = States(model, 1, context)
    caches = {cache: make_cache(cache, model, states, steps, arguments.preset) for cache in IMPLEMENTATIONS}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.config.vocab_size, (steps,), generator=generator)
    times = step_times(model, caches, tokens)
    if caches["kvarn"].materializations:
        raise RuntimeError(
            f"{caches['kvarn'].materializations} dense layers built: expected none under 'kvarn'"
        )
    speeds = {cache: 1 / statistics.median(taken) for cache, taken in times.items()}
    dtype = str(model.dtype).removeprefix("torch.")
    for cache, speed in speeds.items():
        held = cache_bytes(caches[cache]).total
        report.row(
            f"{name} {dtype}, {context} tokens, {cache}: {speed:.2f} tokens/s, cache {held / 1e6:.1f} MB",
            kind="decode",
            model=name,
            dtype=dtype,
            cache=cache,
            preset=arguments.preset if cache == "kvarn" else None,
            context=context,
            tokens_per_s=speed,
            cache_bytes=held,
            steps_ms=[seconds * 1e3 for seconds in times[cache]],
        )


def compare_row(report, name):
    """The caches in the type in which DynamicCache is the faster one."""
    speeds = {
        (row["dtype"], row["cache"]): row["tokens_per_s"]
        for row in report.rows
        if row["kind"] == "decode" and row["model"] == name
    }
    _, dtype = max((speed, dtype) for (dtype, cache), speed in speeds.items() if cache == "dynamic")
    times = speeds[dtype, "kvarn"] / speeds[dtype, "dynamic"]
    report.row(
        f"{name}: {times:.2f} × DynamicCache, in {dtype}",
        kind="compare",
        model=name,
        dtype=dtype,
        times=times,
    )


def random_llama(report, name, shape, context, arguments):
    model = make_model(shape, context + arguments.turns * TURN, torch.float32, "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        with report.part(f"{name} {dtype}"):
            model_rows(report, name, model, context, arguments)
        gc.collect()


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2", "llama-1b"])
    arguments.add_argument("--turns", type=int, default=4, help="turns of each cache")
    arguments.add_argument("--preset", default="kvarn_k4v2_g128")
    arguments.add_argument("--threads", type=int, default=processor.THREADS)
    arguments = arguments.parse_args()
    if arguments.small:
        arguments.models, arguments.turns = ["tiny"], 1
    processor.use_threads(arguments.threads)
    neighbours = processor.Neighbours()
    report = Report(arguments, "cpu_generate.py", processor.name(), **processor.facts(arguments.threads))
    torch.manual_seed(0)
    for name in arguments.models:
        with report.part(name):
            MODELS[name](report, arguments)
            compare_row(report, name)
        gc.collect()
    tables.show(report, "cpu_generate", neighbours)
    return report.close()


MODELS = {
    "smollm2": lambda report, arguments: model_rows(report, "smollm2", load().model, 4000, arguments),
    "llama-1b": lambda report, arguments: random_llama(report, "llama-1b", LLAMA_1B, 16384, arguments),
    "tiny": lambda report, arguments: random_llama(report, "tiny", TINY, 400, arguments),
}

if __name__ == "__main__":
    sys.exit(main())
