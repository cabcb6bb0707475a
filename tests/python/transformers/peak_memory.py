"""Peak memory while generating, beside what the capacity figure says.

`python tests/python/transformers/peak_memory.py [--device cuda]` generates behind a long prompt, prefilled in
chunks, and prints what the process, or the GPU, held at most more than while it generated with a cache that
keeps nothing: what the model's own activations take is in both. A dense cache is measured for comparison.
"""

import argparse
import bisect
import json
import multiprocessing
import os
import pathlib
import sys

import kvarn
import torch
from kvarn import KVarNCache
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

PRESET = "kvarn_k4v2_g128"
NEW = 4
# What is freed goes back to the system at once, so that residence is use.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


class ForgetfulLayer(DynamicLayer):
    """Keeps the number of tokens, and gives back only the new ones."""

    seen = 0

    def update(self, key_states, value_states, *args, **kwargs):
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self):
        return self.seen

    def get_mask_sizes(self, query_length):
        return query_length, self.seen


def make_cache(name, config, tokens):
    if name == "kvarn":
        return KVarNCache(config, PRESET, max_tokens=tokens)
    if name == "dense":
        return DynamicCache(config=config)
    return Cache(layers=[ForgetfulLayer() for _ in range(config.num_hidden_layers)])


def make_model(layers, device):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 20,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(device, torch.bfloat16).eval().requires_grad_(False)
    model.set_attn_implementation("kvarn")
    return model


def generate(model, cache, rows, tokens, chunk):
    ids = torch.randint(2, 97, (rows, tokens - NEW), generator=torch.Generator().manual_seed(1))
    ids = ids.to(model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        prefill_chunk_size=chunk,
    )


def resident(field):
    """Bytes of a line of the process's status."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in /proc/self/status")


class ProcessMemory:
    """The resident memory of this process."""

    def __init__(self):
        # 5 sets the high-water mark back to what is resident now.
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        self.before = resident("VmRSS")

    def peak(self):
        return resident("VmHWM") - self.before


class DeviceMemory:
    """The memory of a GPU: torch's at most, and what others hold now, which only grows."""

    def __init__(self):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before, self.others_before = torch.cuda.memory_allocated(), self.others()

    def others(self):
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    def peak(self):
        tensors = torch.cuda.max_memory_allocated() - self.before
        others = self.others() - self.others_before
        print(f"of tensors {tensors}, of others {others}", file=sys.stderr, flush=True)
        return tensors + others


def measure(name, model, rows, tokens, chunk):
    """Peak bytes, and at the end those of the pool's pages and slots, and of partial results."""
    # Whatever is loaded or started once is in place before. The cache stays: a GPU's memory may be given back
    # at any later time.
    warm = make_cache(name, model.config, tokens)
    generate(model, warm, rows, 2 * chunk + 40, chunk)
    cache = make_cache(name, model.config, tokens)
    memory = (DeviceMemory if model.device.type == "cuda" else ProcessMemory)()
    generate(model, cache, rows, tokens, chunk)
    found = memory.peak()
    del warm
    stats = cache.pool.stats() if name == "kvarn" else None
    return {
        "peak": found,
        "pool": stats and stats.page_bytes + stats.slot_bytes,
        "workspace": stats and stats.workspace_bytes,
    }


def figure(model, rows, tokens):
    """What `kvarn.capacity` says of the least memory that holds rows of this length."""
    config = model.config
    cfg = kvarn.Config(PRESET, head_dim=config.head_dim)
    shape = {
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "sequences": rows,
        "hold": cfg.group,
        "device": model.device,
    }

    def fits(memory):
        try:
            return kvarn.capacity(cfg, memory, **shape)
        except kvarn.CapacityError:
            return None

    def enough(memory):
        found = fits(memory)
        return found is not None and found.tokens_per_sequence >= tokens

    return fits(bisect.bisect_left(range(1 << 40), True, key=enough))


def _child(queue, name, arguments):
    queue.put(measure(name, *arguments))


def measure_all(device, layers, rows, tokens, chunk):
    """Figures in bytes, by name; each cache is measured in a process of its own, or on the GPU."""
    model = make_model(layers, device)
    found = {}
    for name in ("nothing", "kvarn", "dense"):
        arguments = model, rows, tokens, chunk
        if device == "cpu":
            context = multiprocessing.get_context("fork")
            queue = context.SimpleQueue()
            child = context.Process(target=_child, args=(queue, name, arguments))
            child.start()
            found[name] = queue.get()
            child.join()
        else:
            found[name] = measure(name, *arguments)
        print(name, found[name], file=sys.stderr, flush=True)
    config, fits = model.config, figure(model, rows, tokens)
    return {
        "kvarn": found["kvarn"]["peak"] - found["nothing"]["peak"],
        "dense": found["dense"]["peak"] - found["nothing"]["peak"],
        "activations": found["nothing"]["peak"],
        "pool": found["kvarn"]["pool"],
        "workspace": found["kvarn"]["workspace"],
        "capacity": fits.bytes + fits.workspace_bytes,
        "capacity, pool": fits.bytes,
        "capacity, workspace": fits.workspace_bytes,
        "raw chunk of a layer": rows * chunk * config.num_key_value_heads * config.head_dim * 2 * 2,
    }


def limit(found):
    """The most that a KVarN cache may take, of what `measure_all` found."""
    return 1.1 * found["capacity"] + found["raw chunk of a layer"]


def within(found):
    """Whether the peak is within its limit, and the pool and its partial results what was said of them."""
    return (
        found["kvarn"] <= limit(found)
        and found["pool"] <= found["capacity, pool"]
        and found["workspace"] <= found["capacity, workspace"]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.device == "cpu" and ALLOCATOR.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    torch.set_num_threads(1)
    print(json.dumps(measure_all(**vars(arguments))))


if __name__ == "__main__":
    main()
