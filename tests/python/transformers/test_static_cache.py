"""`KVarNStaticCache`: compiled steps in one graph, against the same steps of a `KVarNCache`, eager."""

import copy

import kvarn
import pytest
import torch
from kvarn import CapacityError, KVarNCache, KVarNStaticCache, ShapeError
from kvarn.integrations.transformers import UnsupportedError
from matrix_models import MODELS as MIXED
from tiny_models import FAMILIES, assert_close, left_padding, tiny, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

MODELS = FAMILIES | {"qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM)}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
PRESET = "kvarn_k4v2_g64"
MAX_TOKENS = 320


def make(family, dtype=torch.float32):
    experts = EXPERTS if family == "qwen3-moe" else {}
    model = tiny(*MODELS[family], num_hidden_layers=2, **experts).to(dtype)
    model.set_attn_implementation("kvarn")
    return model


@pytest.fixture(scope="module")
def llama():
    return make("llama")


class Compiled:
    """A model compiled as one graph, and how often that was."""

    def __init__(self, model, backend="aot_eager", **options):
        torch._dynamo.reset()
        counters.clear()
        self.counter = CompileCounterWithBackend(backend)
        self._step = torch.compile(model, fullgraph=True, backend=self.counter, **options)

    def __call__(self, ids, cache, mask=None, positions=None):
        # Strides are part of what a graph is compiled for.
        ids, mask, positions = (x if x is None else x.contiguous() for x in (ids, mask, positions))
        with torch.no_grad():
            return self._step(ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits

    @property
    def graphs(self):
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == self.counter.frame_count
        return self.counter.frame_count


class Pair:
    """A static cache and a `KVarNCache` behind the same prompt."""

    def __init__(self, model, prompt, mask=None, **options):
        self.model, self.columns, self.mask = model, prompt.shape[1], mask
        options = {"max_tokens": MAX_TOKENS} | options
        self.static = KVarNStaticCache(model.config, PRESET, **options)
        self.plain = KVarNCache(model.config, PRESET, **options)
        if mask is not None:
            self.positions = (mask.cumsum(1) - 1).clamp_min(0)
        for cache in (self.static, self.plain):
            self._run(prompt, cache)

    def _run(self, ids, cache):
        stop = cache.get_seq_length() + ids.shape[1]
        options = {}
        if self.mask is not None:
            options["attention_mask"] = self.mask[:, :stop]
            options["position_ids"] = self.positions[:, stop - ids.shape[1] : stop]
        with torch.no_grad():
            return self.model(ids, past_key_values=cache, **options).logits

    def step(self, compiled, ids, mask=None):
        """Logits of the same tokens, compiled and eager."""
        start = self.static.get_seq_length()
        positions = None if self.mask is None else self.positions[:, start : start + ids.shape[1]]
        return compiled(ids, self.static, mask, positions), self._run(ids, self.plain)

    def assert_same_state(self):
        """Both caches hold the same bytes; their pools gave out pages and slots in the same order."""
        static, plain = self.static.pool, self.plain.pool
        assert self.static.get_seq_length() == self.plain.get_seq_length()
        assert static.stats() == plain.stats()
        assert static.stats().pages_used > 0
        assert self.static.materializations == 0
        for a, b in zip((*static.pages, *static.slots), (*plain.pages, *plain.slots), strict=True):
            assert torch.equal(torch.from_dlpack(a), torch.from_dlpack(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", MODELS)
def test_one_graph_serves_every_step(family, dtype):
    model = make(family, dtype)
    ids = tokens(2, 220)
    pair, compiled = Pair(model, ids[:, :50]), Compiled(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in range(50, 220):  # sealing at 64, 128 and 192 committed tokens
            logits, expected = pair.step(compiled, ids[:, index : index + 1])
            assert torch.equal(logits, expected)
    assert compiled.graphs == 1
    pair.assert_same_state()


def test_linear_layers_are_transformers_own():
    *classes, changes = MIXED["Qwen3-Next"]
    model = tiny(*classes, head_dim=64, **changes)
    model.set_attn_implementation("kvarn")
    ids = tokens(2, 220)
    pair, compiled = Pair(model, ids[:, :50]), Compiled(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in range(50, 220):
            logits, expected = pair.step(compiled, ids[:, index : index + 1])
            assert torch.equal(logits, expected)
    assert compiled.graphs == 1
    pair.assert_same_state()
    with pytest.raises(UnsupportedError, match=r"crop\(-1\): layer 0 \(LinearAttentionLayer\)"):
        pair.static.crop(-1)
    assert pair.static.get_seq_length() == 220


@pytest.mark.parametrize("family", FAMILIES)
def test_inductor(family):
    model = make(family)
    ids = tokens(2, 200)
    pair, compiled = Pair(model, ids[:, :50]), Compiled(model, "inductor")
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps = [pair.step(compiled, ids[:, index : index + 1]) for index in range(50, 200)]
    assert compiled.graphs == 1
    # At two bits a value that is off by a rounding may become another code: one step, by little.
    logits, expected = (torch.cat(parts, 1) for parts in zip(*steps, strict=True))
    width = expected.max() - expected.min()
    assert (logits - expected).abs().max() <= 1e-2 * width
    assert (logits - expected).abs().mean() <= 1e-4 * width
    assert torch.equal(
        torch.tensor([s.length for s in pair.static.rows.sequences]),
        torch.tensor([s.length for s in pair.plain._rows.sequences]),
    )


@pytest.mark.parametrize("columns", [2, 5, 16, 40])
def test_steps_of_several_tokens(llama, columns):
    ids = tokens(2, 290)
    pair, compiled = Pair(llama, ids[:, :50]), Compiled(llama)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for chunk in ids[:, 50 : 50 + 240 // columns * columns].split(columns, 1):
            logits, expected = pair.step(compiled, chunk)
            assert torch.equal(logits, expected)
    assert compiled.graphs == 1
    pair.assert_same_state()


def test_the_prompt_can_be_compiled_too(llama):
    ids = tokens(2, 200)
    static = KVarNStaticCache(llama.config, PRESET)
    plain, compiled = KVarNCache(llama.config, PRESET), Compiled(llama)
    for chunk in ids.split([150, 49, 1], 1):
        with torch.no_grad():
            expected = llama(chunk, past_key_values=plain).logits
        assert torch.equal(compiled(chunk, static), expected)
    assert compiled.graphs <= 3


def test_left_padding(llama):
    ids, mask = left_padding(3, 230, [0, 37, 70])
    pair, compiled = Pair(llama, ids[:, :75], mask), Compiled(llama)
    wide = torch.zeros(3, MAX_TOKENS, dtype=torch.long)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in range(75, 230):
            wide[:, : index + 1] = mask[:, : index + 1]
            logits, expected = pair.step(compiled, ids[:, index : index + 1], wide)
            assert torch.equal(logits, expected)
    assert compiled.graphs == 1
    pair.assert_same_state()
    assert [sequence.length for sequence in pair.static.rows.sequences] == [230, 193, 160]


def test_a_mask_may_be_known_ahead(llama):
    """Columns that are not there yet are not looked at."""
    ids, mask = left_padding(2, 80, [0, 30])
    pair, compiled = Pair(llama, ids[:, :70], mask), Compiled(llama)
    wide = torch.cat([mask, torch.ones(2, MAX_TOKENS - 80, dtype=torch.long)], 1)
    for index in range(70, 80):
        logits, expected = pair.step(compiled, ids[:, index : index + 1], wide)
        assert torch.equal(logits, expected)
    assert compiled.graphs == 1


def test_a_mask_that_grows_is_compiled_twice(llama):
    ids, mask = left_padding(2, 150, [0, 30])
    pair, compiled = Pair(llama, ids[:, :70], mask), Compiled(llama)
    for index in range(70, 150):
        logits, expected = pair.step(compiled, ids[:, index : index + 1], mask[:, : index + 1])
        assert torch.equal(logits, expected)
    assert compiled.graphs == 2


def test_two_caches_share_a_graph(llama):
    ids = tokens(4, 170)
    pairs = [Pair(llama, ids[:2, :100]), Pair(llama, ids[2:, :120], hold=0)]
    compiled = Compiled(llama)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in range(50):
            for pair, rows in zip(pairs, ids.split(2), strict=True):
                start = pair.columns + index
                logits, expected = pair.step(compiled, rows[:, start : start + 1])
                assert torch.equal(logits, expected)
    assert compiled.graphs == 1
    for pair in pairs:
        pair.assert_same_state()


def test_eager_and_compiled_steps_take_turns(llama):
    ids = tokens(2, 150)
    pair, compiled = Pair(llama, ids[:, :50]), Compiled(llama)
    for index in range(50, 150):
        one = ids[:, index : index + 1]
        step = compiled if index % 3 else lambda ids, cache, *_: pair._run(ids, cache)
        logits, expected = pair.step(step, one)
        assert torch.equal(logits, expected)
    assert compiled.graphs == 1
    pair.assert_same_state()


def _crop(cache):
    cache.crop(-70)
    return cache


def _reorder(cache):
    cache.reorder_cache(torch.tensor([1, 1]))
    return cache


def _select(cache):
    cache.batch_select_indices(torch.tensor([1, 0]))
    return cache


@pytest.mark.parametrize("change", [_crop, _reorder, _select, copy.deepcopy])
def test_changes_between_steps(llama, change):
    ids = tokens(2, 260)
    pair, compiled = Pair(llama, ids[:, :150]), Compiled(llama)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in range(150, 200):
            pair.step(compiled, ids[:, index : index + 1])
        pair.static, pair.plain = change(pair.static), change(pair.plain)
        for index in range(200, 240):
            logits, expected = pair.step(compiled, ids[:, index : index + 1])
            assert torch.equal(logits, expected)
    assert compiled.graphs == 1


def test_a_copy_goes_its_own_way(llama):
    ids, others = tokens(1, 90), tokens(1, 90, seed=2)
    pair, compiled = Pair(llama, ids[:, :70]), Compiled(llama)
    copied = copy.deepcopy(pair.static)
    assert int(copied.handle) != int(pair.static.handle)
    for index in range(70, 90):
        compiled(others[:, index : index + 1], copied)
        logits, expected = pair.step(compiled, ids[:, index : index + 1])
        assert torch.equal(logits, expected)
    assert compiled.graphs == 1


def test_other_numbers_of_rows(llama):
    ids = tokens(2, 120)
    pair, compiled = Pair(llama, ids[:, :70]), Compiled(llama)
    pair.step(compiled, ids[:, 70:71])
    for cache in (pair.static, pair.plain):
        cache.batch_repeat_interleave(2)
    for index in range(71, 120):
        logits, expected = pair.step(compiled, ids.repeat_interleave(2, 0)[:, index : index + 1])
        assert torch.equal(logits, expected)
    for cache in (pair.static, pair.plain):
        cache.reset()
    for chunk in (ids[:1, :100], ids[:1, 100:101]):
        logits, expected = pair.step(compiled, chunk)
        assert torch.equal(logits, expected)


def test_no_room(llama):
    ids = tokens(2, 150)
    pair, compiled = Pair(llama, ids[:, :130], max_tokens=140), Compiled(llama)
    for index in range(130, 140):
        pair.step(compiled, ids[:, index : index + 1])
    for _ in range(2):
        with pytest.raises(CapacityError, match="141 tokens: expected at most max_tokens=140"):
            compiled(ids[:, 140:141], pair.static)
        assert pair.static.get_seq_length() == 140
    pair.assert_same_state()
    for cache in (pair.static, pair.plain):
        cache.crop(-3)
    for index in range(137, 140):
        logits, expected = pair.step(compiled, ids[:, index : index + 1])
        assert torch.equal(logits, expected)
    assert compiled.graphs == 1


@pytest.mark.parametrize("at", [126, 127, 130])  # within a tile, and where one is sealed
@pytest.mark.parametrize("operation", ["append", "attend"])
def test_a_step_that_breaks_off(llama, monkeypatch, operation, at):
    ids = tokens(2, 150)
    pair, compiled = Pair(llama, ids[:, :60]), Compiled(llama)
    done = getattr(kvarn.Step, operation)
    broken = 0

    def fails(step, layer, *arguments, **options):
        if layer == 1:
            raise RuntimeError("the disk is on fire")
        return done(step, layer, *arguments, **options)

    for index in range(60, 150):
        if index == at:
            with monkeypatch.context() as patch:
                patch.setattr(kvarn.Step, operation, fails)
                with pytest.raises(RuntimeError, match="the disk is on fire"):
                    compiled(tokens(2, 1, seed=9), pair.static)
            assert pair.static.get_seq_length() == index
            broken += 1
        logits, expected = pair.step(compiled, ids[:, index : index + 1])
        assert torch.equal(logits, expected)
    assert broken == 1
    assert compiled.graphs == 1


def test_a_wrong_mask_is_refused_when_the_graph_runs(llama):
    ids, mask = left_padding(2, 80, [0, 30])
    pair, compiled = Pair(llama, ids[:, :70], mask), Compiled(llama)
    shown = torch.ones(2, MAX_TOKENS, dtype=torch.long)
    for given, text in (
        (shown, "attention_mask shows column 0 of row 1: expected 0"),
        (None, "attention_mask shows column 0 of row 1: expected 0"),
        (mask[:, :5], r"attention_mask \[2, 5\]: expected \[2, 71\]"),
    ):
        with pytest.raises(ShapeError, match=text):
            compiled(ids[:, 70:71], pair.static, given)
        assert pair.static.get_seq_length() == 70
    logits, expected = pair.step(compiled, ids[:, 70:71], mask[:, :71])
    assert torch.equal(logits, expected)


def test_hidden_tokens_are_masked_at_a_price(llama):
    ids = tokens(2, 80)
    pair, compiled = Pair(llama, ids[:, :70]), Compiled(llama)
    mask = torch.ones(2, 71, dtype=torch.long)
    mask[0, 20:60] = 0
    with torch.no_grad():
        expected = llama(ids[:, 70:71], past_key_values=pair.plain, attention_mask=mask).logits
    assert_close(compiled(ids[:, 70:71], pair.static, mask), expected)
    assert pair.static.materializations == 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "kvarn"])
@pytest.mark.parametrize("padding", [[0, 0], [0, 30]])
def test_without_compiling_it_is_a_kvarn_cache(implementation, padding):
    model = make("qwen3")
    model.set_attn_implementation(implementation)
    ids, mask = left_padding(2, 200, padding)
    pair = Pair(model, ids[:, :90], mask)
    for chunk in ids[:, 90:].split(10, 1):
        logits, expected = pair.step(lambda ids, cache, *_: pair._run(ids, cache), chunk)
        assert torch.equal(logits, expected)
    assert pair.static.materializations == pair.plain.materializations
