"""Requests of a `KVarNBatching` share what they have in common, wait for room, and fail alone."""

import numpy as np
import pytest
import torch
from batching import alone, assert_given_back, assert_same, exact_linear, serve, watched
from kvarn import KVarNBatching, Pool
from tiny_models import FAMILIES, VOCABULARY, tiny, tokens
from transformers.generation.continuous_batching import PagedAttentionCache

PRESET = "kvarn_k4v2_g64"
GROUP = 64


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", exact_linear)


@pytest.fixture(scope="module")
def model():
    return tiny(*FAMILIES["llama"], num_hidden_layers=2)


def prompt(length, seed=None):
    return tokens(1, length, seed=length if seed is None else seed)[0].tolist()


def test_nothing_of_transformers_own_cache_is_allocated(model, monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError("transformers' cache was made")

    monkeypatch.setattr(PagedAttentionCache, "__init__", refused)
    batching = KVarNBatching(model, PRESET, tokens=1024, requests=4)
    (output,) = serve(batching, [prompt(70)], new=10)
    assert_same(output, alone(model, PRESET, prompt(70), 10))


@pytest.mark.parametrize("budget", [4096, 100])
def test_a_system_prompt_is_stored_once(model, budget):
    """Requests that come together wait until one of them has computed what they share."""
    system, tiles = prompt(3 * GROUP, seed=5), 3
    prompts = [system + prompt(n) for n in (1, 20, 63, 64, 65, 130)]
    batching = KVarNBatching(model, PRESET, tokens=8192, requests=16)
    with watched() as passes:
        outputs = serve(batching, prompts, new=GROUP + 2, max_batch_tokens=budget)
    stats = batching.pool.stats()
    assert stats.prefix_duplicates == 0
    # The first computed them, the others found them.
    assert stats.prefix_hits == tiles * (len(prompts) - 1)
    # When all of them are there, each has the same pages and the same sink slot.
    together = [one for one in passes if len(one.rows) == len(prompts)][-1]
    assert len({one[:tiles] for one in together.tiles}) == 1
    assert len({one[tiles] for one in together.tiles}) == len(prompts)
    own = sum(-(-(len(given) + GROUP + 2) // GROUP) - tiles for given in prompts)
    assert max(one.stats.pages_used for one in passes) <= own + tiles
    for given, output in zip(prompts, outputs, strict=True):
        assert output.error is None
        assert output.prompt_ids == given
    assert_given_back(batching)


def test_what_is_shared_is_read_as_after_sealing(model):
    """A request that starts with shared tiles gives what a cache gives that has sealed them before."""
    system = prompt(2 * GROUP, seed=5)
    first, second = system + prompt(40), system + prompt(50)
    batching = KVarNBatching(model, PRESET, tokens=8192, requests=4)
    (output,) = serve(batching, [first], new=30)
    assert_same(output, alone(model, PRESET, first, 30))
    (output,) = serve(batching, [second], new=30)
    assert batching.pool.stats().prefix_hits == 2
    assert_same(output, alone(model, PRESET, second, 30, shared=2 * GROUP))
    # A prompt that ends with a tile computes it, to have logits.
    (output,) = serve(batching, [system], new=5)
    assert_same(output, alone(model, PRESET, system, 5, shared=GROUP))
    # Answers are shared too: the next turn of a conversation.
    talk = first + alone(model, PRESET, first, 30).tokens
    before = batching.pool.stats().prefix_hits
    serve(batching, [talk + prompt(3)], new=3)
    assert batching.pool.stats().prefix_hits == before + len(talk) // GROUP
    batching.pool.unpublish()
    (output,) = serve(batching, [second], new=30)
    assert_same(output, alone(model, PRESET, second, 30))


def test_without_sharing(model):
    system = prompt(2 * GROUP, seed=5)
    batching = KVarNBatching(model, PRESET, tokens=8192, requests=4)
    prompts = [system + prompt(n) for n in (40, 50)]
    for given, output in zip(
        prompts, serve(batching, prompts, new=9, allow_block_sharing=False), strict=True
    ):
        assert_same(output, alone(model, PRESET, given, 9))
    assert batching.pool.stats().pages_published == 0


def test_more_requests_than_places(model):
    batching = KVarNBatching(model, PRESET, tokens=4096, requests=2)
    prompts = [prompt(n) for n in (10, 64, 70, 128, 130, 5, 90)]
    with watched() as passes:
        outputs = serve(batching, prompts, new=20)
    assert max(one.stats.sequences for one in passes) == 2
    for given, output in zip(prompts, outputs, strict=True):
        assert_same(output, alone(model, PRESET, given, 20))
    assert_given_back(batching)


def test_a_prompt_waits_until_it_fits(model):
    """Four tiles each, and pages for six: one at a time, none fails."""
    batching = KVarNBatching(model, PRESET, tokens=6 * GROUP, requests=8)
    prompts = [prompt(4 * GROUP + n) for n in (1, 2, 3)]
    with watched() as passes:
        outputs = serve(batching, prompts, new=10)
    assert max(one.stats.sequences for one in passes) == 1
    for given, output in zip(prompts, outputs, strict=True):
        assert_same(output, alone(model, PRESET, given, 10))
    assert_given_back(batching)


@pytest.mark.parametrize("sharing", [True, False])
def test_requests_outgrow_the_pool(model, monkeypatch, sharing):
    """Short prompts begin together, their answers do not fit: the youngest leaves and comes back."""
    left = []
    offload = Pool.offload

    def noting(self, sequence):
        left.append(sequence.length)
        offload(self, sequence)

    monkeypatch.setattr(Pool, "offload", noting)
    batching = KVarNBatching(model, PRESET, tokens=6 * GROUP, requests=8)
    prompts = [prompt(n) for n in (20, 30, 40)]
    with watched() as passes:
        outputs = serve(batching, prompts, new=5 * GROUP, allow_block_sharing=sharing)
    assert left
    # Before, whoever lacked a page waited while the others went on.
    present = [one.stats.sequences - one.stats.offloaded_sequences for one in passes]
    assert any(count > len(one.rows) > 1 for count, one in zip(present, passes, strict=True))
    for given, output in zip(prompts, outputs, strict=True):
        assert_same(output, alone(model, PRESET, given, 5 * GROUP))
    assert_given_back(batching)


def test_a_request_that_never_fits_fails_alone(model):
    batching = KVarNBatching(model, PRESET, tokens=4 * GROUP, requests=4)
    # The first tile is a sink, the last never sealed.
    assert batching.longest == 6 * GROUP - 1
    fits, too_long = prompt(6 * GROUP - 10), prompt(6 * GROUP - 9)
    outputs = serve(batching, [too_long, fits, prompt(20)], new=10)
    assert outputs[0].error == (
        "request 'req_0' stores up to 384 tokens (375 of the prompt): expected at most 383, what the pool "
        "can hold of one request; make the KVarNBatching with more tokens, or lower max_new_tokens"
    )
    assert outputs[0].generated_tokens == []
    assert_same(outputs[1], alone(model, PRESET, fits, 10))
    assert_same(outputs[2], alone(model, PRESET, prompt(20), 10))
    assert_given_back(batching)


def test_without_a_limit_a_request_fails_where_the_pool_ends(model):
    """It has what it generated, and the others go on."""
    batching = KVarNBatching(model, PRESET, tokens=4 * GROUP, requests=4)
    manager = batching.init_continuous_batching()
    manager.generation_config.eos_token_id = -1
    manager.start()
    manager.generation_config.max_new_tokens = None
    endless = manager.add_request(prompt(20), max_new_tokens=None, eos_token_id=-1)
    short = manager.add_request(prompt(30), max_new_tokens=9, eos_token_id=-1)
    outputs = {output.request_id: output for output in (manager.get_result(timeout=60) for _ in range(2))}
    manager.stop()
    assert "page" in outputs[endless].error
    generated = outputs[endless].generated_tokens
    assert len(generated) > 4 * GROUP
    assert generated == alone(model, PRESET, prompt(20), len(generated)).tokens
    assert outputs[short].generated_tokens == alone(model, PRESET, prompt(30), 9).tokens
    assert_given_back(batching)


def test_bad_prompts_fail_alone(model):
    batching = KVarNBatching(model, PRESET, tokens=1024, requests=4)
    prompts = [[5, VOCABULARY, 7], [], prompt(20), [3, -1]]
    outputs = serve(batching, prompts, new=10)
    assert f"token id {VOCABULARY}: expected 0 to {VOCABULARY - 1}" in outputs[0].error
    assert "0 tokens: expected a prompt" in outputs[1].error
    assert "token id -1" in outputs[3].error
    assert_same(outputs[2], alone(model, PRESET, prompt(20), 10))
    assert_given_back(batching)


def test_a_failure_in_a_forward_pass(model):
    """Who makes it fail alone is lost, with what it had generated; the others get all their tokens."""
    poison = 96
    prompts = [[token % 90 for token in prompt(n)] for n in (20, 64, 100, 130)]
    prompts[1][40] = poison
    expected = [alone(model, PRESET, given, 12) for given in prompts]

    def poisoned(module, arguments, options):
        if (options["input_ids"] == poison).any():
            raise FloatingPointError("a poisoned token")

    batching = KVarNBatching(model, PRESET, tokens=4096, requests=8)
    hook = model.register_forward_pre_hook(poisoned, with_kwargs=True)
    try:
        outputs = serve(batching, prompts, new=12)
    finally:
        hook.remove()
    assert outputs[1].error == "a poisoned token"
    for which in (0, 2, 3):
        if poison not in expected[which].tokens:
            assert_same(outputs[which], expected[which])
    assert sum(output.error is None for output in outputs) >= 2
    assert_given_back(batching)


def test_a_failure_that_passes_loses_nobody(model):
    """Out of memory once, in the middle of the layers: the pass is repeated in halves."""
    calls = []

    def fails(module, arguments):
        calls.append(len(calls))
        if len(calls) in (1, 9, 10):
            raise MemoryError("once")

    batching = KVarNBatching(model, PRESET, tokens=4096, requests=8)
    prompts = [prompt(n) for n in (20, 64, 100, 130, 250)]
    expected = [alone(model, PRESET, given, 70) for given in prompts]
    hook = model.model.layers[1].mlp.register_forward_pre_hook(fails)
    try:
        outputs = serve(batching, prompts, new=70)
    finally:
        hook.remove()
    for output, one in zip(outputs, expected, strict=True):
        assert_same(output, one)
    assert_given_back(batching)


@pytest.mark.parametrize("seed", range(8))
def test_random_requests_in_small_pools(model, seed):
    """Lengths, places and pages at random: everyone gets what it gets alone, or the reason why not."""
    random = np.random.default_rng(seed)
    pages = int(random.integers(2, 9))
    batching = KVarNBatching(model, PRESET, tokens=pages * GROUP, requests=int(random.integers(1, 7)))
    prompts = [prompt(int(n)) for n in random.integers(1, (pages + 2) * GROUP, size=8)]
    new = int(random.integers(1, 3 * GROUP))
    order = "fifo" if seed % 2 else "prefill_first"
    outputs = serve(batching, prompts, new, allow_block_sharing=False, scheduler_type=order)
    for given, output in zip(prompts, outputs, strict=True):
        if len(given) + new - 1 > batching.longest:
            assert "expected at most" in output.error
        else:
            assert_same(output, alone(model, PRESET, given, new))
    assert_given_back(batching)
    # And with what they share: each is served to its end.
    prompts = [prompt(2 * GROUP, seed=3) + given for given in prompts]
    for output in serve(batching, prompts, new, max_batch_tokens=150, scheduler_type=order):
        if len(output.prompt_ids) + new - 1 > batching.longest:
            assert "expected at most" in output.error
        else:
            assert output.error is None
            assert len(output.generated_tokens) == new
    assert_given_back(batching)
