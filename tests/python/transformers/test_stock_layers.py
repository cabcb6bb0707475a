"""Sliding and linear layers beside KVarN layers: rows and crops reach all of them, or none."""

import copy

import pytest
import torch
from kvarn import ConfigError, KVarNCache
from kvarn.integrations.transformers import UnsupportedError
from matrix_models import MODELS, WINDOW, model
from tiny_models import assert_close, left_padding, run, tiny, tokens
from transformers import DeepseekV3Config, Gemma3Config, Lfm2Config, Lfm2ForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

PRESET = "kvarn_k4v4_g64"
MIXED = ("Gemma 3", "Qwen3-Next", "gpt-oss")


@pytest.fixture(params=MIXED)
def mixed(request):
    made = model(request.param, torch.float32, "cpu")
    made.set_attn_implementation("kvarn")
    return made


@pytest.fixture
def gemma():
    made = model("Gemma 3", torch.float32, "cpu")
    made.set_attn_implementation("kvarn")
    return made


def fed(model, rows=4, padding=(0, 20, 13, 7)):
    cache = KVarNCache(model.config, PRESET)
    ids, mask = left_padding(rows, 150, padding[:rows])
    run(model, cache, [ids], mask)
    return cache, mask


def go_on(model, cache, mask, rest):
    return run(model, cache, rest.split(1, 1), torch.cat([mask, torch.ones_like(rest)], 1))


def test_stock_layers_are_those_of_transformers():
    for name, kind in (("Gemma 3", DynamicSlidingWindowLayer), ("Qwen3-Next", LinearAttentionLayer)):
        layers = KVarNCache(model(name, torch.float32, "cpu").config).layers
        assert [type(layer) is kind for layer in layers] == [True, False] * 2


@pytest.mark.parametrize(
    "indices", [torch.tensor([2, 0, 3, 1]), torch.tensor([3, 3]), torch.tensor([False, True, True, False])]
)
def test_rows_are_selected_in_every_layer(mixed, indices):
    rest = tokens(4, 10, seed=2)
    cache, mask = fed(mixed)
    expected = go_on(mixed, cache, mask, rest).view(4, 10, -1)[indices]
    cache, _ = fed(mixed)
    cache.batch_select_indices(indices)
    assert_close(go_on(mixed, cache, mask[indices], rest[indices]).view_as(expected), expected)


def test_rows_are_repeated_in_every_layer(mixed):
    rest = tokens(4, 10, seed=2)
    cache, mask = fed(mixed, rows=2)
    whole = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    found = go_on(mixed, cache, mask.repeat_interleave(2, 0), rest).view(4, 10, -1)
    for first in (0, 1):
        alone = go_on(mixed, copy.deepcopy(whole), mask, rest[first::2]).view(2, 10, -1)
        assert_close(found[first::2], alone)


