"""Models with softcap, attention sinks, sliding layers, and layers that share keys and values."""

import pytest
import torch
from fake_quant import FakeQuantCache
from kvarn import KVarNCache
from tiny_models import assert_close, left_padding, run, tiny, tokens
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    GptOssForCausalLM,
)

PRESET = "kvarn_k4v4_g64"
HYBRID = {
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "num_hidden_layers": 4,
            "sliding_window": 32,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 32,
        },
    ),
    "gpt-oss": (
        GptOssConfig,
        GptOssForCausalLM,
        # Every expert: of a few, a rounding may choose others, and the logits are those of another model.
        {"num_hidden_layers": 4, "sliding_window": 32, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "gemma3n": (
        Gemma3nTextConfig,
        Gemma3nForCausalLM,
        {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "sliding_window": 32,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 6,
        },
    ),
}


@pytest.fixture(scope="module")
def hybrids():
    models = {
        name: tiny(*classes, initializer_range=0.08, **changes)
        for name, (*classes, changes) in HYBRID.items()
    }
    # Gemma 3n does not divide scores by sqrt(head_dim): untrained, it would attend to single tokens.
    for layer in models["gemma3n"].model.layers:
        layer.self_attn.q_norm.weight.mul_(0.25)
    return models


@pytest.mark.parametrize("name", HYBRID)
@pytest.mark.parametrize("padding", [None, [0, 20]])
def test_hybrid(hybrids, name, padding):
    model = hybrids[name]
    prompt, mask = left_padding(2, 150, padding or [0, 0])
    chunks = [prompt, tokens(2, 30, seed=2), *tokens(2, 50, seed=3).split(1, 1)]
    mask = torch.cat([mask, torch.ones(2, 80, dtype=torch.long)], 1) if padding else None
    model.set_attn_implementation("eager")
    reference = run(model, FakeQuantCache(model.config, PRESET, padding=padding), chunks, mask)
    eager = run(model, KVarNCache(model.config, PRESET, padding=padding), chunks, mask)
    model.set_attn_implementation("kvarn")
    cache = KVarNCache(model.config, PRESET)
    logits = run(model, cache, chunks, mask)
    assert cache.materializations == 0
    assert_close(eager, reference)
    assert_close(logits, reference)
