"""Rows of a batch: reordered, selected, reset, short of memory, and left by a broken forward pass."""

import copy
import gc

import kvarn
import pytest
import torch
from fake_quant import FakeQuantCache
from kvarn import CapacityError, ConfigError, KVarNCache, ShapeError
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


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1], [1, 1, 0, 1], [3, 3, 3, 3]])
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


def test_repeated_rows_go_their_own_ways(model, expected, preset):
    def repeated():
        cache, mask = fed(model, FakeQuantCache(model.config, preset, padding=PADDING))
        cache.batch_repeat_interleave(3)
        for layer in cache.layers:
            layer.padding = [padding for padding in PADDING for _ in range(3)]
        return go_on(model, cache, mask.repeat_interleave(3, 0))

    cache, mask = fed(model, KVarNCache(model.config, preset))
    before = cache.pool.stats()
    cache.batch_repeat_interleave(3)
    shared = cache.pool.stats()
    assert (shared.pages_used, shared.slots_used) == (before.pages_used, before.slots_used)
    assert_close(go_on(model, cache, mask.repeat_interleave(3, 0)), expected(repeated))
    with pytest.raises(ShapeError, match=r"batch_repeat_interleave\(0\): expected at least 1"):
        cache.batch_repeat_interleave(0)


def test_copies_share_what_was_stored(model, preset):
    prompt, untouched = (fed(model, KVarNCache(model.config, preset))[0] for _ in range(2))
    _, mask = left_padding(4, 150, PADDING)
    used = prompt.pool.stats()
    one, two = copy.deepcopy(prompt), copy.deepcopy(prompt)
    assert one.pool is prompt.pool
    assert prompt.pool.stats().pages_used == used.pages_used
    assert prompt.pool.stats().sequences == 12
    expected = go_on(model, untouched, mask)
    assert torch.equal(go_on(model, one, mask), expected)
    other = torch.flip(tokens(4, 40, seed=2), [1])
    run(model, two, other.split(8, 1), torch.cat([mask, torch.ones_like(other)], 1))
    assert torch.equal(go_on(model, prompt, mask), expected)
    one.reset()
    assert prompt.pool.stats().sequences == 8
    del two
    gc.collect()
    assert prompt.pool.stats().sequences == 4
    assert prompt.get_seq_length() == 190


def test_a_copy_of_an_empty_cache(model, preset):
    made = copy.deepcopy(KVarNCache(model.config, preset))
    chunks = [tokens(1, 150), tokens(1, 1)]
    assert torch.equal(run(model, made, chunks), run(model, KVarNCache(model.config, preset), chunks))


def test_more_rows_than_there_is_room_for(model, preset):
    cache, mask = fed(model, KVarNCache(model.config, preset, max_rows=7))
    untouched, _ = fed(model, KVarNCache(model.config, preset))
    for refused in (
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.reorder_cache(torch.zeros(8, dtype=torch.long)),
        lambda: copy.deepcopy(cache),
    ):
        with pytest.raises(
            CapacityError, match="8 rows, copies of the cache included: expected at most max_rows=7"
        ):
            refused()
    assert torch.equal(go_on(model, cache, mask), go_on(model, untouched, mask))
    with pytest.raises(CapacityError, match="2 rows"):
        run(model, KVarNCache(model.config, preset, max_rows=1), [tokens(2, 3)])
    with pytest.raises(ConfigError, match="max_rows 0: expected at least 1"):
        KVarNCache(model.config, preset, max_rows=0)


@pytest.mark.parametrize("prompt", [10, 127, 128, 150])
def test_beams(model, preset, prompt):
    """Beams diverge within a tile, across its end, and behind it."""
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 40, "do_sample": False}
    settings |= {"output_scores": True, "return_dict_in_generate": True, "eos_token_id": None}
    # Of another prompt two beams are level, and change places by a rounding.
    found, expected = (
        model.generate(tokens(2, prompt, seed=2), past_key_values=made(model.config, preset), **settings)
        for made in (KVarNCache, FakeQuantCache)
    )
    assert_close(found.sequences_scores, expected.sequences_scores)
    assert torch.equal(found.sequences, expected.sequences)


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


@pytest.mark.parametrize("tokens_then", [1, 40])
def test_attention_that_raises_in_the_last_layer_is_taken_back(
    model, preset, implementation, tokens_then, monkeypatch
):
    """Though by then every layer may have appended."""
    model.set_attn_implementation(implementation)
    cache, untouched = KVarNCache(model.config, preset), KVarNCache(model.config, preset)
    for one in (cache, untouched):
        run(model, one, [tokens(2, 150)])
    operation = "attend" if implementation == "kvarn" else "expand"
    done, last = getattr(kvarn.Step, operation), model.config.num_hidden_layers - 1

    def fails(step, layer, *arguments, **options):
        if layer == last:
            raise KeyboardInterrupt
        return done(step, layer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kvarn.Step, operation, fails)
        with pytest.raises(KeyboardInterrupt):
            run(model, cache, [tokens(2, tokens_then, seed=2)])
    assert cache.get_seq_length() == 150
    rest = [tokens(2, 1, seed=3), tokens(2, 20, seed=4)]
    assert torch.equal(run(model, cache, rest), run(model, untouched, rest))
