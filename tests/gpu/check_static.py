"""Compiled and captured decoding on a GPU: `python tests/gpu/check_static.py [--times]`.

Small random models decode given tokens through `KVarNStaticCache`, compiled by torch as one graph, and
through `CapturedDecoder`, as one CUDA graph, each beside the same steps of an eager `KVarNCache`. Rows are
ragged, and pass the borders of tiles. Also: `generate`, where transformers compiles by itself; room that
ends; other rows; a model that cannot be captured. `--times` prints ms of a step of a Llama-3-8B with random
weights in each way. Ends with counts; the exit status is 1 if anything failed.
"""

import argparse
import sys
import traceback

import kvarn
import torch
from host_model import COUNTS, DEVICE
from kvarn import CapturedDecoder, KVarNCache, KVarNStaticCache
from static_times import print_times
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

FAMILIES = {"Llama": (LlamaConfig, LlamaForCausalLM), "Qwen3": (Qwen3Config, Qwen3ForCausalLM)}
SHAPE = {
    "vocab_size": 199,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
# Differences of logits over their range. Kernels of inductor round otherwise, which now and then changes a
# code of the next layer; what calls the same kernels has nearly always the same bits.
FUSED = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
SAME_KERNELS = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
PROMPT, MAX_TOKENS = 70, 300


def make(family="Llama", dtype=torch.float16, **changes):
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE | changes)).to(DEVICE, dtype).eval().requires_grad_(False)
    model.set_attn_implementation("kvarn")
    return model


class Beside:
    """A `KVarNStaticCache` and a `KVarNCache` behind the same prompt, and the tokens to decode."""

    def __init__(self, model, padding, preset, **options):
        self.model, self.batch, length = model, len(padding), MAX_TOKENS
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(2, SHAPE["vocab_size"], (self.batch, length), generator=generator).to(DEVICE)
        self.mask = torch.ones_like(self.ids)
        for row, pad in enumerate(padding):
            self.ids[row, :pad] = self.mask[row, :pad] = 0
        self.padded = any(padding)
        self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        self.static = KVarNStaticCache(model.config, preset, max_tokens=length, **options)
        self.plain = KVarNCache(model.config, preset, max_tokens=length, **options)
        for cache in (self.static, self.plain):
            self.eager(cache, PROMPT)

    def inputs(self, cache, columns):
        start = cache.get_seq_length()
        stop = start + columns
        return {
            "input_ids": self.ids[:, start:stop].contiguous(),
            "position_ids": self.positions[:, start:stop].contiguous(),
        }, stop

    def eager(self, cache, columns=1):
        inputs, stop = self.inputs(cache, columns)
        if self.padded:
            inputs["attention_mask"] = self.mask[:, :stop]
        with torch.no_grad():
            return self.model(**inputs, past_key_values=cache).logits

    def compiled(self, step):
        inputs, _ = self.inputs(self.static, 1)
        if self.padded:
            # One width; columns that are not there yet are not looked at.
            inputs["attention_mask"] = self.mask
        with torch.no_grad():
            return step(**inputs, past_key_values=self.static).logits.clone()

    def captured(self, decoder):
        return decoder(self.inputs(self.static, 1)[0]["input_ids"])

    def compare(self, name, decode, steps, limit):
        """Decode given tokens in both ways; returns how many steps had the same bits."""
        worst = equal = 0
        for _ in range(steps):
            found, expected = decode(), self.eager(self.plain)
            expected = expected.float()
            width = expected.max() - expected.min()
            worst = max(worst, float((found.float() - expected).abs().max() / width))
            equal += bool(torch.equal(found.float(), expected))
        COUNTS.check(worst <= limit, f"{name}: logits differ by {worst:.1e} of their range")
        lengths = [[s.length for s in cache._rows.sequences] for cache in (self.static, self.plain)]
        COUNTS.check(lengths[0] == lengths[1], f"{name}: lengths {lengths}")
        COUNTS.check(self.static.materializations == 0, f"{name}: dense tensors were built")
        print(f"  {name}: {worst:.1e}, {equal} of {steps} steps have the same bits", flush=True)
        return equal

    def compare_memory(self, name):
        """Pages and slots byte by byte, where the arithmetic was the same."""
        pools = self.static.pool, self.plain.pool
        # Partial results of a captured step lie in arrays of its own.
        use = [
            [getattr(pool.stats(), field) for field in ("pages_used", "slots_used", "sequences", "tokens")]
            for pool in pools
        ]
        COUNTS.check(use[0] == use[1] and use[0][0] > 0, f"{name}: {use} in use")
        for a, b in zip(*((*pool.pages, *pool.slots) for pool in pools), strict=True):
            a, b = (torch.from_dlpack(memory).view(torch.uint8) for memory in (a, b))
            COUNTS.check(torch.equal(a, b), f"{name}: memory differs at the end")


