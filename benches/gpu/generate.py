"""Decode speed of a whole model: `python benches/gpu/generate.py [--out FILE]`.

A transformers Llama of the shape of Llama-3-8B with random weights, decoding one token at a time for every
sequence: tokens per second with KVarNCache under "kvarn", with DynamicCache under "sdpa" (which copies its
tensors at every step, as it does for every user) and with StaticCache under "sdpa" (which does not). The
last can be replayed from a CUDA graph, as KVarNStaticCache can by CapturedDecoder; a DynamicCache cannot.
All caches are given the same random keys and values, without running a prompt through the model, and decode
the same tokens. Medians of steps on the clock of the host, each waited for; `host` is how long the host was
busy with a step before it waited: where it is nearly the whole step, Python is what is measured, not the
cache.
"""

import contextlib
import gc
import statistics
import sys
import time

import torch
from caches import TINY, States, make_cache, make_model
from kvarn.eval.memory import cache_bytes
from report import Report, parser
from steps import CapturedStatic, captured, eager
from torch.nn.attention import SDPBackend, sdpa_kernel

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
WARM_STEPS = 4
# Kind of the cache, and what runs a step. The peers come first, so that kvarn's rows can name the ratios.
CACHES = {
    "dynamic": ("dynamic", eager),
    "dynamic-flash": ("dynamic", eager),
    "static": ("static", eager),
    "static-graph": ("static", CapturedStatic),
    "kvarn": ("kvarn", eager),
    "kvarn-graph": ("kvarn-static", captured),
}
# torch's cuDNN backend prepares itself anew for every length that it has not seen: at every step of a cache
# that grows.
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def decode(step, tokens):
    """Feed tokens [steps, batch] one by one to a step of `steps`.

    Returns:
        Seconds of each step, seconds that the host was busy in each, and the logits of the first.
    """
    whole, host, logits = [], [], None
    with torch.no_grad():
        for ids in tokens:
            synchronize(ids.device)
            start = time.perf_counter()
            out = step(ids[:, None])
            out[:, -1].argmax(-1)
            host.append(time.perf_counter() - start)
            synchronize(ids.device)
            whole.append(time.perf_counter() - start)
            if logits is None:
                logits = out[:, -1].float()
    return whole, host, logits


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def pool_bytes(cache):
    """Device memory of a pool, which torch does not count."""
    pool = getattr(cache, "pool", None)
    return getattr(getattr(pool, "_pool", None), "provided_bytes", 0)


def cache_row(report, name, model, batch, context, steps, preset, dense):
    """Time one cache; `dense` collects the tokens per second of the others."""
    cuda = model.device.type == "cuda"
    began = time.perf_counter()
    states = States(model, batch, context)
    kind, stepper = CACHES[name]
    cache = make_cache(kind, model, states, steps + WARM_STEPS, preset)
    synchronize(model.device)
    filled_s = time.perf_counter() - began
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.config.vocab_size, (steps + WARM_STEPS, batch), generator=generator)
    with sdpa_kernel(WITHOUT_CUDNN) if name == "dynamic-flash" else contextlib.nullcontext():
        whole, host, logits = decode(stepper(model, cache), tokens.to(model.device))
    step_s, host_s = (statistics.median(times[WARM_STEPS:]) for times in (whole, host))
    speed = batch / step_s
    peak = (torch.cuda.max_memory_allocated() if cuda else 0) + pool_bytes(cache)
    held = cache_bytes(cache).total
    values = {}
    if not kind.startswith("kvarn"):
        dense[name] = speed, logits
    else:
        if cache.materializations:
            raise RuntimeError(f"{cache.materializations} dense layers built: expected none under 'kvarn'")
        values["times"] = {other: speed / others for other, (others, _) in dense.items()}
        values["logits_distance"] = {
            other: float((logits - others).norm() / others.norm()) for other, (_, others) in dense.items()
        }
    beside = ", ".join(f"{ratio:.2f} × {other}" for other, ratio in values.get("times", {}).items())
    report.row(
        f"{context} tokens, batch {batch}, {name:13}: {speed:8.1f} tokens/s, step {step_s * 1e3:.2f} ms "
        f"(slowest {max(whole[WARM_STEPS:]) * 1e3:.2f}), host {host_s * 1e3:.2f} ms, cache "
        f"{held / 1e9:.2f} GB, peak {peak / 1e9:.1f} GB, filled in {filled_s:.1f} s"
        + (f"; {beside}" if beside else ""),
        cache=name,
        preset=preset if kind.startswith("kvarn") else None,
        context=context,
        batch=batch,
        tokens_per_s=speed,
        step_ms=step_s * 1e3,
        host_ms=host_s * 1e3,
        steps_ms=[seconds * 1e3 for seconds in whole],
        cache_bytes=held,
        peak_bytes=peak,
        **values,
    )


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768, 131072])
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    arguments.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    arguments.add_argument("--steps", type=int, default=24)
    arguments.add_argument("--preset", default="kvarn_k4v2_g128")
    arguments.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    arguments = arguments.parse_args()
    report = Report(arguments, "gpu/generate.py")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = arguments.small
    contexts, batches = ([700], [1, 2]) if small else (arguments.contexts, arguments.batches)
    dtype = torch.float32 if device == "cpu" else getattr(torch, arguments.dtype)
    longest = max(contexts) + arguments.steps + WARM_STEPS
    model = make_model(TINY if small else LLAMA_3_8B, longest, dtype, device)
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(f"{size / 1e9:.2f} GB of weights, {dtype}", flush=True)
    for context in contexts:
        for batch in batches:
            dense = {}
            for name in (name for name in CACHES if name in arguments.caches):
                if name.endswith("-graph") and device == "cpu":
                    report.miss(name, "CPUs have no CUDA graphs")
                    continue
                with report.part(f"{context} tokens, batch {batch}, {name}"):
                    try:
                        cache_row(
                            report, name, model, batch, context, arguments.steps, arguments.preset, dense
                        )
                    except torch.OutOfMemoryError as error:
                        report.miss(name, f"{context} tokens, batch {batch}: {error}")
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
