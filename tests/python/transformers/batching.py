"""What tests of `KVarNBatching` share: products that do not depend on the batch, and what is expected."""

import contextlib
from types import SimpleNamespace

import numpy as np
import torch
from kvarn import KVarNCache
from kvarn.integrations.transformers.batching import packed
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig


def exact_linear(x, weight, bias=None):
    """A product in float64: rounded to the type of x it is the same in every batch.

    A library's product of one row differs from that of several in its last bits, and so, now and then, in a
    code of a record.
    """
    out = torch.matmul(x.double(), weight.double().T)
    return (out if bias is None else out + bias.double()).to(x.dtype)


def serve(batching, prompts, new, **config):
    """Serves prompts by `generate_batch`, greedily; the outputs in the order of the prompts."""
    outputs = batching.generate_batch(
        prompts,
        GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(return_logprobs=True, **config),
    )
    assert len(outputs) == len(prompts)
    return list(outputs.values())


def alone(model, preset, prompt, new, *, steps=None, shared=0, **options):
    """Tokens and log-probabilities of a prompt generated alone with a `KVarNCache`.

    Args:
        model: the model.
        preset: of the cache.
        prompt: token ids.
        new: new tokens.
        steps: tokens of each forward pass of the prompt; None: one pass.
        shared: tokens at the beginning that come in a pass of their own and are sealed before the next.
        options: of the cache.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("kvarn")
    cache = KVarNCache(model.config, preset, hold=1, **options)
    device = model.device
    ids = torch.tensor([prompt], device=device)
    tokens, logprobs = [], []
    with torch.no_grad():
        for count in ([shared] if shared else []) + (steps or [len(prompt) - shared]):
            past = cache.get_seq_length()
            assert past + count <= len(prompt)
            logits = model(ids[:, past : past + count], past_key_values=cache).logits
            if shared and not past:
                commit(cache)
        assert cache.get_seq_length() == len(prompt)
        while True:
            scores = logits[0, -1].float().log_softmax(-1)
            tokens.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
            if len(tokens) == new:
                break
            logits = model(torch.tensor([tokens[-1:]], device=device), past_key_values=cache).logits
    model.set_attn_implementation(before)
    return SimpleNamespace(tokens=tokens, logprobs=logprobs)


def commit(cache):
    """Commits what the last step of a cache held back."""
    rows = cache._rows
    rows.settle()
    with rows.pool.step(rows.sequences, [0]) as step:
        for layer, (heads, dim) in enumerate(rows.pool.layers):
            nothing = torch.empty(0, heads, dim, dtype=cache.layers[0].dtype, device=rows.pool.device)
            step.append(layer, nothing, nothing)


def listed(table):
    """A table of a sequence as a list."""
    return np.from_dlpack(table).tolist()


@contextlib.contextmanager
def watched():
    """Yields a list that fills with what each forward pass begins with.

    Each has `rows`, a (sequence, past, count) per sequence; `tiles`, page and slot of each of its tiles; and
    the pool's `stats` with the pass open.
    """
    passes = []
    original = packed.PackedBatch.__init__

    def noting(self, pool, sequences, counts):
        pasts = [sequence.length for sequence in sequences]
        tiles = [
            tuple(zip(listed(one.block_table), listed(one.slot_table), strict=True)) for one in sequences
        ]
        original(self, pool, sequences, counts)
        rows = list(zip(sequences, pasts, counts, strict=True))
        passes.append(SimpleNamespace(rows=rows, tiles=tiles, stats=pool.stats()))

    packed.PackedBatch.__init__ = noting
    try:
        yield passes
    finally:
        packed.PackedBatch.__init__ = original


def prompt_steps(passes, prompt_length, which):
    """Tokens of each pass of the prompt of the `which`-th sequence that appeared."""
    order = []
    for one in passes:
        for sequence, _, _ in one.rows:
            if not any(sequence is other for other in order):
                order.append(sequence)
    rows = [(past, count) for one in passes for sequence, past, count in one.rows if sequence is order[which]]
    return [count for past, count in rows if past < prompt_length]


def assert_given_back(batching):
    """Nothing is left in the pool but published tiles, which nobody holds."""
    stats = batching.pool.stats()
    assert (stats.sequences, stats.open_steps, stats.offloaded_sequences, stats.tokens) == (0, 0, 0, 0)
    assert (stats.pages_used, stats.slots_used) == (0, 0)
    assert stats.pages_cached == stats.pages_published


def assert_same(output, expected):
    """A request gave the expected tokens, with their probabilities."""
    assert output.error is None
    assert output.generated_tokens == expected.tokens
    assert torch.allclose(torch.tensor(output.logprobs), torch.tensor(expected.logprobs), atol=1e-5)
