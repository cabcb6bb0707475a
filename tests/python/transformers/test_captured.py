"""`CapturedDecoder`: what it refuses without a GPU, and its steps with a graph that only repeats calls.

tests/gpu/check_static.py has real graphs.
"""

import contextlib
import types

import kvarn
import pytest
import torch
from kvarn import (
    CapacityError,
    CapturedDecoder,
    CudaError,
    CudaUnavailableError,
    DeviceError,
    DTypeError,
    KVarNCache,
    KVarNStaticCache,
    ShapeError,
    StateError,
)
from kvarn.integrations.transformers import UnsupportedError, captured
from matrix_models import MODELS
from tiny_models import FAMILIES, left_padding, tiny, tokens

PRESET = "kvarn_k4v2_g64"


@pytest.fixture(scope="module")
def model():
    model = tiny(*FAMILIES["qwen3"], num_hidden_layers=2)
    model.set_attn_implementation("kvarn")
    return model


class Graph:
    """In place of a CUDA graph: repeats what ran while it was captured, into the same outputs."""

    captures = 0

    def record(self, decoder):
        self.decoder = decoder
        type(self).captures += 1

    def replay(self):
        self.decoder._logits = self.decoder._forward()


@pytest.fixture
def graphs(monkeypatch):
    """Let a `CapturedDecoder` run on the CPU, with `Graph`; the kind of graph that it takes."""

    class Counted(Graph):
        """With a count of its own."""

    @contextlib.contextmanager
    def recording(graph, device):
        graph.record(decoders[-1])
        yield

    decoders = []

    def device(model):
        return model.device

    def step(pool, sequences, counts, hold=0, *, arrays=None):
        if arrays is not None:
            # What the real ones check: tests/gpu/check_host.py.
            assert all(s.length + 1 <= arrays.tokens for s in sequences)
            assert all(s.length - s.committed <= 1 for s in sequences)
        return plan(pool, sequences, counts, hold)

    def static_arrays(pool, counts, tokens):
        return types.SimpleNamespace(counts=counts, tokens=tokens)

    plan = kvarn.Pool.step
    monkeypatch.setattr(captured, "_cuda_device", device)
    monkeypatch.setattr(kvarn.Pool, "step", step)
    monkeypatch.setattr(kvarn.Pool, "static_arrays", static_arrays)
    monkeypatch.setattr(kvarn.Step, "replay", lambda step, graph: graph.replay())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    monkeypatch.setattr(captured, "recording", recording)
    Counted.decoders = decoders
    return Counted


class Beside:
    """A `CapturedDecoder` and a `KVarNCache` behind the same prompt."""

    def __init__(self, model, graphs, padding, columns=70, **options):
        self.model = model
        self.ids, self.mask = left_padding(len(padding), 300, padding)
        self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        self.cache = KVarNStaticCache(model.config, PRESET, max_tokens=300)
        self.plain = KVarNCache(model.config, PRESET, max_tokens=300)
        self.eager(self.cache, columns)
        self.eager(self.plain, columns)
        self.decoder = CapturedDecoder(model, self.cache, **options)
        graphs.decoders.append(self.decoder)

    def eager(self, cache, columns=1):
        start = cache.get_seq_length()
        stop = start + columns
        return self.model(
            self.ids[:, start:stop],
            past_key_values=cache,
            attention_mask=self.mask[:, :stop],
            position_ids=self.positions[:, start:stop],
        ).logits

    def step(self):
        start = self.cache.get_seq_length()
        return self.decoder(self.ids[:, start : start + 1])

    def steps(self, count):
        for _ in range(count):
            assert torch.equal(self.step(), self.eager(self.plain))
            assert self.cache.get_seq_length() == self.plain.get_seq_length()


@pytest.mark.parametrize("padding", [[0, 0], [0, 37, 66]])
def test_steps_are_those_of_a_kvarn_cache(model, graphs, padding):
    beside = Beside(model, graphs, padding)
    beside.steps(150)
    assert graphs.captures == 1
    assert beside.cache.pool.stats() == beside.plain.pool.stats()
    assert beside.cache.materializations == 0


def test_a_decoder_can_be_used_in_turn_with_eager_steps(model, graphs):
    beside = Beside(model, graphs, [0, 20])
    beside.steps(10)
    for cache in (beside.cache, beside.plain):
        beside.eager(cache, columns=9)
        cache.crop(-4)
    beside.steps(80)
    for cache in (beside.cache, beside.plain):
        cache.reorder_cache(torch.tensor([1, 0]))
    for attribute in ("ids", "mask", "positions"):
        setattr(beside, attribute, getattr(beside, attribute).flip(0))
    beside.steps(5)
    assert graphs.captures == 1


def test_other_rows_are_captured_anew(model, graphs):
    beside = Beside(model, graphs, [0, 20])
    beside.steps(5)
    for cache in (beside.cache, beside.plain):
        cache.batch_select_indices(torch.tensor([1]))
    for attribute in ("ids", "mask", "positions"):
        setattr(beside, attribute, getattr(beside, attribute)[1:])
    beside.steps(5)
    assert graphs.captures == 2
    for cache in (beside.cache, beside.plain):
        cache.reset()
        beside.eager(cache, columns=100)
    beside.steps(5)
    assert graphs.captures == 3


