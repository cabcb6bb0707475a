"""`crop` takes back the newest tokens exactly; further back it cuts into records, and goes on from there."""

import copy

import numpy as np
import pytest
import torch
from fake_quant import FakeQuantCache
from kvarn import CapacityError, KVarNCache, ShapeError
from tiny_models import (
    assert_close,
    assert_same_generation,
    generate,
    left_padding,
    run,
    tokens,
)

G = 64


def test_a_cropped_draft_leaves_no_trace(model, expected, preset, implementation):
    model.set_attn_implementation(implementation)
    prompt, draft, rest = tokens(1, 3 * G - 2), tokens(1, 8, seed=2), tokens(1, 40, seed=3).split(1, 1)
    accepted = 3
    cache = KVarNCache(model.config, preset)
    run(model, cache, [prompt, draft])
    cache.crop(accepted - draft.shape[1])
    assert cache.get_seq_length() == prompt.shape[1] + accepted

    def drafted():
        cache = FakeQuantCache(model.config, preset)
        run(model, cache, [prompt, draft])
        cache.crop(accepted - draft.shape[1])
        return run(model, cache, rest)

    undrafted = KVarNCache(model.config, preset)
    run(model, undrafted, [prompt, draft[:, :accepted]])
    logits = run(model, cache, rest)
    assert_close(logits, expected(drafted))
    assert_close(logits, run(model, undrafted, rest))


@pytest.mark.parametrize("remove", [1, 17, G])
def test_a_prompt_can_lose_a_group(model, preset, remove):
    prompt, rest = tokens(1, 4 * G + 9), tokens(1, 5, seed=2).split(1, 1)
    cache, short = KVarNCache(model.config, preset), KVarNCache(model.config, preset, hold=G - remove)
    run(model, cache, [prompt])
    cache.crop(-remove)
    # The shorter prompt holds less, so that the same tokens are committed.
    run(model, short, [prompt[:, :-remove]])
    assert_close(run(model, cache, rest), run(model, short, rest))


def test_zero_removes_nothing(model, preset):
    chunks = [tokens(1, 150), *tokens(1, 30, seed=2).split(5, 1)]
    plain, cropped = KVarNCache(model.config, preset), KVarNCache(model.config, preset)
    cropped.crop(0)
    cropped.crop(-3)
    assert cropped.get_seq_length() == 0
    parts = []
    for chunk in chunks:
        parts.append(run(model, cropped, [chunk]))
        cropped.crop(0)
    assert torch.equal(torch.cat(parts), run(model, plain, chunks))


def test_sinks_can_be_cropped(model, preset):
    # A whole tile of sinks is never sealed, though its tokens are committed.
    chunks = [tokens(1, 3 * G, seed=2), tokens(1, 1, seed=3)]
    cache, short = KVarNCache(model.config, preset, hold=0), KVarNCache(model.config, preset, hold=0)
    prompt = tokens(1, 2 * G - 1)
    run(model, cache, [prompt])
    cache.crop(-G)
    run(model, short, [prompt[:, : G - 1]])
    assert_close(run(model, cache, chunks), run(model, short, chunks))


@pytest.mark.parametrize("remove", [150, 10_000])
def test_everything_can_be_removed(model, preset, remove):
    cache, fresh = KVarNCache(model.config, preset), KVarNCache(model.config, preset)
    run(model, cache, [tokens(1, 150)])
    cache.crop(-remove)
    assert cache.get_seq_length() == 0
    chunks = [tokens(1, 130, seed=5), tokens(1, 1, seed=6)]
    assert torch.equal(run(model, cache, chunks), run(model, fresh, chunks))


