"""`generate` through a KVarNCache gives the tokens of a cache that is quantised at the same moments."""

import copy
from types import SimpleNamespace

import pytest
import torch
from fake_quant import FakeQuantCache
from kvarn import KVarNCache
from tiny_models import (
    TOLERANCE,
    assert_close,
    assert_same_generation,
    generate,
    left_padding,
    run,
    tokens,
)
from transformers import DynamicCache


def check_count(cache, implementation):
    assert (cache.materializations == 0) == (implementation == "kvarn")


def test_greedy(model, expected, preset, implementation):
    ids = tokens(1, 200)
    reference = expected(lambda: generate(model, FakeQuantCache(model.config, preset), ids))
    model.set_attn_implementation(implementation)
    cache = KVarNCache(model.config, preset)
    assert_same_generation(generate(model, cache, ids), reference)
    check_count(cache, implementation)


@pytest.mark.parametrize("preset", ["kvarn_k2v2_g64", "kvarn_k3v4_g64", "kvarn_k4v4_g128", "kvarn"])
def test_presets(models, preset):
    model = models["llama", 1]
    chunks = [tokens(1, 300), *tokens(1, 30, seed=2).split(1, 1)]
    model.set_attn_implementation("sdpa")
    reference = run(model, FakeQuantCache(model.config, preset), chunks)
    model.set_attn_implementation("kvarn")
    assert_close(run(model, KVarNCache(model.config, preset), chunks), reference)


def test_the_codec_is_visible(model, expected, preset):
    # Else every comparison here would pass with a cache that never quantises.
    chunks = [tokens(1, 192), *tokens(1, 8, seed=2).split(1, 1)]
    raw = expected(lambda: run(model, DynamicCache(), chunks))
    quantised = run(model, KVarNCache(model.config, preset), chunks)
    width = (raw.max() - raw.min()).item()
    # The prompt's own attention is exact.
    assert (raw[:192] - quantised[:192]).abs().max() <= 1e-5 * width
    assert (raw[192:] - quantised[192:]).abs().max() > 2 * TOLERANCE * width


def test_sampling_with_a_seed(model, expected, preset, implementation):
    ids = tokens(2, 150)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20}
    reference = expected(lambda: generate(model, FakeQuantCache(model.config, preset), ids, **options))
    model.set_attn_implementation(implementation)
    sampled = generate(model, KVarNCache(model.config, preset), ids, **options)
    assert_same_generation(sampled, reference)


def test_left_padded_batch(model, expected, preset, implementation):
    padding = [0, 70, 13]
    ids, mask = left_padding(3, 150, padding)
    # Only the attention function "kvarn" shows the mask to the cache.
    given = None if implementation == "kvarn" else padding
    reference = expected(
        lambda: generate(model, FakeQuantCache(model.config, preset, padding=padding), ids, mask)
    )
    model.set_attn_implementation(implementation)
    cache = KVarNCache(model.config, preset, padding=given)
    assert_same_generation(generate(model, cache, ids, mask), reference)
    check_count(cache, implementation)


def test_padding_is_stored_under_other_attention_functions(model, expected, preset):
    padding = [0, 70, 13]
    ids, mask = left_padding(3, 150, padding)
    model.set_attn_implementation("sdpa")
    reference = generate(model, FakeQuantCache(model.config, preset), ids, mask)
    assert_same_generation(generate(model, KVarNCache(model.config, preset), ids, mask), reference)


def test_a_padded_row_equals_the_row_alone(model, preset):
    ids, mask = left_padding(2, 150, [40, 0])
    together = generate(model, KVarNCache(model.config, preset), ids, mask)
    alone = generate(model, KVarNCache(model.config, preset), ids[:1, 40:])
    first = SimpleNamespace(tokens=together.tokens[:1], logits=together.logits[:1])
    assert_same_generation(first, alone)


def test_chunked_prefill(model, expected, preset, implementation):
    ids = tokens(1, 230)
    for size in (7, 50, 64):
        options = {"prefill_chunk_size": size, "new": 12}
        reference = expected(
            lambda o=options: generate(model, FakeQuantCache(model.config, preset), ids, **o)
        )
        model.set_attn_implementation(implementation)
        cache = KVarNCache(model.config, preset)
        assert_same_generation(generate(model, cache, ids, **options), reference)
        check_count(cache, implementation)


def test_chunked_prefill_of_a_left_padded_batch(model, expected, preset):
    padding = [0, 70, 130]
    ids, mask = left_padding(3, 200, padding)
    for size in (9, 60):
        chunks = ids.split(size, 1)
        reference = expected(
            lambda c=chunks: run(model, FakeQuantCache(model.config, preset, padding=padding), c, mask)
        )
        assert_close(run(model, KVarNCache(model.config, preset), chunks, mask), reference)


def test_multi_turn_reuse(model, expected, preset, implementation):
    def turns(cache):
        first = generate(model, cache, tokens(1, 100), new=20).tokens
        second = generate(model, cache, torch.cat([first, tokens(1, 45, seed=2)], 1), new=20).tokens
        return generate(model, cache, torch.cat([second, tokens(1, 3, seed=3)], 1), new=20)

    reference = expected(lambda: turns(FakeQuantCache(model.config, preset)))
    model.set_attn_implementation(implementation)
    cache = KVarNCache(model.config, preset)
    assert_same_generation(turns(cache), reference)
    assert cache.get_seq_length() == reference.tokens.shape[1] - 1


def test_prompt_lookup_crops_rejected_drafts(model, expected, preset, implementation):
    ids = tokens(1, 20).repeat(1, 8)
    options = {"prompt_lookup_num_tokens": 5}
    reference = expected(lambda: generate(model, DynamicCache(), ids, **options))
    model.set_attn_implementation(implementation)
    cache = KVarNCache(model.config, "kvarn_k8v8_g128")
    assert_same_generation(generate(model, cache, ids, **options), reference)
    assert cache.get_seq_length() == reference.tokens.shape[1] - 1
    check_count(cache, implementation)


def test_the_attention_function_may_change_between_calls(model, expected, preset):
    chunks = [tokens(1, 130), *tokens(1, 90, seed=2).split(1, 1)]
    reference = expected(lambda: run(model, FakeQuantCache(model.config, preset), chunks))
    cache, parts = KVarNCache(model.config, preset), []
    for turn, part in enumerate((chunks[:1], chunks[1:30], chunks[30:60], chunks[60:])):
        model.set_attn_implementation(("sdpa", "kvarn", "eager", "kvarn")[turn])
        parts.append(run(model, cache, part))
    assert_close(torch.cat(parts), reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(models, implementation, dtype):
    model = copy.deepcopy(models["llama", 2]).to(dtype)
    chunks = [tokens(2, 150), tokens(2, 30, seed=2), *tokens(2, 20, seed=3).split(1, 1)]
    model.set_attn_implementation("sdpa")
    reference = run(model, DynamicCache(), chunks).float()
    model.set_attn_implementation(implementation)
    logits = run(model, KVarNCache(model.config, "kvarn_k8v8_g64"), chunks)
    assert logits.dtype == dtype
    error = (logits.float() - reference).norm() / reference.norm()
    # bfloat16 keeps 8 bits: two orders of the same sum differ by about as much.
    assert error < 0.05, f"relative error {error:.3f}"
