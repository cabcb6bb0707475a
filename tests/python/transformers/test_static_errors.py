"""What a `KVarNStaticCache` refuses, and what torch sees of its operators."""

import gc

import pytest
import torch
from kvarn import ConfigError, DTypeError, KVarNStaticCache, ShapeError, StateError
from kvarn.integrations.transformers import UnsupportedError
from tiny_models import FAMILIES, run, tiny, tokens
from torch._dynamo.exc import Unsupported
from transformers import Gemma3TextConfig, LlamaConfig

PRESET = "kvarn_k4v2_g64"
HEADS, KV_HEADS, D = 4, 2, 32


def make():
    model = tiny(*FAMILIES["llama"], num_hidden_layers=2)
    model.set_attn_implementation("kvarn")
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def filled(model, columns=70, **options):
    cache = KVarNStaticCache(model.config, PRESET, **options)
    run(model, cache, [tokens(2, columns)])
    return cache


def refused_when_traced(model, text, **inputs):
    torch._dynamo.reset()
    cache = filled(model)
    step = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match=text):
        step(tokens(2, 1), past_key_values=cache, **inputs)
    assert cache.get_seq_length() == 70


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            Gemma3TextConfig(num_hidden_layers=6, sliding_window=64),
            "layer 0 of Gemma3TextConfig is of type sliding_attention: expected full_attention, or a",
        ),
        (
            LlamaConfig(num_hidden_layers=4, num_kv_shared_layers=2),
            "later layers of LlamaConfig attend to the keys and values of earlier ones: expected",
        ),
    ],
)
def test_other_layers_are_refused_by_name(config, text):
    with pytest.raises(UnsupportedError, match=text):
        KVarNStaticCache(config, PRESET)


def test_settings_are_those_of_a_kvarn_cache():
    config = LlamaConfig(num_hidden_layers=2)
    with pytest.raises(ConfigError, match="hold -1: expected at least 0"):
        KVarNStaticCache(config, PRESET, hold=-1)
    with pytest.raises(ConfigError, match="max_tokens 0: expected at least 1"):
        KVarNStaticCache(config, PRESET, max_tokens=0)
    with pytest.raises(ConfigError, match="turbo"):
        KVarNStaticCache(config, "turbo")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_attention_is_refused_when_traced(implementation):
    model = make()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        refused_when_traced(model, "in a compiled model: expected the attention implementation 'kvarn'")


def test_grad_is_refused_when_traced():
    model = make()
    with torch.no_grad():
        cache = filled(model)
    model.requires_grad_(True)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match="keys or values require grad: expected inference"):
        step(tokens(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 70


def test_a_4d_mask_is_refused_when_traced(model):
    mask = torch.ones(2, 1, 1, 71, dtype=torch.bool)
    refused_when_traced(model, "attention with a 4D mask, a position bias, dropout", attention_mask=mask)


def test_a_mask_that_is_not_causal_is_refused_when_traced(model, monkeypatch):
    from transformers.models.llama import modeling_llama

    made = modeling_llama.create_causal_mask

    def bidirectional(**options):
        return made(or_mask_function=lambda batch, head, query, key: key >= 0, **options)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", bidirectional)
    torch._dynamo.reset()
    cache = KVarNStaticCache(model.config, PRESET)
    step = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match="a mask that is not plainly causal with a KVarNStaticCache"):
        step(tokens(2, 1), past_key_values=cache)
    # Eagerly it is applied, from dense tensors.
    run(model, cache, [tokens(2, 70)])
    run(model, cache, [tokens(2, 3)])
    assert cache.materializations > 0


def q(columns=1, batch=2):
    return torch.randn(batch, HEADS, columns, D)


def kv(columns=1, batch=2, dtype=torch.float32):
    return torch.randn(batch, KV_HEADS, columns, D).to(dtype)


def attend(cache, layer, query, k, v, mask=None):
    return torch.ops.kvarn.cache_attend(cache.handle, layer, query, k, v, mask, 0.2, None, None, None)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((q(batch=3), kv(batch=3), kv(batch=3)), ShapeError, "batch 3: expected 2, the rows"),
        ((q(), kv(), kv(2)), ShapeError, "expected the same shape"),
        ((q(), kv(dtype=torch.float16), kv(dtype=torch.float16)), DTypeError, "and the same as at first"),
        (
            (q(), kv(), kv(), torch.ones(2, 9).bool()),
            ShapeError,
            r"attention_mask \[2, 9\]: expected \[2, 71\]",
        ),
    ],
)
def test_bad_tensors_change_nothing(model, arguments, error, text):
    cache, untouched = filled(model), filled(model)
    with pytest.raises(error, match=text):
        attend(cache, 0, *arguments)
    with torch.no_grad():
        ids = tokens(2, 1, seed=2)
        assert torch.equal(run(model, cache, [ids]), run(model, untouched, [ids]))


def test_the_handle_of_a_cache_that_is_gone(model):
    cache = filled(model)
    handle = cache.handle.clone()
    assert int(torch.ops.kvarn.cache_columns(handle, torch.device("cpu"))) == 70
    del cache
    gc.collect()
    with pytest.raises(StateError, match=rf"cache handle {int(handle)}: expected that of a KVarNStaticCache"):
        torch.ops.kvarn.cache_columns(handle, torch.device("cpu"))


@pytest.mark.parametrize("util", ["test_schema", "test_autograd_registration", "test_faketensor"])
def test_the_operators_pass_torchs_checks(model, util):
    cache = filled(model)
    options = (None, 0.2, 40, 3.0, torch.zeros(HEADS))
    attention = torch.ops.kvarn.cache_attend.default
    # Each call begins the forward pass anew, as its first layer.
    for columns in (1, 3):
        arguments = (cache.handle, 0, q(columns), kv(columns), kv(columns), *options)
        torch.library.opcheck(attention, arguments, test_utils=util)
    # The strides that models give: heads before columns.
    query, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q(3), kv(3), kv(3)))
    torch.library.opcheck(attention, (cache.handle, 0, query, k, v, *options), test_utils=util)
    columns = torch.ops.kvarn.cache_columns.default
    torch.library.opcheck(columns, (cache.handle, torch.device("cpu")), test_utils=util)
    assert cache.get_seq_length() == 70


@pytest.mark.parametrize("name", ["cache_attend", "cache_columns"])
def test_the_operators_stay_out_of_cuda_graphs(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.kvarn, name).default.tags