def test_an_empty_cache_has_no_rows_to_move(mixed):
    cache = KVarNCache(mixed.config, PRESET)
    cache.batch_select_indices(torch.tensor([0, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.crop(-3)
    assert cache.get_seq_length() == 0
    chunks = [tokens(1, 150), tokens(1, 1)]
    assert torch.equal(run(mixed, cache, chunks), run(mixed, KVarNCache(mixed.config, PRESET), chunks))


def test_zero_removes_nothing(mixed):
    chunks = [tokens(1, 150), *tokens(1, 30, seed=2).split(5, 1)]
    plain, cropped, parts = KVarNCache(mixed.config, PRESET), KVarNCache(mixed.config, PRESET), []
    for chunk in chunks:
        parts.append(run(mixed, cropped, [chunk]))
        cropped.crop(0)
    assert torch.equal(torch.cat(parts), run(mixed, plain, chunks))


@pytest.mark.parametrize("remove", [150, 10_000])
def test_everything_can_be_removed(mixed, remove):
    cache, _ = fed(mixed)
    cache.crop(-remove)
    assert cache.get_seq_length() == 0
    chunks = [tokens(4, 130, seed=5), tokens(4, 1, seed=6)]
    assert torch.equal(run(mixed, cache, chunks), run(mixed, KVarNCache(mixed.config, PRESET), chunks))


def test_reset_takes_another_batch(mixed):
    cache, _ = fed(mixed)
    cache.reset()
    assert cache.get_seq_length() == 0
    chunks = [tokens(2, 150), tokens(2, 1)]
    assert torch.equal(run(mixed, cache, chunks), run(mixed, KVarNCache(mixed.config, PRESET), chunks))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("Gemma 3", RuntimeError, "activate_past_recording"),
        ("gpt-oss", RuntimeError, "activate_past_recording"),
        (
            "Qwen3-Next",
            UnsupportedError,
            r"crop\(-2\): layer 0 \(LinearAttentionLayer\) keeps a state of all",
        ),
    ],
)
def test_a_refused_crop_changes_nothing(name, kind, message):
    made = model(name, torch.float32, "cpu")
    made.set_attn_implementation("kvarn")
    rest = tokens(4, 4, seed=2)
    cache, mask = fed(made)
    untouched, _ = fed(made)
    with pytest.raises(kind, match=message):
        cache.crop(-2)
    assert cache.get_seq_length() == 150
    assert torch.equal(go_on(made, cache, mask, rest), go_on(made, untouched, mask, rest))


def test_layers_before_the_one_that_refuses_are_restored(gemma):
    cache, mask = fed(gemma)
    cache.activate_past_recording()
    rest = tokens(4, 4, seed=2)
    run(gemma, cache, [rest], torch.cat([mask, torch.ones_like(rest)], 1))
    first, last = (layer for layer in cache.layers if layer.is_sliding)
    last.record_past = False
    before = first.keys
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-2)
    assert first.keys is before
    assert first.get_seq_length() == cache.get_seq_length() == 154


def test_convolutions_alone_can_be_cropped():
    """A layer that keeps a window of its inputs, and no state of all of them, takes drafts back."""
    changes = {
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    }
    made = tiny(Lfm2Config, Lfm2ForCausalLM, **changes)
    made.set_attn_implementation("kvarn")
    prompt, draft, rest = tokens(2, 150), tokens(2, 6, seed=2), tokens(2, 5, seed=3).split(1, 1)
    cache, plain = KVarNCache(made.config, PRESET), KVarNCache(made.config, PRESET)
    for one, chunk in ((cache, draft), (plain, draft[:, :2])):
        one.activate_past_recording()
        run(made, one, [prompt])
        one.crop(0)
        run(made, one, [chunk])
    cache.crop(-4)
    plain.crop(0)
    assert_close(run(made, cache, rest), run(made, plain, rest))


def test_a_window_wider_than_the_text_crops_like_any_layer(gemma):
    cache, plain = KVarNCache(gemma.config, PRESET), KVarNCache(gemma.config, PRESET)
    prompt, rest = tokens(1, WINDOW - 5), tokens(1, 50, seed=2).split(1, 1)
    run(gemma, cache, [prompt])
    cache.crop(-10)
    run(gemma, plain, [prompt[:, :-10]])
    assert_close(run(gemma, cache, rest), run(gemma, plain, rest))


def test_latent_attention_is_refused_by_name():
    config = DeepseekV3Config(num_hidden_layers=2, kv_lora_rank=32, qk_rope_head_dim=16)
    with pytest.raises(
        UnsupportedError,
        match=r"layer 0 of DeepseekV3Config caches a latent of 32 and a rotary key of 16 .*multi-head latent "
        r"attention.*use a DynamicCache",
    ):
        KVarNCache(config)


def test_a_head_dim_that_cannot_be_stored_names_the_layer(gemma):
    *classes, changes = MODELS["Gemma 3"]
    made = tiny(*classes, head_dim=20, **changes)
    with pytest.raises(ConfigError, match="layer 1: head_dim 20"):
        run(made, KVarNCache(made.config), [tokens(1, 3)])


def test_the_text_model_of_a_multimodal_config():
    config = Gemma3Config(text_config=model("Gemma 3", torch.float32, "cpu").config.to_dict())
    assert [layer.is_sliding for layer in KVarNCache(config).layers] == [True, False] * 2
