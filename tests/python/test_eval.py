"""Divergence in lockstep, dense caches and byte counts, on a tiny random model."""

import copy
from typing import Any

import kvarn
import numpy as np
import pytest
import torch
from kvarn.eval import Arm, cache_bytes, dense_arm, divergence, kvarn_arm, sixteen_bit_bytes
from kvarn.models import LoadedModel, load
from tiny_model import HEAD_DIM, KV_HEADS, LAYERS, save_tiny_model
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(i) for i in np.random.default_rng(3).integers(1, 90, 300)]


@torch.no_grad()
def _log_probabilities(tiny: LoadedModel, ids: list[int], cache: Any = None) -> torch.Tensor:
    """Float64 [len(ids), vocabulary], by one plain forward pass."""
    tiny.model.set_attn_implementation("sdpa")
    return torch.log_softmax(tiny.model(torch.tensor([ids]), past_key_values=cache).logits[0].double(), -1)


@pytest.mark.parametrize("block", [1, 7, 128, 1000])
def test_an_arm_does_not_diverge_from_itself(tiny: LoadedModel, ids: list[int], block: int) -> None:
    (found,) = divergence(tiny.model, ids[:60], dense_arm("fp32"), [dense_arm("fp32")], block=block)
    assert found.kl.shape == found.agree.shape == found.nll.shape == (59,)
    assert np.abs(found.kl).max() < 1e-6
    assert found.agree.all()


class FadedLayer(DynamicLayer):
    """Returns half of every value: an arm that diverges, and alike for every block size."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states / 2, *args, **kwargs)


def _faded(model: Any, max_tokens: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [FadedLayer() for _ in cache.layers]
    return cache


@pytest.mark.parametrize(("block", "prefill"), [(1, 0), (16, 0), (999, 0), (16, 40), (16, 59)])
def test_every_figure_follows_its_definition(
    tiny: LoadedModel, ids: list[int], block: int, prefill: int
) -> None:
    text = ids[:60]
    arm = Arm("faded", "sdpa", _faded)
    (found,) = divergence(tiny.model, text, dense_arm("fp32"), [arm], block=block, prefill=prefill)

    scored = slice(max(prefill, 1) - 1, len(text) - 1)
    p = _log_probabilities(tiny, text)[scored]
    q = _log_probabilities(tiny, text, _faded(tiny.model, 60))[scored]
    target = torch.tensor(text[1:])[scored][:, None]
    kl = (p.exp() * (p - q)).sum(-1)
    assert kl.max() > 0.01
    np.testing.assert_allclose(found.kl, kl, atol=1e-4)
    np.testing.assert_array_equal(found.agree, p.argmax(-1) == q.argmax(-1))
    np.testing.assert_allclose(found.nll, -q.gather(1, target)[:, 0], atol=1e-4)
    np.testing.assert_allclose(found.nll_reference, -p.gather(1, target)[:, 0], atol=1e-4)


def test_segments_cover_everything_once(tiny: LoadedModel, ids: list[int]) -> None:
    (found,) = divergence(tiny.model, ids[:61], dense_arm("fp32"), [Arm("faded", "sdpa", _faded)])
    parts = found.segments(16)
    assert [part[:2] for part in parts] == [(0, 16), (16, 32), (32, 48), (48, 60)]
    weights = [end - first for first, end, _, _ in parts]
    assert np.average([part[2] for part in parts], weights=weights) == pytest.approx(
        found.kl.mean(), rel=1e-5
    )
    assert np.average([part[3] for part in parts], weights=weights) == pytest.approx(found.agree.mean())


def test_progress_adds_up_and_the_attention_implementation_is_restored(
    tiny: LoadedModel, ids: list[int]
) -> None:
    tiny.model.set_attn_implementation("eager")
    seen: list[int] = []
    divergence(tiny.model, ids[:50], dense_arm("fp32"), [], block=9, prefill=10, progress=seen.append)
    assert seen == [10, 9, 9, 9, 9, 3]
    assert tiny.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("count", "prefill", "block"), [(1, 0, 8), (5, 5, 8), (5, -1, 8), (5, 0, 0)])
def test_impossible_requests_are_refused(tiny: LoadedModel, count: int, prefill: int, block: int) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        divergence(tiny.model, [1] * count, dense_arm("fp32"), [], prefill=prefill, block=block)


@pytest.mark.parametrize(("name", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_a_dense_cache_stores_the_type_it_is_named_for(
    tiny: LoadedModel, ids: list[int], name: str, size: int
) -> None:
    arm = dense_arm(name)
    cache = arm.make_cache(tiny.model, 100)
    exact = _log_probabilities(tiny, ids[:100])
    assert _log_probabilities(tiny, ids[:100], cache).sub(exact).abs().max() < (0.5 if size == 2 else 1e-4)
    found = cache_bytes(cache)
    assert found.dense == found.total == LAYERS * KV_HEADS * 100 * HEAD_DIM * 2 * size
    assert (found.pages, found.slots, found.tables, found.tokens) == (0, 0, 0, 100)
    assert found.per_token == found.total / 100
    assert sixteen_bit_bytes(tiny.model, 100) * size == found.total * 2


def test_an_unknown_dense_cache_is_refused() -> None:
    with pytest.raises(kvarn.KvarnError, match="dense cache 'fp8': expected one of fp32, bf16, fp16"):
        dense_arm("fp8")


def test_sliding_layers_count_their_window(tiny: LoadedModel) -> None:
    config = copy.deepcopy(tiny.model.config)
    config.layer_types = ["full_attention", "sliding_attention"]
    config.sliding_window = 32
    mixed = LlamaForCausalLM(config)
    per_token = KV_HEADS * HEAD_DIM * 2 * 2
    assert sixteen_bit_bytes(mixed, 100) == per_token * (100 + 31)
    assert sixteen_bit_bytes(mixed, 10) == per_token * (10 + 10)


def test_a_kvarn_cache_counts_records_and_slots(tiny: LoadedModel, ids: list[int]) -> None:
    """300 tokens committed at once: tile 0 is the sink slot, tile 1 a record, 44 tokens are the tail."""
    cache = kvarn_arm("kvarn_k4v2_g128", hold=0).make_cache(tiny.model, 300)
    tiny.model.set_attn_implementation("kvarn")
    with torch.no_grad():
        tiny.model(torch.tensor([ids]), past_key_values=cache)
    found = cache_bytes(cache)
    record = kvarn.Config("kvarn_k4v2_g128", head_dim=HEAD_DIM).record_bytes
    assert found.pages == LAYERS * KV_HEADS * 1 * record
    assert found.slots == LAYERS * KV_HEADS * 2 * (2 * 128 * HEAD_DIM * 4)
    assert found.tables > 0
    assert found.dense == 0
    assert found.tokens == 300


def test_less_precision_diverges_more(tiny: LoadedModel, ids: list[int]) -> None:
    arms = [kvarn_arm(name, hold=0) for name in ("kvarn_k8v8_g64", "kvarn_k4v4_g64", "kvarn_k2v2_g64")]
    found = divergence(tiny.model, ids, dense_arm("fp32"), arms, block=64)
    fine, middle, coarse = (float(arm.kl.mean()) for arm in found)
    assert 0 <= fine < middle < coarse
    # Until the first tile after the sinks is sealed, every arm reads what the reference reads.
    assert found[2].kl[:128].max() < 1e-5