def test_positions_can_be_given(model, graphs):
    beside = Beside(model, graphs, [0, 20])
    beside.steps(3)
    ids = tokens(2, 1, seed=4)
    with torch.no_grad():
        expected = model(
            ids,
            past_key_values=beside.plain,
            attention_mask=beside.mask[:, :74],
            position_ids=torch.tensor([[90], [91]]),
        ).logits
    assert torch.equal(beside.decoder(ids, torch.tensor([[90], [91]])), expected)


def test_logits_are_the_callers(model, graphs):
    beside = Beside(model, graphs, [0])
    beside.steps(3)
    kept = beside.step()
    before = kept.clone()
    beside.step()
    assert torch.equal(kept, before)


def test_no_room(model, graphs):
    beside = Beside(model, graphs, [0, 20], max_tokens=75)
    beside.steps(5)
    text = "76 tokens of a row: expected at most 75, the max_tokens of this CapturedDecoder"
    for _ in range(2):
        with pytest.raises(CapacityError, match=text):
            beside.step()
    graphs.decoders.append(CapturedDecoder(model, beside.cache))
    beside.decoder = graphs.decoders[-1]
    beside.steps(225)
    with pytest.raises(CapacityError, match="301 tokens: expected at most max_tokens=300"):
        beside.decoder(beside.ids[:, :1])
    assert beside.cache.get_seq_length() == 300


@pytest.mark.parametrize("steps", [0, 1, 5])  # before the eager step, the capture, and a replay
def test_a_step_that_breaks_off(model, graphs, monkeypatch, steps):
    beside = Beside(model, graphs, [0, 20])
    beside.steps(steps)
    done = kvarn.Step.attend

    def fails(step, layer, *arguments, **options):
        if layer == 1:
            raise RuntimeError("the disk is on fire")
        return done(step, layer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kvarn.Step, "attend", fails)
        with pytest.raises(RuntimeError, match="the disk is on fire"):
            beside.step()
    assert beside.cache.get_seq_length() == 70 + steps
    assert beside.cache.pool.stats().open_steps == 0
    beside.steps(80)


def test_a_model_that_cannot_be_captured(model, graphs, monkeypatch):
    beside = Beside(model, graphs, [0])
    beside.steps(1)

    @contextlib.contextmanager
    def refuses(graph, device):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(captured, "recording", refuses)
        with pytest.raises(
            CudaError, match=r"the model cannot be captured into a CUDA graph: .* not permitted"
        ):
            beside.step()
    assert beside.cache.get_seq_length() == 71
    beside.steps(80)


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ((tokens(2, 2),), ShapeError, r"input_ids \[2, 2\]: expected \[2, 1\], one token for each row"),
        ((tokens(3, 1),), ShapeError, r"input_ids \[3, 1\]: expected \[2, 1\]"),
        ((tokens(2, 1), tokens(1, 1)), ShapeError, r"position_ids \[1, 1\]: expected \[2, 1\]"),
        ((torch.zeros(2, 1),), DTypeError, "input_ids of torch.float32: expected integers"),
    ],
)
def test_bad_input_changes_nothing(model, graphs, inputs, error, text):
    beside = Beside(model, graphs, [0, 20])
    beside.steps(2)
    with pytest.raises(error, match=text):
        beside.decoder(*inputs)
    beside.steps(2)


def test_an_empty_cache(model, graphs):
    decoder = CapturedDecoder(model, KVarNStaticCache(model.config, PRESET))
    with pytest.raises(StateError, match="over an empty cache: expected a prompt"):
        decoder(tokens(1, 1))


def test_room_beyond_the_cache(model, graphs):
    cache = KVarNStaticCache(model.config, PRESET, max_tokens=100)
    for wrong in (0, 101):
        with pytest.raises(
            CapacityError, match=f"max_tokens {wrong} of a CapturedDecoder: expected 1 to 100"
        ):
            CapturedDecoder(model, cache, max_tokens=wrong)


def test_another_attention(graphs):
    model = tiny(*FAMILIES["llama"], num_hidden_layers=1)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="attention implementation 'sdpa' with a CapturedDecoder"):
        CapturedDecoder(model, KVarNStaticCache(model.config, PRESET))


def test_layers_that_keep_a_state(graphs):
    *classes, changes = MODELS["Qwen3-Next"]
    model = tiny(*classes, head_dim=64, **changes)
    model.set_attn_implementation("kvarn")
    with pytest.raises(
        UnsupportedError, match=r"layer 0 \(LinearAttentionLayer\) of the cache with a Captured"
    ):
        CapturedDecoder(model, KVarNStaticCache(model.config, PRESET))


def test_a_model_on_the_cpu(model, monkeypatch):
    cache = KVarNStaticCache(model.config, PRESET)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CudaUnavailableError, match="CapturedDecoder: torch finds no CUDA device"):
        CapturedDecoder(model, cache)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DeviceError, match="CapturedDecoder with a model on cpu: expected a CUDA device"):
        CapturedDecoder(model, cache)
