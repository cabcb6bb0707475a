"""`generate` with a `KVarNStaticCache`: eager, compiled by the caller, and compiled by transformers."""

import pytest
import torch
from kvarn import KVarNCache, KVarNStaticCache
from tiny_models import FAMILIES, generate, left_padding, tiny
from torch._dynamo.utils import counters
from transformers import CompileConfig

PRESET = "kvarn_k4v2_g64"


def make(family="llama"):
    model = tiny(*FAMILIES[family], num_hidden_layers=2)
    model.set_attn_implementation("kvarn")
    torch._dynamo.reset()
    counters.clear()
    return model


def assert_same(model, expected_of, padding, new=90, **options):
    """Generation with a static cache is that with a `KVarNCache` before the model was compiled."""
    ids, mask = left_padding(2, 50, padding)
    expected = generate(expected_of, KVarNCache(model.config, PRESET), ids, mask, new)
    cache = KVarNStaticCache(model.config, PRESET, max_tokens=160)
    found = generate(model, cache, ids, mask, new, **options)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.logits, expected.logits)
    assert cache.get_seq_length() == 50 + new - 1
    assert cache.pool.stats().pages_used > 0 or padding != [0, 0]
    assert cache.materializations == 0


@pytest.mark.parametrize("padding", [[0, 0], [20, 0]])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_compiling(family, padding):
    model = make(family)
    assert_same(model, model, padding)
    assert not counters["stats"]


@pytest.mark.parametrize("padding", [[0, 0], [20, 0]])
def test_forward_compiled_by_the_caller(padding):
    model, plain = make(), make()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert_same(model, plain, padding)
    # The prompt, and all steps.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("padding", [[0, 0], [20, 0]])
def test_compiled_by_transformers(padding):
    model = make()
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    # As on a GPU; otherwise transformers does not compile on a CPU.
    config._compile_all_devices = True
    assert_same(model, model, padding, compile_config=config)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_beams_and_prompt_look_up():
    model = make()
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}):
        padding = [20, 0] if "num_beams" in options else None
        ids, mask = left_padding(2, 50, padding) if padding else left_padding(1, 50, [0])
        caches = KVarNCache(model.config, PRESET), KVarNStaticCache(model.config, PRESET)
        expected, found = (generate(model, cache, ids, mask, 60, **options) for cache in caches)
        assert torch.equal(found.tokens, expected.tokens)
