"""Rows of a batch: reordered, selected, reset, short of memory, and left by a broken forward pass."""

import copy

import pytest
import torch
from fake_quant import FakeQuantCache
from kvarn import CapacityError, KVarNCache, ShapeError
from kvarn.integrations.transformers import UnsupportedError
from tiny_models import assert_close, left_padding, run, tokens

PADDING = [0, 70, 13, 40]


def fed(model, cache):
    ids, mask = left_padding(4, 150, PADDING)
    run(model, cache, [ids], mask)
    return cache, mask


def go_on(model, cache, mask):
    rest = tokens(len(mask), 40, seed=2)
    return run(model, cache, rest.split(1, 1), torch.cat([mask, torch.ones_like(rest)], 1))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_reorder(model, expected, preset, order):
    order = torch.tensor(order)
    padding = [PADDING[row] for row in order]

    def reordered():
        cache, mask = fed(model, FakeQuantCache(model.config, preset, padding=PADDING))
        cache.batch_select_indices(order)
        for layer in cache.layers:
            layer.padding = padding
        return go_on(model, cache, mask[order])

    cache, mask = fed(model, KVarNCache(model.config, preset))
    cache.reorder_cache(order)
    assert_close(go_on(model, cache, mask[order]), expected(reordered))


@pytest.mark.parametrize(
    "indices", [torch.tensor([3, 1]), torch.tensor([-1, 1]), torch.tensor([False, True, False, True])]
)
def test_select_frees_the_other_rows(model, preset, indices):
    cache, mask = fed(model, KVarNCache(model.config, preset))
    whole, _ = fed(model, KVarNCache(model.config, preset))
    used = cache.pool.stats()
    cache.batch_select_indices(indices)
    kept = cache.pool.stats()
    assert kept.sequences == 2
    assert kept.slots_used < used.slots_used
    rest = torch.randint(2, 90, (4, 6), generator=torch.Generator().manual_seed(4))
    ones = torch.ones_like(rest)
    every = run(model, whole, [rest], torch.cat([mask, ones], 1)).view(4, 6, -1)[indices]
    assert_close(run(model, cache, [rest[indices]], torch.cat([mask, ones], 1)[indices]), every.flatten(0, 1))


def test_forks_are_refused(model, preset):
    cache, mask = fed(model, KVarNCache(model.config, preset))
    untouched, _ = fed(model, KVarNCache(model.config, preset))
    with pytest.raises(
        UnsupportedError, match="reorder_cache takes row 1 2 times: expected each row at most once"
    ):
        cache.reorder_cache(torch.tensor([1, 1, 0, 3]))
    with pytest.raises(UnsupportedError, match=r"batch_repeat_interleave\(2\): expected 1"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(UnsupportedError, match="copy of a KVarNCache"):
        copy.deepcopy(cache)
    cache.batch_repeat_interleave(1)
    assert torch.equal(go_on(model, cache, mask), go_on(model, untouched, mask))


def test_beams_are_refused(model, preset):
    with pytest.raises(UnsupportedError, match="use num_beams=1"):
        model.generate(
            tokens(1, 10), past_key_values=KVarNCache(model.config, preset), num_beams=3, max_new_tokens=30
        )


def test_one_layer_alone_is_refused(model, preset):
    layer = KVarNCache(model.config, preset).layers[0]
    for operation, argument in (
        ("crop", -1),
        ("reorder_cache", torch.tensor([0])),
        ("batch_select_indices", torch.tensor([0])),
        ("batch_repeat_interleave", 2),
    ):
        with pytest.raises(
            UnsupportedError, match=f"{operation} of layer 0 alone: expected all layers at once"
        ):
            getattr(layer, operation)(argument)
    for operation in ("offload", "prefetch"):
        with pytest.raises(UnsupportedError, match="call it on the KVarNCache"):
            getattr(layer, operation)()


def test_reset(model, preset):
    cache, _ = fed(model, KVarNCache(model.config, preset))
    with pytest.raises(ShapeError, match=r"batch 1: expected 4.*call reset\(\) first"):
        run(model, cache, [tokens(1, 3)])
    cache.reset()
    assert cache.pool is None
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized
    chunks = [tokens(1, 150), tokens(1, 1)]
    assert torch.equal(run(model, cache, chunks), run(model, KVarNCache(model.config, preset), chunks))


def test_too_many_tokens(model, preset):
    cache, roomy = (KVarNCache(model.config, preset, max_tokens=limit) for limit in (130, 300))
    assert cache.get_max_length() == 130
    chunk, more = tokens(2, 125), tokens(2, 5, seed=2)
    with pytest.raises(CapacityError, match="131 tokens: expected at most max_tokens=130"):
        run(model, cache, [tokens(2, 131)])
    for one in (cache, roomy):
        run(model, one, [chunk])
    with pytest.raises(CapacityError, match="131 tokens"):
        run(model, cache, [tokens(2, 6)])
    assert cache.get_seq_length() == 125
    assert torch.equal(run(model, cache, [more]), run(model, roomy, [more]))


@pytest.mark.parametrize("broken", ["mlp", "o_proj", "q_proj"])
@pytest.mark.parametrize("tokens_then", [1, 40])
def test_a_broken_forward_pass_is_taken_back(model, preset, implementation, broken, tokens_then):
    model.set_attn_implementation(implementation)
    cache, untouched = KVarNCache(model.config, preset), KVarNCache(model.config, preset)
    prompt, lost = tokens(2, 150), tokens(2, tokens_then, seed=2)
    rest = [tokens(2, 1, seed=3), tokens(2, 20, seed=4), *tokens(2, 60, seed=5).split(1, 1)]
    for one in (cache, untouched):
        run(model, one, [prompt])
    layer = model.model.layers[-1]
    module = layer.mlp if broken == "mlp" else getattr(layer.self_attn, broken)

    def fail(*_):
        raise KeyboardInterrupt

    hook = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(model, cache, [lost])
    finally:
        hook.remove()
    # With one layer, or behind the last attention, every layer has the tokens: the pass is whole.
    whole = broken != "q_proj"
    assert cache.get_seq_length() == 150 + (tokens_then if whole else 0)
    if whole:
        cache.crop(-tokens_then)
    assert_close(run(model, cache, rest), run(model, untouched, rest))
