"""Bad input to the cache: an error that names it, and a cache that works afterwards."""

import kvarn
import pytest
import torch
from kvarn import ConfigError, DTypeError, KVarNCache, ShapeError, TensorError
from kvarn.integrations.transformers import UnsupportedError
from tiny_models import run, tiny, tokens
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig


@pytest.fixture
def config(models):
    config = models["llama", 2].config
    config._attn_implementation = "sdpa"
    return config


def states(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"preset": "kvarn_k4v5_g64"}, "k4v5"),
        ({"preset": "turbo"}, "turbo"),
        ({"sink_tokens": 17}, "17"),
        ({"recent_tokens": -1}, "-1"),
        ({"iterations": -1}, "-1"),
        ({"hold": -1}, "hold -1: expected at least 0"),
        ({"padding": [3, -2]}, r"padding \[3, -2\]: expected"),
        ({"max_tokens": 0}, "max_tokens 0: expected at least 1"),
    ],
)
def test_settings(config, arguments, error):
    with pytest.raises(ConfigError, match=error):
        KVarNCache(config, **{"preset": "kvarn_k4v2_g64"} | arguments)


def test_a_model_without_full_attention():
    config = MistralConfig(num_hidden_layers=2, sliding_window=32)
    with pytest.raises(
        UnsupportedError, match="layers of type sliding_attention: expected at least one full_att"
    ):
        KVarNCache(config)


def test_head_dim():
    model = tiny(LlamaConfig, LlamaForCausalLM, num_hidden_layers=1, head_dim=20)
    with pytest.raises(ConfigError, match="head_dim 20"):
        run(model, KVarNCache(model.config), [tokens(1, 3)])


def test_padding_of_another_batch(config):
    cache = KVarNCache(config, padding=[1, 2, 3])
    with pytest.raises(ShapeError, match="padding of 3 rows: expected one entry for each of the 2 rows"):
        cache.update(states(2, 2, 5, 32), states(2, 2, 5, 32), 0)


@pytest.mark.parametrize(
    ("k", "v", "kind", "error"),
    [
        (
            states(2, 2, 5, 32),
            states(2, 2, 5, 16),
            ShapeError,
            r"values \[2, 2, 5, 16\]: expected the same shape",
        ),
        (
            states(2, 5, 32),
            states(2, 5, 32),
            ShapeError,
            r"keys \[2, 5, 32\].*\[batch, kv_heads, tokens, head_dim\]",
        ),
        (states(3, 2, 5, 32), states(3, 2, 5, 32), ShapeError, "batch 3: expected 2"),
        (states(2, 2, 5, 32).double(), states(2, 2, 5, 32).double(), DTypeError, "keys torch.float64"),
        (states(2, 2, 5, 32).half(), states(2, 2, 5, 32).half(), DTypeError, "the same as at first"),
        (states(2, 2, 5, 32), states(2, 2, 5, 32).half(), DTypeError, "values torch.float16"),
        (
            states(2, 2, 5, 32).requires_grad_(),
            states(2, 2, 5, 32),
            TensorError,
            "require grad: expected inference",
        ),
    ],
)
def test_states(config, k, v, kind, error):
    def feed(cache, layer):
        return cache.update(states(2, 2, 5, 32), states(2, 2, 5, 32), layer)

    cache, untouched = KVarNCache(config), KVarNCache(config)
    for one in (cache, untouched):
        for layer in range(2):
            feed(one, layer)
    with pytest.raises(kind, match=error):
        cache.update(k, v, 0)
    for layer in range(2):
        for ours, theirs in zip(feed(cache, layer), feed(untouched, layer), strict=True):
            assert torch.equal(ours, theirs)


def test_a_layer_of_another_shape(config):
    cache = KVarNCache(config)
    cache.update(states(1, 2, 5, 32), states(1, 2, 5, 32), 0)
    with pytest.raises(ShapeError, match="layer 1 has 4 kv heads of head_dim 32: expected 2 of 32"):
        cache.update(states(1, 4, 5, 32), states(1, 4, 5, 32), 1)


def test_import_without_torch_loads_no_integration():
    import subprocess
    import sys

    code = "import kvarn, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "KVarNCache" in dir(kvarn)
    with pytest.raises(AttributeError, match="no attribute 'KVarnCache'"):
        _ = kvarn.KVarnCache
