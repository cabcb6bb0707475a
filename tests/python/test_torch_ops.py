"""The operators of torch: what they compute, what compilers see of them, and wrong handles."""

import gc

import kvarn
import kvarn.torch_ops
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

KV_HEADS, HEADS, D, LAYERS = 2, 4, 64, 2
ATTEND_UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class Cache:
    """A CPU pool with one sequence, and random rows from a seed."""

    def __init__(self, tokens=70):
        cfg = kvarn.Config("kvarn_k4v2_g64", head_dim=D, sink_tokens=0)
        self.pool = kvarn.Pool(cfg, layers=LAYERS, kv_heads=KV_HEADS, pages=8, slots=8)
        self.random = torch.Generator().manual_seed(3)
        self.sequence = self.pool.create()
        with self.pool.step([self.sequence], [tokens]) as step:
            for layer in range(LAYERS):
                step.append(layer, self.rows(tokens, KV_HEADS), self.rows(tokens, KV_HEADS))

    def rows(self, count, heads):
        return torch.randn(count, heads, D, generator=self.random).half()

    def step(self, count=1):
        return self.pool.step([self.sequence], [count])


def forward(handle, q, k, v):
    """Every layer: attention before and after the append, whose results differ."""
    outputs = []
    for layer in range(LAYERS):
        before = torch.ops.kvarn.attend(handle, layer, q)
        torch.ops.kvarn.append(handle, layer, k, v)
        after, lse = torch.ops.kvarn.attend_lse(handle, layer, q, window=50)
        outputs += [before * 2, after, lse, torch.ops.kvarn.attend(handle, layer, q)]
    return outputs


def test_the_operators_are_the_methods():
    cache, twin = Cache(), Cache()
    q, k, v = cache.rows(2, HEADS), cache.rows(2, KV_HEADS), cache.rows(2, KV_HEADS)
    logits = torch.linspace(-1, 1, HEADS)
    step, other = cache.step(2), twin.step(2)
    options = {"scale": 0.2, "window": 30, "softcap": 5.0, "sink_logits": logits, "rotated": True}
    torch.ops.kvarn.append(step.handle, 0, k, v, True)
    other.append(0, k, v, rotated=True)
    out, lse = torch.ops.kvarn.attend_lse(step.handle, 0, q, **options)
    expected, expected_lse = other.attend(0, q, **options, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert torch.equal(torch.ops.kvarn.attend(step.handle, 0, q, **options), expected)
    assert not torch.equal(torch.ops.kvarn.attend(step.handle, 0, q), expected)


@pytest.mark.parametrize("util", ATTEND_UTILS)
@pytest.mark.parametrize("name", ["attend", "attend_lse"])
def test_attention_passes_torchs_checks(name, util):
    cache = Cache()
    step = cache.step(2)
    op, q = getattr(torch.ops.kvarn, name).default, cache.rows(2, HEADS)
    for arguments in [(), (0.1, 40, 3.0, torch.zeros(HEADS), True)]:
        torch.library.opcheck(op, (step.handle, 0, q, *arguments), test_utils=util)
    transposed = cache.rows(HEADS, 2).transpose(0, 1)
    torch.library.opcheck(op, (step.handle, 0, transposed), test_utils=util)


@pytest.mark.parametrize("util", ["test_schema", "test_autograd_registration", "test_faketensor"])
def test_append_passes_torchs_checks(util):
    # Not the check that runs an operator twice: a layer is appended to once.
    cache = Cache()
    step = cache.step(2)
    arguments = (step.handle, 0, cache.rows(2, KV_HEADS), cache.rows(2, KV_HEADS))
    torch.library.opcheck(torch.ops.kvarn.append.default, arguments, test_utils=util)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_graph_serves_every_step(backend):
    torch._dynamo.reset()
    cache, twin = Cache(), Cache()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    for _ in range(60):  # across the border of a tile
        q, k, v = cache.rows(1, HEADS), cache.rows(1, KV_HEADS), cache.rows(1, KV_HEADS)
        with fresh_cache(), cache.step() as step, twin.step() as other:
            outputs = compiled(step.handle, q, k, v)
            expected = forward(other.handle, q, k, v)
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
            assert not torch.equal(outputs[0] / 2, outputs[3])
    assert counter.frame_count == 1
    names = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert [name for name in names if "kvarn" in name] == LAYERS * [
        "kvarn.attend",
        "kvarn.append",
        "kvarn.attend_lse",
        "kvarn.attend",
    ]


def test_an_append_whose_result_nobody_uses_is_kept():
    torch._dynamo.reset()

    def store(handle, k, v):
        for layer in range(LAYERS):
            torch.ops.kvarn.append(handle, layer, k, v)
        return k + 1

    cache = Cache()
    compiled = torch.compile(store, fullgraph=True, backend="aot_eager")
    with cache.step() as step:
        compiled(step.handle, cache.rows(1, KV_HEADS), cache.rows(1, KV_HEADS))
    assert cache.sequence.length == 71


def test_a_handle_belongs_to_one_step():
    cache = Cache()
    step = cache.step()
    assert step.handle is step.handle
    handle = step.handle.clone()
    step.abandon()
    with pytest.raises(kvarn.StateError, match=r"^the step is closed"):
        torch.ops.kvarn.attend(handle, 0, cache.rows(1, HEADS))
    del step
    gc.collect()
    with pytest.raises(kvarn.StateError, match=rf"^step handle {int(handle)}: expected the handle"):
        torch.ops.kvarn.attend(handle, 0, cache.rows(1, HEADS))
    assert int(cache.step().handle) != int(handle)


def test_errors_of_a_step_come_through():
    cache = Cache()
    step = cache.step()
    with pytest.raises(kvarn.ShapeError, match=r"^q of shape \[2, 4, 64\]: expected \[1, "):
        torch.ops.kvarn.attend(step.handle, 0, cache.rows(2, HEADS))
    with pytest.raises(kvarn.TensorError, match=r"^q requires grad"):
        torch.ops.kvarn.attend(step.handle, 0, cache.rows(1, HEADS).requires_grad_())
