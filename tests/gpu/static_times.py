"""What check_static.py --times prints: ms of a decoding step in every way."""

import gc
import pathlib
import statistics
import sys
import time

import torch
from host_model import COUNTS, DEVICE
from kvarn import CapturedDecoder, KVarNCache, KVarNStaticCache
from transformers import DynamicCache, StaticCache

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benches" / "gpu"))

from caches import make_model
from generate import LLAMA_3_8B


def compile_anew(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, **options)


def median_ms(decode, warm=12, steps=40):
    """Median ms of a step, each waited for."""
    times = []
    for _ in range(warm + steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        decode()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[warm:])


def print_times(contexts, batches):
    """ms of a decoding step of a Llama-3-8B in every way, behind a random prompt."""
    model = make_model(LLAMA_3_8B, 2 * max(contexts), torch.bfloat16, DEVICE).requires_grad_(False)
    preset = "kvarn_k4v2_g128"

    def kvarn_cache(kind, room):
        model.set_attn_implementation("kvarn")
        return kind(model.config, preset, max_tokens=room)

    def dense_cache(kind, **options):
        model.set_attn_implementation("sdpa")
        return kind(config=model.config, **options)

    def plain(cache):
        return lambda ids: model(ids, past_key_values=cache).logits

    def compiled(cache, **options):
        step = compile_anew(model, **options)
        return lambda ids: step(ids, past_key_values=cache).logits

    overhead = {"mode": "reduce-overhead"}
    ways = {
        "DynamicCache, eager": (lambda room: dense_cache(DynamicCache), plain),
        "StaticCache, compiled, CUDA graphs": (
            lambda room: dense_cache(StaticCache, max_cache_len=room),
            lambda cache: compiled(cache, **overhead),
        ),
        "KVarNCache, eager": (lambda room: kvarn_cache(KVarNCache, room), plain),
        "KVarNStaticCache, compiled": (lambda room: kvarn_cache(KVarNStaticCache, room), compiled),
        "KVarNStaticCache, compiled, CUDA graphs": (
            lambda room: kvarn_cache(KVarNStaticCache, room),
            lambda cache: compiled(cache, **overhead),
        ),
        "CapturedDecoder": (
            lambda room: kvarn_cache(KVarNStaticCache, room),
            lambda cache: CapturedDecoder(model, cache),
        ),
        "CapturedDecoder, compiled": (
            lambda room: kvarn_cache(KVarNStaticCache, room),
            lambda cache: CapturedDecoder(compile_anew(model), cache),
        ),
    }
    for context in contexts:
        for batch in batches:
            prompt = torch.randint(1, 128000, (batch, context), device=DEVICE)
            for name, (make_cache, make_step) in ways.items():
                gc.collect()
                torch.cuda.empty_cache()
                try:
                    cache = make_cache(context + 100)
                    with torch.no_grad():
                        for chunk in prompt.split(2048, 1):
                            model(chunk, past_key_values=cache, logits_to_keep=1)
                        step = make_step(cache)
                        ids = prompt[:, :1].contiguous()
                        found = median_ms(lambda step=step, ids=ids: step(ids))
                    print(f"  {context} tokens, batch {batch}, {name}: {found:.2f} ms", flush=True)
                except Exception as error:
                    COUNTS.check(False, f"{context} tokens, batch {batch}, {name}: {error}")
                cache = step = None
