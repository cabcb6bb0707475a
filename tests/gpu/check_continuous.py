"""Continuous batching on the GPU: `python tests/gpu/check_continuous.py`.

Small random models serve prompts of many lengths through `KVarNBatching`: together, in chunks, behind a
shared prompt, in a pool that is too small for all, and beside a request that fails. Each must get the tokens
that it gets alone from a `KVarNCache` in the same passes, but where the best two are level within a few
roundings, and everything must be given back. Products are done in float64, so that they do not depend on the
batch. The exit status is 1 if anything failed.
"""

import argparse
import pathlib
import sys
import traceback

import kvarn
import torch
from kvarn import KVarNBatching, Pool
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.generation.continuous_batching import PagedAttentionCache

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "python" / "transformers"))

from batching import alone, assert_given_back, exact_linear, prompt_steps, serve, watched

SHAPE = {
    "vocab_size": 199,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "initializer_range": 0.08,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
# Differences of a token's log-probability.
LIMITS = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
# A token in this many may be another where two are level.
LEVEL = 20


class Check:
    """A model, and the counts of what was checked with it."""

    def __init__(self, family, config, dtype, device):
        torch.manual_seed(0)
        self.model = family(config(**SHAPE)).to(device, dtype).eval().requires_grad_(False)
        self.name = f"{family.__name__} {dtype}"
        self.limit = LIMITS[dtype]
        self.failures = []
        self.requests = self.same = 0

    def fail(self, text):
        self.failures.append(text)
        print(f"FAILED {self.name}: {text}", flush=True)

    def prompt(self, length, seed=None):
        generator = torch.Generator().manual_seed(length if seed is None else seed)
        return torch.randint(2, 199, (length,), generator=generator).tolist()

    def compare(self, where, preset, output, new, roundings=1, **options):
        """Compares a request with the same one alone, within some times the limit."""
        if output.error is not None:
            self.fail(f"{where}: prompt of {len(output.prompt_ids)}: {output.error}")
            return
        expected = alone(self.model, preset, output.prompt_ids, new, **options)
        self.requests += 1
        self.same += output.generated_tokens == expected.tokens
        worst = 0.0
        for ours, theirs, x, y in zip(
            output.generated_tokens, expected.tokens, output.logprobs, expected.logprobs, strict=True
        ):
            worst = max(worst, abs(x - y))
            if ours != theirs:
                break
        if not worst <= self.limit * roundings:
            self.fail(f"{where}, {preset}, prompt of {len(output.prompt_ids)}: {worst:.1e} from alone")

    def given_back(self, where, batching):
        try:
            assert_given_back(batching)
        except AssertionError:
            self.fail(f"{where}: {batching.pool.stats()} at the end")


def check_together(check):
    """Prompts of many lengths, two of which come while the others decode."""
    for preset, new in (("kvarn_k4v2_g128", 150), ("kvarn_k8v4_g64", 80)):
        batching = KVarNBatching(check.model, preset, tokens=1 << 15, requests=16)
        lengths = (1, 16, 17, 63, 64, 65, 127, 128, 129, 300, 513, 1500)
        prompts = [check.prompt(length) for length in lengths]
        with watched() as passes:
            outputs = serve(batching, prompts, new, max_batch_tokens=2200)
        if not any({1} < {count for _, _, count in one.rows} for one in passes):
            check.fail("no pass had prompts and requests that decode")
        for which, output in enumerate(sorted(outputs, key=lambda one: one.prompt_ids, reverse=True)):
            steps = prompt_steps(passes, len(output.prompt_ids), which)
            check.compare("together", preset, output, new, steps=steps)
        check.given_back("together", batching)


def check_chunks(check):
    """Chunks for the fused kernel, for both kernels and for the dense way."""
    preset, new = "kvarn_k4v2_g64", 70
    batching = KVarNBatching(check.model, preset, tokens=1 << 15, requests=4)
    for budget, lengths in ((16, (150, 40)), (100, (450, 30, 200)), (1500, (4000, 64, 2000))):
        prompts = [check.prompt(length) for length in lengths]
        with watched() as passes:
            outputs = serve(batching, prompts, new, max_batch_tokens=budget, allow_block_sharing=False)
        for which, output in enumerate(outputs):
            steps = prompt_steps(passes, len(output.prompt_ids), which)
            check.compare(f"chunks of {budget}", preset, output, new, steps=steps)
        check.given_back(f"chunks of {budget}", batching)


def check_prefixes(check):
    """What requests have in common is stored once, and read as a cache reads it."""
    preset, group, new = "kvarn_k4v2_g64", 64, 40
    system = check.prompt(5 * group, seed=7)
    batching = KVarNBatching(check.model, preset, tokens=1 << 15, requests=16)
    prompts = [system + check.prompt(length) for length in (1, 30, 64, 100, 500)]
    with watched() as passes:
        outputs = serve(batching, prompts, new)
    stats = batching.pool.stats()
    if stats.prefix_duplicates or stats.prefix_hits != 5 * (len(prompts) - 1):
        check.fail(f"prefixes: {stats}, expected 5 tiles to be found by {len(prompts) - 1} requests")
    together = [one for one in passes if len(one.rows) == len(prompts)][-1]
    if len({tiles[:5] for tiles in together.tiles}) != 1:
        check.fail("prefixes: requests have different pages for the same tiles")
    first = max(outputs, key=lambda one: one.prompt_ids)
    for output in outputs:
        shared = 0 if output is first else 5 * group
        # Behind a prompt of another length, torch's attention to it may round otherwise.
        check.compare("prefixes", preset, output, new, roundings=4, shared=shared)
    (output,) = serve(batching, [system], new)
    check.compare("prefixes, a prompt of whole tiles", preset, output, new, roundings=4, shared=4 * group)
    check.given_back("prefixes", batching)


def check_room(check):
    """Answers outgrow the pool: requests leave it and come back; one never fits."""
    preset, group = "kvarn_k4v2_g64", 64
    batching = KVarNBatching(check.model, preset, tokens=6 * group, requests=8)
    left, offload = [], Pool.offload

    def noting(self, sequence):
        left.append(sequence.length)
        offload(self, sequence)

    Pool.offload = noting
    try:
        prompts = [check.prompt(length) for length in (20, 30, 40)]
        outputs = serve(batching, [*prompts, check.prompt(9 * group)], 5 * group)
    finally:
        Pool.offload = offload
    if not left:
        check.fail("room: nobody left the pool")
    if "expected at most" not in (outputs[-1].error or ""):
        check.fail(f"room: a prompt that cannot fit got {outputs[-1].error!r}")
    for output in outputs[:-1]:
        check.compare("room", preset, output, 5 * group)
    check.given_back("room", batching)


def check_failure(check):
    """A request that fails takes no other with it."""
    preset, poison = "kvarn_k4v2_g64", 198
    prompts = [[min(token, 190) for token in check.prompt(length)] for length in (20, 64, 100)]
    prompts[1][7] = poison

    def poisoned(module, arguments, options):
        if len(options["input_ids"][0]) > 1 and (options["input_ids"] == poison).any():
            raise FloatingPointError("a poisoned token")

    batching = KVarNBatching(check.model, preset, tokens=4096, requests=4)
    hook = check.model.register_forward_pre_hook(poisoned, with_kwargs=True)
    try:
        outputs = serve(batching, prompts, 20)
    finally:
        hook.remove()
    if outputs[1].error != "a poisoned token":
        check.fail(f"failure: the request that fails got {outputs[1].error!r}")
    for output in (outputs[0], outputs[2]):
        check.compare("failure", preset, output, 20)
    check.given_back("failure", batching)


def check_size(check):
    """Without a size the pool takes no more than the free memory, and serves."""
    batching = KVarNBatching(check.model, requests=4)
    (output,) = serve(batching, [check.prompt(300)], 10)
    check.compare("size", "kvarn_k4v2_g128", output, 10)
    check.given_back("size", batching)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="'cpu' to try the script itself")
    device = parser.parse_args().device
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"kvarn {kvarn.__version__} on {name}", flush=True)

    def refused(*arguments, **options):
        raise AssertionError("transformers' own cache was made")

    PagedAttentionCache.__init__ = refused
    torch.nn.functional.linear = exact_linear
    cases = failed = 0
    for family, config in ((LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)):
        for dtype in LIMITS:
            check = Check(family, config, dtype, device)
            for part in (
                check_together,
                check_chunks,
                check_prefixes,
                check_room,
                check_failure,
                check_size,
            ):
                cases += 1
                before = len(check.failures)
                try:
                    part(check)
                except Exception:
                    check.fail(f"{part.__name__}: {traceback.format_exc()}")
                failed += len(check.failures) > before
            print(f"{check.name}: {check.same} of {check.requests} requests have the same tokens", flush=True)
            cases += 1
            if check.same * LEVEL < check.requests * (LEVEL - 1):
                failed += 1
                print(f"FAILED {check.name}: expected {LEVEL - 1} of {LEVEL} to have the same tokens")
    print(f"{cases} cases, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
