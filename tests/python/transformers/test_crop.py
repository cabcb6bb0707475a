"""`crop` takes back the newest tokens exactly, or refuses and changes nothing."""

import pytest
import torch
from fake_quant import FakeQuantCache
from kvarn import KVarNCache, ShapeError
from kvarn.integrations.transformers import UnsupportedError
from tiny_models import assert_close, left_padding, run, tokens

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


def test_records_are_refused_and_nothing_changes(model, preset):
    # Row 1 has only 20 tokens after its padding: it could be cropped, row 0 cannot.
    ids, mask = left_padding(2, 4 * G, [0, 4 * G - 20])
    rest = tokens(2, 3, seed=2)
    mask = torch.cat([mask, torch.ones_like(rest)], 1)
    cache, untouched = KVarNCache(model.config, preset), KVarNCache(model.config, preset)
    for one in (cache, untouched):
        run(model, one, [ids], mask[:, : 4 * G])
    with pytest.raises(
        UnsupportedError, match=r"crop\(-70\) leaves row 0 with 186 tokens: expected at least 192"
    ):
        cache.crop(-70)
    assert cache.get_seq_length() == 4 * G
    assert torch.equal(run(model, cache, [rest], mask), run(model, untouched, [rest], mask))


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


def test_committed_at_once_is_not_croppable(model, preset):
    assert KVarNCache(model.config, preset).is_croppable
    cache = KVarNCache(model.config, preset, hold=0)
    assert not cache.is_croppable
    run(model, cache, [tokens(1, 2 * G)])
    with pytest.raises(UnsupportedError, match="expected at least 128"):
        cache.crop(-1)