def compile_anew(model, **options):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, fullgraph=True, **options)


def check_compiled():
    """One graph for all steps, by several backends."""
    for family, dtype, padding, options in (
        ("Llama", torch.float16, [0, 37, 66], {"backend": "aot_eager"}),
        ("Qwen3", torch.bfloat16, [0], {"backend": "aot_eager"}),
        ("Llama", torch.float16, [0, 37, 66], {}),
        ("Qwen3", torch.float16, [0, 0], {}),
        ("Qwen3", torch.bfloat16, [0, 9], {}),
        ("Llama", torch.float16, [0, 37, 66], {"mode": "reduce-overhead"}),
        ("Qwen3", torch.float16, [0], {"mode": "reduce-overhead"}),
    ):
        name = f"compiled {options or 'by inductor'}, {family}, {dtype}, padding {padding}"
        model = make(family, dtype)
        beside, step = Beside(model, padding, "kvarn_k8v8_g64"), compile_anew(model, **options)
        eager = options.get("backend") == "aot_eager"
        limit = (SAME_KERNELS if eager else FUSED)[dtype]
        with torch._dynamo.config.patch(error_on_recompile=True):
            equal = beside.compare(name, lambda b=beside, s=step: b.compiled(s), 150, limit)
        graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
        COUNTS.check(graphs == 1 and not breaks, f"{name}: {graphs} graphs, breaks {breaks}")
        if equal == 150:
            beside.compare_memory(name)
        if counters["inductor"]["cudagraph_skips"]:
            print(f"    {counters['inductor']['cudagraph_skips']} graphs left out of CUDA graphs")