@pytest.mark.parametrize("sink_tokens", [None, 16, 0])
def test_records_are_cut_at_every_residue(models, sink_tokens):
    model, length = models["llama", 1], 4 * G + 9
    caches = [
        made(model.config, "kvarn_k4v2_g64", sink_tokens=sink_tokens) for made in (FakeQuantCache, KVarNCache)
    ]
    rest = [tokens(1, 2, seed=2), tokens(1, 1, seed=3)]
    logits = []
    for cache, implementation in zip(caches, ("sdpa", "kvarn"), strict=True):
        model.set_attn_implementation(implementation)
        # In two steps: nothing but the second is held.
        run(model, cache, [tokens(1, length - 1), tokens(1, 1, seed=4)])
        logits.append([])
        # The last tile, the one before it, the first one, and some lengths between.
        for remove in [*range(1, 2 * G + 12), 3 * G, *range(3 * G + 8, length)]:
            cut = copy.deepcopy(cache)
            cut.crop(-remove)
            assert cut.get_seq_length() == length - remove
            logits[-1].append(run(model, cut, rest))
    assert_close(torch.cat(logits[1]), torch.cat(logits[0]))
    assert caches[1].pool.stats().unsealed > G
    assert caches[1].get_seq_length() == length


@pytest.mark.parametrize("sink_tokens", [None, 16, 0])
@pytest.mark.parametrize("length", [40, G + 1, 2 * G - 1, 2 * G + 30])
def test_a_tile_that_was_cut_is_filled_and_sealed_again(
    model, expected, preset, implementation, length, sink_tokens
):
    first, second = tokens(1, 3 * G + 20), tokens(1, 2 * G, seed=2)
    rest = tokens(1, 20, seed=3).split(1, 1)

    def cut(made):
        cache = made(model.config, preset, sink_tokens=sink_tokens, hold=0)
        run(model, cache, [first])
        cache.crop(length - first.shape[1])
        return run(model, cache, [second, *rest])

    reference = expected(lambda: cut(FakeQuantCache))
    model.set_attn_implementation(implementation)
    assert_close(cut(KVarNCache), reference)


@pytest.mark.parametrize("hold", [None, 0])
def test_turns_that_take_back_what_was_said(model, expected, preset, implementation, hold):
    def turns(made):
        cache = made(model.config, preset, hold=hold)
        first = generate(model, cache, tokens(1, 150), new=80).tokens
        # Another answer to the same question, then another question in the middle of that answer.
        cache.crop(150 - 1 - cache.get_seq_length())
        second = generate(model, cache, first[:, :150], new=60, do_sample=True, top_k=20).tokens
        cache.crop(100 - cache.get_seq_length())
        return generate(model, cache, torch.cat([second[:, :100], tokens(1, 45, seed=2)], 1), new=30)

    reference = expected(lambda: turns(FakeQuantCache))
    model.set_attn_implementation(implementation)
    assert_same_generation(turns(KVarNCache), reference)


def test_rows_of_a_batch_are_cut_in_different_places(model, expected, preset):
    # Of row 3, which is the shortest, everything goes.
    padding = [0, 70, 13, 200]
    ids, mask = left_padding(4, 4 * G, padding)
    more, rest = tokens(4, 70, seed=2), tokens(4, 4, seed=3).split(1, 1)
    mask = torch.cat([mask, torch.ones(4, 74, dtype=torch.long)], 1)

    def cut(cache):
        run(model, cache, [ids], mask[:, : 4 * G])
        cache.crop(-100)
        length = 4 * G - 100
        return run(
            model, cache, [more, *rest], mask[:, : length + 74] | (torch.arange(length + 74) >= length)
        )

    reference = expected(lambda: cut(FakeQuantCache(model.config, preset, padding=padding)))
    assert_close(cut(KVarNCache(model.config, preset)), reference)


def test_a_copy_is_cut_alone(model, preset):
    cache, untouched = KVarNCache(model.config, preset), KVarNCache(model.config, preset)
    for one in (cache, untouched):
        run(model, one, [tokens(2, 3 * G + 5)])
    twin = copy.deepcopy(cache)
    twin.crop(-150)
    run(model, twin, [tokens(2, 70, seed=2)])
    rest = tokens(2, 10, seed=3).split(1, 1)
    assert torch.equal(run(model, cache, rest), run(model, untouched, rest))


