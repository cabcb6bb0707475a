"""The manager of `KVarNBatching`, the names of its attention, and what it refuses."""

import copy
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from batching import alone, assert_given_back, exact_linear, serve
from kvarn import Config, ConfigError, KVarNBatching, KVarNCache, LayerShape, StateError, capacity
from kvarn.integrations.transformers import UnsupportedError
from kvarn.integrations.transformers.batching import api
from tiny_models import FAMILIES, tiny, tokens
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import RequestStatus

PRESET = "kvarn_k4v2_g64"
GREEDY = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1)


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", exact_linear)


@pytest.fixture
def model():
    return tiny(*FAMILIES["llama"], num_hidden_layers=2)


@pytest.fixture
def batching(model):
    return KVarNBatching(model, PRESET, tokens=4096, requests=4)


def prompt(length):
    return tokens(1, length, seed=length)[0].tolist()


def test_streaming(model, batching):
    expected = alone(model, PRESET, prompt(70), 20).tokens
    with batching.continuous_batching_context_manager(generation_config=GREEDY) as manager:
        name = manager.add_request(prompt(70), streaming=True)
        other = manager.add_request(prompt(20), max_new_tokens=3)
        outputs = [manager.get_result(timeout=30) for _ in range(21)]
        streamed = [output.generated_tokens for output in outputs if output.request_id == name]
        assert streamed == [expected[: count + 1] for count in range(20)]
        (short,) = [output.generated_tokens for output in outputs if output.request_id == other]
        assert short == alone_under(model, prompt(20), 3)
    assert_given_back(batching)


def alone_under(model, given, new):
    """As `alone`, on a copy: the model itself is being served."""
    return alone(copy.deepcopy(model), PRESET, given, new).tokens


def test_requests_come_while_others_run(model, batching):
    with batching.continuous_batching_context_manager(generation_config=GREEDY) as manager:
        names = {}
        for length in (100, 64, 30, 5, 129):
            names[manager.add_request(prompt(length))] = length
            time.sleep(0.01)
        outputs = {output.request_id: output for output in (manager.get_result(timeout=30) for _ in names)}
    for name, length in names.items():
        assert outputs[name].generated_tokens == alone(model, PRESET, prompt(length), 20).tokens
    assert_given_back(batching)


def test_cancelled_requests_give_back_their_memory(batching):
    manager = batching.init_continuous_batching(GREEDY)
    manager.start()
    gone = manager.add_request(prompt(100), max_new_tokens=2500)
    while batching.pool.stats().sequences == 0:
        time.sleep(0.001)
    manager.cancel_request(gone)
    kept = manager.add_request(prompt(20))
    assert manager.get_result(timeout=30).request_id == kept
    manager.stop()
    assert_given_back(batching)


def test_a_hard_stop_fails_what_is_left(model, batching):
    manager = batching.init_continuous_batching(GREEDY)
    manager.start()
    names = {manager.add_request(prompt(n), max_new_tokens=2000) for n in (50, 60, 70, 80, 90)}
    while batching.pool.stats().sequences == 0:
        time.sleep(0.001)
    manager.stop(hard_stop=True)
    outputs = []
    while not manager.output_router.output_queue.empty():
        outputs.append(manager.output_router.output_queue.get())
    assert {output.request_id for output in outputs} == names
    assert all(output.status == RequestStatus.FAILED for output in outputs)
    assert_given_back(batching)
    assert model.config._attn_implementation == "sdpa"


def test_one_manager_at_a_time(batching):
    running = batching.continuous_batching_context_manager(generation_config=GREEDY)
    with running, pytest.raises(StateError, match="is running"):
        batching.init_continuous_batching(GREEDY)
    # A request of the same name fails; the first goes on.
    with batching.continuous_batching_context_manager(generation_config=GREEDY) as manager:
        for _ in range(2):
            manager.add_request(prompt(20), request_id="same")
        outputs = [manager.get_result(timeout=30) for _ in range(2)]
    assert sorted(output.error is None for output in outputs) == [False, True]
    assert "expected another id" in next(output.error for output in outputs if output.error)


@pytest.mark.filterwarnings("ignore:The `paged|` prefix:FutureWarning")
def test_the_model_keeps_its_attention(model, batching):
    for name in ("sdpa", "eager", "kvarn", "paged|kvarn"):
        model.set_attn_implementation(name)
        before = model.config._attn_implementation
        assert [output.error for output in serve(batching, [prompt(20)], new=3)] == [None]
        assert model.config._attn_implementation == before