def check_generate():
    """`generate`, which compiles by itself on a GPU where the cache allows it."""
    for padding in ([0, 0], [0, 20]):
        model = make()
        beside = Beside(model, padding, "kvarn_k8v8_g64")
        outputs = []
        for kind in (KVarNCache, KVarNStaticCache):
            torch._dynamo.reset()
            counters.clear()
            cache = kind(model.config, "kvarn_k8v8_g64", max_tokens=MAX_TOKENS)
            outputs.append(
                model.generate(
                    beside.ids[:, :PROMPT],
                    attention_mask=beside.mask[:, :PROMPT],
                    past_key_values=cache,
                    max_new_tokens=100,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            )
        graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
        name = f"generate, padding {padding}"
        COUNTS.check(graphs == 1 and not breaks, f"{name}: {graphs} graphs, breaks {breaks}")
        worst = steps = 0
        for a, b in zip(*(output.logits for output in outputs), strict=True):
            steps += 1
            worst = max(worst, float((a - b).abs().max() / (b.max() - b.min())))
            if not torch.equal(a.argmax(-1), b.argmax(-1)):
                break
        COUNTS.check(worst <= FUSED[torch.float16] and steps >= 4, f"{name}: {worst:.1e} after {steps} steps")
        print(f"  {name}: {worst:.1e}, {steps} steps alike", flush=True)


def check_captured():
    """One CUDA graph for all steps."""
    for family, dtype, padding, preset, changes in (
        ("Llama", torch.float16, [0, 37, 66], "kvarn_k4v2_g64", {}),
        ("Qwen3", torch.bfloat16, [0], "kvarn_k4v2_g128", {"head_dim": 128}),
        ("Qwen3", torch.float16, [5 * row % 60 for row in range(17)], "kvarn_k4v4_g64", {}),
        ("Llama", torch.float16, [0, 3], "kvarn_k8v8_g64", {"num_attention_heads": 2}),
    ):
        name = f"captured, {family}, {dtype}, {len(padding)} rows, {preset}"
        model = make(family, dtype, **changes)
        beside = Beside(model, padding, preset)
        decoder = CapturedDecoder(model, beside.static)
        equal = beside.compare(name, lambda b=beside, d=decoder: b.captured(d), 200, SAME_KERNELS[dtype])
        if equal == 200:
            beside.compare_memory(name)


def check_captured_and_compiled():
    """A CUDA graph of the kernels that inductor makes."""
    for family, padding in (("Llama", [0, 37, 66]), ("Qwen3", [0])):
        model = make(family)
        beside = Beside(model, padding, "kvarn_k8v8_g64")
        decoder = CapturedDecoder(compile_anew(model), beside.static)
        name = f"captured and compiled, {family}"
        beside.compare(name, lambda b=beside, d=decoder: b.captured(d), 150, FUSED[torch.float16])
        graphs = counters["stats"]["unique_graphs"]
        COUNTS.check(graphs == 1, f"{name}: {graphs} graphs")


def check_turns():
    """Captured steps between eager ones, cuts, other rows, and a cache that is reset."""
    model = make()
    beside = Beside(model, [0, 20], "kvarn_k8v8_g64")
    decoder = CapturedDecoder(model, beside.static)
    both = beside.static, beside.plain

    def go_on(name, steps):
        limit = SAME_KERNELS[torch.float16]
        beside.compare(f"captured, {name}", lambda: beside.captured(decoder), steps, limit)

    go_on("first", 10)
    for cache in both:
        beside.eager(cache, 9)
        cache.crop(-4)
    go_on("behind an eager chunk and a cut", 60)
    for cache in both:
        cache.reorder_cache(torch.tensor([1, 0]))
    beside.ids, beside.mask, beside.positions = (
        x.flip(0) for x in (beside.ids, beside.mask, beside.positions)
    )
    go_on("behind a reordering", 20)
    for cache in both:
        cache.batch_select_indices(torch.tensor([1]))
    beside.ids, beside.mask, beside.positions = (x[1:] for x in (beside.ids, beside.mask, beside.positions))
    go_on("one row of two", 20)
    for cache in both:
        cache.reset()
        beside.eager(cache, 150)
    go_on("another prompt", 20)


def check_room():
    """Past its room a decoder refuses, nothing is lost, and a larger one goes on."""
    model = make()
    beside = Beside(model, [0, 20], "kvarn_k8v8_g64")
    small = CapturedDecoder(model, beside.static, max_tokens=100)
    limit = SAME_KERNELS[torch.float16]
    beside.compare("captured, up to its room", lambda: beside.captured(small), 30, limit)
    for _ in range(2):
        COUNTS.refused(
            kvarn.CapacityError, "expected at most 100, the max_tokens of", lambda: beside.captured(small)
        )
    large = CapturedDecoder(model, beside.static)
    beside.compare("captured, with more room", lambda: beside.captured(large), MAX_TOKENS - 100, limit)
    COUNTS.refused(
        kvarn.CapacityError,
        f"expected at most max_tokens={MAX_TOKENS}",
        lambda: large(beside.ids[:, :1]),
    )
    step = compile_anew(model, backend="aot_eager")
    ids = beside.ids[:, :1].contiguous()
    with torch.no_grad():
        COUNTS.refused(
            kvarn.CapacityError,
            f"expected at most max_tokens={MAX_TOKENS}",
            lambda: step(ids, past_key_values=beside.static, attention_mask=beside.mask),
        )
    COUNTS.check(beside.static.get_seq_length() == MAX_TOKENS, "columns after refused steps")


def check_refused():
    """A model that waits for the device cannot be captured; the rows stay, and eager steps go on."""
    model = make()
    beside = Beside(model, [0, 20], "kvarn_k8v8_g64")
    decoder = CapturedDecoder(model, beside.static)
    limit = SAME_KERNELS[torch.float16]
    beside.compare("captured, before a refused capture", lambda: beside.captured(decoder), 3, limit)
    waiting = CapturedDecoder(model, beside.static)

    def wait(module, inputs, output):
        output.sum().item()

    hook = model.lm_head.register_forward_hook(wait)
    COUNTS.refused(kvarn.CudaError, "cannot be captured", lambda: beside.captured(waiting))
    hook.remove()
    COUNTS.check(beside.static.get_seq_length() == PROMPT + 3, "columns after a refused capture")
    beside.compare("eager after a refused capture", lambda: beside.eager(beside.static), 5, limit)
    beside.compare("captured after a refused capture", lambda: beside.captured(decoder), 70, limit)
    model.to("cpu")
    COUNTS.refused(
        kvarn.DeviceError,
        "a model on cpu: expected a CUDA device",
        lambda: CapturedDecoder(model, beside.static),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--times", action="store_true", help="print ms of a step, and check nothing")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    if arguments.times:
        print_times(arguments.contexts, arguments.batches)
    else:
        for part in (
            check_compiled,
            check_generate,
            check_captured,
            check_captured_and_compiled,
            check_turns,
            check_room,
            check_refused,
        ):
            COUNTS.parts += 1
            try:
                part()
            except Exception:
                traceback.print_exc()
                COUNTS.check(False, f"{part.__name__} broke off")
    print(f"{COUNTS.parts} parts, {COUNTS.checks} checks, {COUNTS.failed} failed")
    sys.exit(COUNTS.failed > 0)


if __name__ == "__main__":
    main()
