"""Requests served together by `KVarNBatching` get what each gets alone."""

import kvarn
import numpy as np
import pytest
import torch
from batching import alone, assert_given_back, assert_same, exact_linear, prompt_steps, serve, watched
from kvarn import DTypeError, KVarNBatching
from tiny_models import FAMILIES, VOCABULARY, tiny, tokens
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

PRESET = "kvarn_k4v2_g64"
GROUP = 64
MODELS = FAMILIES | {"qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM)}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", exact_linear)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(params=MODELS)
def model(request, dtype):
    changes = {"num_hidden_layers": 2}
    if request.param == "qwen3-moe":
        # The other ways to run experts are products of another shape in another batch.
        changes |= EXPERTS | {"experts_implementation": "eager"}
    made = tiny(*MODELS[request.param], **changes)
    return made.to(dtype)


@pytest.fixture
def llama():
    return tiny(*FAMILIES["llama"], num_hidden_layers=2)


def prompt(length, seed=None):
    return tokens(1, length, seed=length if seed is None else seed)[0].tolist()


def test_prompts_of_many_lengths_get_what_they_get_alone(model):
    batching = KVarNBatching(model, PRESET, tokens=4096, requests=16)
    prompts = [prompt(n) for n in (1, 2, 16, 17, 62, 63, 64, 65, 66, 127, 128, 129, 200)]
    for given, output in zip(prompts, serve(batching, prompts, new=70), strict=True):
        assert output.prompt_ids == given
        assert_same(output, alone(model, PRESET, given, 70))
    assert_given_back(batching)


def test_every_length_in_a_group(llama):
    batching = KVarNBatching(llama, PRESET, tokens=16384, requests=GROUP)
    prompts = [prompt(n) for n in range(GROUP + 1, 2 * GROUP + 1)]
    outputs = serve(batching, prompts, new=GROUP + 2)
    for given, output in zip(prompts, outputs, strict=True):
        assert_same(output, alone(llama, PRESET, given, GROUP + 2))
    assert_given_back(batching)


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("kvarn_k4v2_g128", {}),
        (PRESET, {"sink_tokens": 0}),
        (PRESET, {"sink_tokens": 16, "recent_tokens": 40}),
        ("kvarn_k8v4_g64", {"refit": False, "iterations": 2}),
    ],
)
def test_options(llama, preset, options):
    batching = KVarNBatching(llama, preset, tokens=4096, requests=4, **options)
    prompts = [prompt(n) for n in (5, 64, 129, 260)]
    for given, output in zip(prompts, serve(batching, prompts, new=140), strict=True):
        assert_same(output, alone(llama, preset, given, 140, **options))
    assert_given_back(batching)


def test_a_pass_has_prompts_and_requests_that_decode(llama):
    """The second prompt comes while the first decodes; both as alone."""
    batching = KVarNBatching(llama, PRESET, tokens=4096, requests=4)
    prompts = [prompt(100), prompt(90)]
    with watched() as passes:
        # 90 of the second prompt do not fit beside the first.
        outputs = serve(batching, prompts, new=30, max_batch_tokens=100)
    mixed = [sorted(count for _, _, count in one.rows) for one in passes if len(one.rows) == 2]
    assert mixed[0] == [1, 90]
    for given, output in zip(prompts, outputs, strict=True):
        assert_same(output, alone(llama, PRESET, given, 30))


def check_chunks(model, budget):
    """A prompt in several passes, beside others, is what a cache gives in the same passes."""
    batching = KVarNBatching(model, PRESET, tokens=4096, requests=4)
    prompts = [prompt(230), prompt(20), prompt(150)]
    for order in ("fifo", "prefill_first"):
        with watched() as passes:
            outputs = serve(
                batching,
                prompts,
                new=40,
                max_batch_tokens=budget,
                scheduler_type=order,
                allow_block_sharing=False,
            )
        for which, (given, output) in enumerate(zip(prompts, outputs, strict=True)):
            steps = prompt_steps(passes, len(given), which)
            assert sum(steps) == len(given)
            assert_same(output, alone(model, PRESET, given, 40, steps=steps))
        assert max(sum(count for _, _, count in one.rows) for one in passes) == budget
        assert_given_back(batching)


