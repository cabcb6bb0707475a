"""Layers without a model: both caches get the same tensors, so low bits agree to the last digits."""

import pytest
import torch
from fake_quant import FakeQuantCache
from kvarn import KVarNCache
from kvarn.integrations.transformers.attention import attention
from kvarn.integrations.transformers.handle import Handle
from transformers import LlamaConfig

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 6, 2, 48
# Every order of attention and append: a prompt, long and short chunks, single tokens over two tile
# boundaries.
CHUNKS = [150, 40, 1, 1, 16, 17, 3, *[1] * 40, 90, 1]
# Records are multiplied in integers of 16 bits.
ATOL = 4e-4


@pytest.fixture
def config():
    return LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
    )


def attention_module():
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS
    return module


def layer_states(batch, columns, generator):
    q = torch.randn(batch, columns, HEADS, HEAD_DIM, generator=generator).transpose(1, 2)
    k, v = (
        torch.randn(batch, columns, KV_HEADS, HEAD_DIM, generator=generator).transpose(1, 2) for _ in range(2)
    )
    return q, k, v


@pytest.mark.parametrize("preset", ["kvarn_k2v2_g64", "kvarn_k3v8_g64", "kvarn_k4v2_g128"])
@pytest.mark.parametrize("hold", [None, 0, 2])
@pytest.mark.parametrize("implementation", ["kvarn", "sdpa"])
def test_every_step(config, preset, hold, implementation):
    config._attn_implementation = implementation
    cache, reference = KVarNCache(config, preset, hold=hold), FakeQuantCache(config, preset, hold=hold)
    generator, module = torch.Generator().manual_seed(0), attention_module()
    for columns in CHUNKS:
        for layer in range(LAYERS):
            q, k, v = layer_states(2, columns, generator)
            expected = reference.update(k, v, layer)
            states = cache.update(k, v, layer)
            assert isinstance(states[0], Handle) == (implementation == "kvarn")
            assert states[0].shape == expected[0].shape
            if implementation == "kvarn":
                # Any tensors but handles are attended to densely.
                out, wanted = (attention(module, q, *pair, None)[0] for pair in (states, expected))
                torch.testing.assert_close(out, wanted, rtol=0, atol=ATOL)
            else:
                for ours, theirs in zip(states, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL)


def test_a_handle_is_read_again(config):
    # Models whose later layers attend to the keys and values of an earlier one.
    config.num_kv_shared_layers = 0
    config._attn_implementation = "kvarn"
    cache, reference = (kind(config, "kvarn_k4v2_g64", hold=0) for kind in (KVarNCache, FakeQuantCache))
    cache._rows.sharing = True
    generator, module = torch.Generator().manual_seed(0), attention_module()
    for columns in CHUNKS:
        handles, expected = [], []
        for layer in range(LAYERS):
            q, k, v = layer_states(1, columns, generator)
            handles.append(cache.update(k, v, layer))
            expected.append(reference.update(k, v, layer))
            attention(module, q, *handles[-1], None)
        for shared, theirs in zip(handles, expected, strict=True):
            out, wanted = (attention(module, q, *pair, None)[0] for pair in (shared, theirs))
            torch.testing.assert_close(out, wanted, rtol=0, atol=ATOL)
    assert cache.get_seq_length() == sum(CHUNKS)
    assert cache.materializations == 0


def test_any_operation_on_a_handle_sees_its_values(config):
    config._attn_implementation = "kvarn"
    cache, reference = KVarNCache(config, "kvarn_k4v2_g64"), FakeQuantCache(config, "kvarn_k4v2_g64")
    generator = torch.Generator().manual_seed(0)
    for columns in (150, 1):
        for layer in range(LAYERS):
            _, k, v = layer_states(2, columns, generator)
            handles, expected = cache.update(k, v, layer), reference.update(k, v, layer)
            for handle, wanted in zip(handles, expected, strict=True):
                assert handle.dtype == wanted.dtype
                assert f"{tuple(wanted.shape)}" in repr(handle)
                sums = handle.sum(dim=-1)
                assert type(sums) is torch.Tensor
                torch.testing.assert_close(sums, wanted.sum(dim=-1), rtol=0, atol=1e-4)
                torch.testing.assert_close(torch.cat([k, handle], dim=2), torch.cat([k, wanted], dim=2))
    # Keys and values of an update are built together.
    assert cache.materializations == 2 * LAYERS
    assert cache.get_seq_length() == 151


@pytest.mark.parametrize(
    "option", [{"softcap": 3.0}, {"sliding_window": 40}, {"sinks": True}, {"scaling": 0.3}]
)
@pytest.mark.parametrize("padded", [False, True])
def test_options_of_the_attention_function(config, option, padded):
    option = dict(option)
    if option.pop("sinks", False):
        option["s_aux"] = torch.randn(HEADS, generator=torch.Generator().manual_seed(1))
    config._attn_implementation = "kvarn"
    padding = [0, 20] if padded else [0, 0]
    cache = KVarNCache(config, "kvarn_k4v4_g64")
    reference = FakeQuantCache(config, "kvarn_k4v4_g64", padding=padding)
    generator, module = torch.Generator().manual_seed(0), attention_module()
    past = 0
    for columns in CHUNKS:
        past += columns
        mask = torch.arange(past) >= torch.tensor(padding)[:, None] if padded else None
        for layer in range(LAYERS):
            q, k, v = layer_states(2, columns, generator)
            pairs = cache.update(k, v, layer), reference.update(k, v, layer)
            out, wanted = (attention(module, q, *pair, mask, **option)[0] for pair in pairs)
            shown = slice(None) if mask is None else mask[:, -columns:]
            torch.testing.assert_close(out[shown], wanted[shown], rtol=0, atol=ATOL)
    assert cache.materializations == 0


def test_a_window_counts_columns_of_padding_too(config):
    # Shorter than the sinks, the cache is exact: only what is seen can differ.
    config._attn_implementation = "kvarn"
    cache, reference = KVarNCache(config, "kvarn_k4v4_g128"), FakeQuantCache(config, "kvarn_k4v4_g128")
    generator, module = torch.Generator().manual_seed(0), attention_module()
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[1, 30:50] = False
    past = 0
    for columns in (40, 30, 1, 9):
        past += columns
        for layer in range(LAYERS):
            q, k, v = layer_states(2, columns, generator)
            pairs = cache.update(k, v, layer), reference.update(k, v, layer)
            out, wanted = (
                attention(module, q, *pair, mask[:, :past], sliding_window=25)[0] for pair in pairs
            )
            shown = mask[:, past - columns : past]
            torch.testing.assert_close(out[shown], wanted[shown], rtol=0, atol=ATOL)


def test_layers_of_different_shapes(config):
    # By the config the last layer has twice the KV heads, and half the head dim.
    config.per_layer_config = {2: {"num_key_value_heads": 2 * KV_HEADS, "head_dim": HEAD_DIM // 3}}
    config._attn_implementation = "sdpa"
    cache = KVarNCache(config, "kvarn_k8v8_g64")
    generator = torch.Generator().manual_seed(0)
    # A tensor-parallel rank holds one head of two.
    shapes = [(1, HEAD_DIM), (1, HEAD_DIM), (2, HEAD_DIM // 3)]
    for columns in (200, 1):
        for layer, (heads, head_dim) in enumerate(shapes):
            k, v = (torch.randn(1, heads, columns, head_dim, generator=generator) for _ in range(2))
            keys, values = cache.update(k, v, layer)
            torch.testing.assert_close(keys[:, :, -columns:], k)
            torch.testing.assert_close(values[:, :, -columns:], v)
    assert cache.get_seq_length() == 201