@pytest.mark.parametrize("fails", ["another layer", "the second row"])
def test_a_crop_that_fails_changes_nothing(model, preset, monkeypatch, fails):
    cache, untouched = KVarNCache(model.config, preset), KVarNCache(model.config, preset)
    for one in (cache, untouched):
        run(model, one, [tokens(2, 4 * G)])
    pool, calls = cache.pool, []
    truncate = type(pool).truncate

    class Layer:
        is_initialized = is_croppable = True

        def crop(self, tokens_to_remove):
            raise CapacityError("as asked for")

    def second_fails(self, sequence, length):
        calls.append(length)
        if len(calls) == 2:
            raise CapacityError("as asked for")
        truncate(self, sequence, length)

    def state():
        stats = pool.stats()
        tables = [np.from_dlpack(one.block_table).tolist() for one in cache._rows.sequences]
        return stats.sequences, stats.pages_used, stats.slots_used, stats.tokens, tables

    before = state()
    with monkeypatch.context() as patch:
        if fails == "another layer":
            patch.setattr(cache, "_others", lambda: {0: Layer()})
        else:
            patch.setattr(type(pool), "truncate", second_fails)
        with pytest.raises(CapacityError, match="as asked for"):
            cache.crop(-100)
    assert (state(), cache.get_seq_length()) == (before, 4 * G)
    rest = tokens(2, 3, seed=2)
    assert torch.equal(run(model, cache, [rest]), run(model, untouched, [rest]))


def test_rows_always_have_a_slot_for_the_cut(model, preset):
    # As many rows as there is room for, each with its longest tail.
    cache = KVarNCache(model.config, preset, max_rows=3, hold=5, recent_tokens=20)
    run(model, cache, [tokens(3, 4 * G + 20 + G - 1 + 5)])
    for length in (3 * G + 1, 2 * G + 1, G + 1, 1):
        cache.crop(length - cache.get_seq_length())
        assert cache.get_seq_length() == length
    assert cache.pool.stats().unsealed == 9


def test_a_padded_batch(model, expected, preset):
    padding = [0, 70, 13]
    ids, mask = left_padding(3, 150, padding)
    draft, rest = tokens(3, 6, seed=2), tokens(3, 4, seed=3).split(1, 1)

    def cropped(cache):
        ones = torch.ones(3, 6, dtype=torch.long)
        run(model, cache, [ids, draft], torch.cat([mask, ones], 1))
        cache.crop(-4)
        return run(model, cache, rest, torch.cat([mask, ones], 1))

    reference = expected(lambda: cropped(FakeQuantCache(model.config, preset, padding=padding)))
    assert_close(cropped(KVarNCache(model.config, preset)), reference)


def test_the_number_may_be_a_tensor(model, preset):
    cache = KVarNCache(model.config, preset)
    run(model, cache, [tokens(1, 70)])
    cache.crop(-torch.tensor(4))
    assert type(cache.get_seq_length()) is int
    run(model, cache, [tokens(1, 1)])
    assert cache.materializations == 0


def test_a_positive_number_is_refused(model, preset):
    with pytest.raises(ShapeError, match=r"crop\(5\): expected 0, or"):
        KVarNCache(model.config, preset).crop(5)


@pytest.mark.parametrize("prompt", [2 * G - 3, 200])
def test_drafts_that_are_committed_at_once_can_be_rejected(model, expected, preset, prompt):
    assert KVarNCache(model.config, preset, hold=0).is_croppable
    ids = tokens(1, 8).repeat(1, prompt)[:, :prompt]
    options = {"prompt_lookup_num_tokens": 5, "new": 30}
    reference = expected(
        lambda: generate(model, FakeQuantCache(model.config, preset, hold=0), ids, **options)
    )
    assert_same_generation(
        generate(model, KVarNCache(model.config, preset, hold=0), ids, **options), reference
    )