def test_chunked_prompts(model):
    check_chunks(model, 100)


@pytest.mark.parametrize("budget", [7, 16, 17])
def test_short_chunks(llama, budget):
    """Up to 16 tokens are appended before they attend, longer chunks afterwards."""
    check_chunks(llama, budget)


def test_sampling_and_processors(llama):
    """Of the best token alone the draw is certain; with more, a seed gives the same again."""
    batching = KVarNBatching(llama, PRESET, tokens=4096, requests=4)
    prompts = [prompt(n) for n in (30, 70)]
    expected = [alone(llama, PRESET, given, 20).tokens for given in prompts]

    def drawn(top_k, seed):
        config = GenerationConfig(max_new_tokens=20, do_sample=True, top_k=top_k, temperature=3.0)
        outputs = batching.generate_batch(
            prompts, config, continuous_batching_config=ContinuousBatchingConfig(seed=seed)
        )
        return [output.generated_tokens for output in outputs.values()]

    assert drawn(1, seed=1) == expected
    assert drawn(50, seed=1) == drawn(50, seed=1) != drawn(50, seed=2)


def test_several_answers_to_a_prompt(llama):
    """num_return_sequences: children share what was computed, also where they wait for a place."""
    for requests in (8, 2):
        batching = KVarNBatching(llama, PRESET, tokens=4096, requests=requests)
        prompts = [prompt(n) for n in (1, 65, 150)]
        config = GenerationConfig(max_new_tokens=20, do_sample=True, top_k=1, num_return_sequences=3)
        outputs = batching.generate_batch([*prompts, [VOCABULARY]], config)
        assert list(outputs) == [
            f"req_{number}{child}" for number in range(4) for child in ("", "__child#0", "__child#1")
        ]
        outputs = list(outputs.values())
        for place, given in enumerate(prompts):
            expected = alone(llama, PRESET, given, 20, steps=[len(given) - 1, 1] if len(given) > 1 else None)
            for output in outputs[3 * place : 3 * place + 3]:
                assert output.prompt_ids == given
                assert output.generated_tokens == expected.tokens
        assert all("token id" in output.error for output in outputs[9:])
        assert_given_back(batching)


def test_kinds_of_prompts(llama):
    batching = KVarNBatching(llama, PRESET, tokens=4096, requests=4)
    given = prompt(20)
    outputs = serve(batching, [given, torch.tensor(given), np.array(given), iter(given)], new=5)
    assert [output.generated_tokens for output in outputs] == [alone(llama, PRESET, given, 5).tokens] * 4
    for wrong in ("text", [1.5], torch.tensor([given]), 7):
        with pytest.raises(DTypeError, match="prompt 1 of type"):
            batching.generate_batch([given, wrong])
    assert_given_back(batching)


def test_an_interrupted_call_stops(llama, monkeypatch):
    batching = KVarNBatching(llama, PRESET, tokens=4096, requests=4)
    manager = kvarn.integrations.transformers.batching.manager.PoolManager

    def interrupted(self, *arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manager, "get_result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            serve(batching, [prompt(20)], new=3000)
    assert_given_back(batching)
    (output,) = serve(batching, [prompt(20)], new=3)
    assert_same(output, alone(llama, PRESET, prompt(20), 3))


def test_end_of_sequence(llama):
    batching = KVarNBatching(llama, PRESET, tokens=4096, requests=4)
    given = prompt(30)
    expected = alone(llama, PRESET, given, 40).tokens
    end = expected[7]
    outputs = batching.generate_batch([given], GenerationConfig(max_new_tokens=40, eos_token_id=end))
    assert next(iter(outputs.values())).generated_tokens == expected[: expected.index(end) + 1]
    assert batching.generate_batch([]) == {}
