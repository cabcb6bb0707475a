"""Masks under "kvarn": padding anywhere, hidden tokens, custom masks, and other caches."""

import pytest
import torch
from fake_quant import FakeQuantCache
from kvarn import KVarNCache, ShapeError
from tiny_models import assert_close, left_padding, run, tokens
from transformers import DynamicCache, StaticCache


def test_right_padding(model, preset):
    ids, mask = tokens(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[1, 70:] = 0
    rest = tokens(2, 3, seed=2)
    cache, alone = KVarNCache(model.config, preset), KVarNCache(model.config, preset)
    run(model, cache, [ids], mask)
    logits = run(model, cache, [rest], torch.cat([mask, torch.ones_like(rest)], 1))
    run(model, alone, [ids[1:, :70]])
    assert_close(logits.view(2, 3, -1)[1], run(model, alone, [rest[1:]]))
    assert cache.materializations == 0


def test_padding_between_turns(model, preset):
    first, mask = left_padding(2, 140, [30, 0])
    second, second_mask = left_padding(2, 50, [0, 20])
    both = torch.cat([mask, second_mask], 1)
    cache, alone = KVarNCache(model.config, preset), KVarNCache(model.config, preset)
    run(model, cache, [first], mask)
    logits = run(model, cache, [second], both)
    run(model, alone, [first[1:]])
    assert_close(logits[-30:], run(model, alone, [second[1:, 20:]]))
    assert cache.materializations == 0


def test_a_chunk_of_padding_between_turns(model, preset):
    first, mask = left_padding(2, 140, [30, 0])
    later = torch.cat([torch.zeros(2, 20, dtype=torch.long), torch.ones(2, 4, dtype=torch.long)], 1)
    mask = torch.cat([mask, later], 1)
    rest = tokens(2, 24, seed=2)
    cache, plain = KVarNCache(model.config, preset), KVarNCache(model.config, preset)
    run(model, cache, [first], mask[:, :140])
    # Twice: the first chunk commits what the prompt held, the second has nothing to do.
    logits = run(model, cache, rest.split([10, 10, 4], 1), mask)
    shown = torch.cat([mask[:, :140], mask[:, 160:]], 1)
    run(model, plain, [first], shown[:, :140])
    assert_close(logits, run(model, plain, [rest[:, 20:]], shown))


def test_chunks_of_nothing_but_padding(model, expected, preset):
    padding = [90, 75]
    ids, mask = left_padding(2, 150, padding)
    chunks = ids.split([30, 10, 30, 80], 1)
    reference = expected(
        lambda: run(model, FakeQuantCache(model.config, preset, padding=padding), chunks, mask)
    )
    assert_close(run(model, KVarNCache(model.config, preset), chunks, mask), reference)


@pytest.mark.parametrize("new", [1, 30])
def test_hidden_tokens_are_masked_at_a_price(model, expected, preset, new):
    ids, rest = tokens(2, 150), tokens(2, new, seed=2)
    mask = torch.ones(2, 150 + new, dtype=torch.long)
    mask[0, 20:60] = 0

    def hidden(cache):
        run(model, cache, [ids])
        return run(model, cache, [rest], mask)

    reference = expected(lambda: hidden(FakeQuantCache(model.config, preset)))
    cache = KVarNCache(model.config, preset)
    assert_close(hidden(cache), reference)
    assert cache.materializations == model.config.num_hidden_layers


def test_a_custom_4d_mask_is_applied_at_a_price(model, expected, preset):
    ids, rest = tokens(1, 150), tokens(1, 20, seed=2)
    mask = torch.zeros(1, 1, 20, 170)
    mask[..., :5] = torch.finfo(torch.float32).min
    mask[..., 150:] = torch.full((20, 20), torch.finfo(torch.float32).min).triu(1)
    positions = torch.arange(150, 170)[None]

    def custom(cache):
        run(model, cache, [ids])
        return model(rest, past_key_values=cache, attention_mask=mask, position_ids=positions).logits[0]

    reference = expected(lambda: custom(FakeQuantCache(model.config, preset)))
    cache = KVarNCache(model.config, preset)
    assert_close(custom(cache), reference)
    assert cache.materializations == model.config.num_hidden_layers


def test_padding_cannot_be_shown_later(model, preset):
    ids, mask = left_padding(2, 40, [0, 5])
    cache, untouched = KVarNCache(model.config, preset), KVarNCache(model.config, preset)
    for one in (cache, untouched):
        run(model, one, [ids], mask)
    rest, shown = tokens(2, 1, seed=2), torch.ones(2, 41, dtype=torch.long)
    for given in (shown, None):
        with pytest.raises(ShapeError, match="attention_mask shows column 0 of row 1: expected 0"):
            run(model, cache, [rest], given)
    mask = torch.cat([mask, torch.ones_like(rest)], 1)
    assert torch.equal(run(model, cache, [rest], mask), run(model, untouched, [rest], mask))


def test_a_mask_of_the_new_tokens_only_is_refused(model, preset):
    cache = KVarNCache(model.config, preset)
    run(model, cache, [tokens(2, 40)])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ShapeError, match=r"attention_mask \[2, 3\]: expected \[2, 43\]"):
        model(tokens(2, 3), past_key_values=cache, attention_mask=mask)


def test_given_padding_agrees_with_the_mask(model, preset):
    padding = [0, 70, 13]
    ids, mask = left_padding(3, 150, padding)
    chunks = [ids[:, :149], ids[:, 149:]]
    told = run(model, KVarNCache(model.config, preset, padding=padding), chunks, mask)
    assert torch.equal(told, run(model, KVarNCache(model.config, preset), chunks, mask))


@pytest.mark.parametrize("padding", [None, [0, 40, 7]])
@pytest.mark.parametrize("chunks", [[60], [30, 30], [50, 1, 9]])
def test_other_caches_under_kvarn(model, expected, padding, chunks):
    ids, mask = left_padding(3, 60, padding or [0, 0, 0])
    mask = None if padding is None else mask
    chunks = ids.split(chunks, 1)
    reference = expected(lambda: run(model, DynamicCache(), chunks, mask))
    assert_close(run(model, DynamicCache(), chunks, mask), reference)
    assert_close(run(model, StaticCache(config=model.config, max_cache_len=100), chunks, mask), reference)


def test_no_cache_under_kvarn(model, expected):
    ids, mask = left_padding(2, 60, [0, 9])

    def logits():
        return model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]

    assert_close(logits(), expected(logits))