def test_packed_attention_needs_a_packed_batch(model):
    model.set_attn_implementation("kvarn_paged")
    with pytest.raises(UnsupportedError, match=r"KVarNBatching\(model\).generate_batch"):
        model(torch.tensor([prompt(5)]))
    model.set_attn_implementation("kvarn")
    with pytest.raises(UnsupportedError, match=r"KVarNBatching\(model\).generate_batch"):
        model(torch.tensor([prompt(5)]), past_key_values=KVarNCache(model.config, PRESET), cache=object())


@pytest.mark.filterwarnings("ignore:The `paged|` prefix:FutureWarning")
def test_the_paged_name_is_no_way_to_transformers_own_cache(model):
    """Versions that know prefixes call the function, which refuses; others strip it, and refuse "kvarn"."""
    model.set_attn_implementation("paged|kvarn")
    if model.config._attn_implementation == "kvarn":
        with pytest.raises(ValueError, match="Implementation kvarn is not supported"):
            model.generate_batch([prompt(5)], GREEDY)
    else:
        with pytest.raises(UnsupportedError, match=r"KVarNBatching\(model\).generate_batch"):
            model(torch.tensor([prompt(5)]))


def test_settings_of_the_caller_are_not_changed(batching):
    generation, config = GenerationConfig(max_new_tokens=3), ContinuousBatchingConfig()
    before = copy.deepcopy(generation.to_dict()), copy.deepcopy(vars(config))
    batching.generate_batch([prompt(5)], generation, continuous_batching_config=config)
    assert (generation.to_dict(), vars(config)) == before


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"use_async_batching": True}, UnsupportedError, "use_async_batching True"),
        ({"use_cuda_graph": (True, False)}, UnsupportedError, "use_cuda_graph"),
        ({"cpu_offload_space": 1.0}, UnsupportedError, "the pool offloads by itself"),
        ({"scheduler_type": "other"}, ConfigError, "expected 'fifo' or 'prefill_first'"),
        ({"max_batch_tokens": 0}, ConfigError, "max_batch_tokens 0"),
    ],
)
def test_ways_to_batch_that_do_not_exist(batching, options, error, text):
    with pytest.raises(error, match=text):
        batching.init_continuous_batching(GREEDY, ContinuousBatchingConfig(**options))


def test_beams_are_refused(batching):
    with pytest.raises(UnsupportedError, match="num_beams 2"):
        batching.init_continuous_batching(GenerationConfig(num_beams=2))


def test_sizes(model):
    with pytest.raises(ConfigError, match="tokens 0"):
        KVarNBatching(model, PRESET, tokens=0)
    with pytest.raises(ConfigError, match="requests 0"):
        KVarNBatching(model, PRESET, requests=0)
    with pytest.raises(ConfigError, match="kvarn_k4v9_g64"):
        KVarNBatching(model, "kvarn_k4v9_g64")
    batching = KVarNBatching(model, PRESET, requests=3)
    assert batching.pool.stats().pages == 3 * model.config.max_position_embeddings // 64


def test_a_gpu_pool_takes_a_part_of_the_free_memory(monkeypatch):
    free = 10 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    model = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    cfg, shapes = Config("kvarn_k4v2_g128", head_dim=128), [LayerShape(8, 128)] * 32
    pages = api._pages(model, cfg, shapes, None, 4)
    one = capacity(cfg, free, layers=shapes, sequences=4, hold=1, device="cuda")
    used = pages * one.page_bytes + one.slots * one.slot_bytes
    assert 0.75 * free < used < 0.8 * free
    assert api._pages(model, cfg, shapes, 1000, 4) == 8


def test_models_that_are_refused():
    gemma = tiny(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        num_hidden_layers=2,
        layer_types=["full_attention", "sliding_attention"],
    )
    with pytest.raises(UnsupportedError, match="layer 1 of Gemma3ForCausalLM is of type sliding_attention"):
        KVarNBatching(gemma)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    with pytest.raises(UnsupportedError, match="has an encoder"):
        KVarNBatching(T5ForConditionalGeneration(T5Config(**size)))


def test_import_is_lazy():
    code = "import kvarn, sys; before = 'torch' in sys.modules; kvarn.KVarNBatching; assert not before"
    subprocess.run([sys.executable, "-c", code], check=True)
