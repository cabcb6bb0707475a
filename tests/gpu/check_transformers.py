"""transformers on the GPU: `python tests/gpu/check_transformers.py [--matrix full]`.

Small random models in half precision generate through `KVarNCache` under "kvarn" (fused kernels) and under
"sdpa" (the same cache, decoded for every call). Logits must agree to a few roundings of the model's type
(which now and then flip a code in the next layer) up to the first token that differs, the fused path must
decode nothing, and a cache that keeps everything in slots must agree with a DynamicCache.

Then the matrix of models and ways to generate, as tests/python/transformers/test_matrix.py has it for the CPU
(a choice that holds every pair of values, or every combination). The exit status is 1 if anything failed.
"""

import argparse
import pathlib
import sys
import traceback

import torch
from kvarn import KVarNCache
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "python" / "transformers"))

import matrix

SHAPE = {
    "vocab_size": 199,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def generate(model, attention, cache, ids, mask, new, **options):
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )


def distance(a, b):
    """Largest difference of logits over their range, up to the first token that differs."""
    worst, steps = 0.0, 0
    for x, y in zip(a.logits, b.logits, strict=True):
        worst = max(worst, float((x - y).abs().max() / (x.max() - x.min())))
        steps += 1
        if not torch.equal(x.argmax(-1), y.argmax(-1)):
            break
    return worst, steps


def check_fused():
    """Returns cases and failures of the fused path against the decoded one."""
    failed = cases = 0
    for family, config_class in ((LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)):
        for dtype, limit in ((torch.float16, 6e-3), (torch.bfloat16, 3e-2)):
            torch.manual_seed(0)
            model = family(config_class(**SHAPE)).to("cuda", dtype).eval()
            ids = torch.randint(2, 199, (3, 331), device="cuda")
            mask = torch.ones_like(ids)
            mask[0, :40] = 0
            mask[1, :3] = 0
            for preset in ("kvarn_k8v8_g64", "kvarn_k4v4_g128"):
                for options in ({}, {"prefill_chunk_size": 100}):
                    caches = [KVarNCache(model.config, preset) for _ in range(2)]
                    # Without padding both store the same tokens.
                    one, all_ones = ids[:1], torch.ones_like(ids[:1])
                    fused = generate(model, "kvarn", caches[0], one, all_ones, 120, **options)
                    dense = generate(model, "sdpa", caches[1], one, all_ones, 120, **options)
                    worst, steps = distance(fused, dense)
                    bad = worst > limit or caches[0].materializations or steps < 4
                    failed, cases = failed + bool(bad), cases + 1
                    print(
                        f"{'FAILED' if bad else 'ok'} {family.__name__} {dtype} {preset} {options}: "
                        f"{worst:.1e}, {steps} steps"
                    )
            # Everything within the sinks: nothing is quantised, padding included.
            cache = KVarNCache(model.config, "kvarn_k4v2_g128", recent_tokens=512)
            fused = generate(model, "kvarn", cache, ids, mask, 40)
            plain = generate(model, "sdpa", DynamicCache(config=model.config), ids, mask, 40)
            worst, steps = distance(fused, plain)
            bad = worst > limit or cache.materializations or steps < 4
            failed, cases = failed + bool(bad), cases + 1
            print(
                f"{'FAILED' if bad else 'ok'} {family.__name__} {dtype} padded, unquantised: "
                f"{worst:.1e}, {steps} steps"
            )
    return cases, failed


def check_matrix(full):
    """Returns cases and failures of the matrix, and prints its table."""
    counts, failures = {}, 0
    for cell in matrix.every_cell("cuda") if full else matrix.covering_cells("cuda"):
        passed, run = counts.get((cell.model, cell.mode), (0, 0))
        try:
            matrix.check(cell, "cuda")
            passed += 1
            print(f"ok {cell}", flush=True)
        except Exception as error:
            failures += 1
            print(f"FAILED {cell}: {type(error).__name__}: {error}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc()
        counts[cell.model, cell.mode] = passed, run + 1
    print(matrix.table(counts))
    return sum(run for _, run in counts.values()), failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--matrix", choices=("pairs", "full"), default="pairs")
    full = parser.parse_args().matrix == "full"
    cases = failed = 0
    for part in (check_fused, lambda: check_matrix(full)):
        try:
            ran, bad = part()
        except Exception:
            traceback.print_exc()
            ran, bad = 1, 1
        cases, failed = cases + ran, failed + bad
    print(f"{cases} cases, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
