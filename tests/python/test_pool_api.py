"""Pools, sequences and steps against a plain model of what must be stored; attention against float64."""

import gc
import threading
import time

import kvarn
import numpy as np
import pytest
import torch
from kvarn import Config, LayerShape, Pool

LAYERS = [LayerShape(2, 32), LayerShape(1, 48)]
GROUP = 64


def make_config(**options):
    return Config(**{"name": "kvarn_k4v2_g64", "head_dim": 32, **options})


def make_pool(cfg, dtype="float32", pages=32, slots=32):
    return Pool(cfg, layers=LAYERS, pages=pages, slots=slots, dtype=dtype)


class Model:
    """What a pool must answer: raw K and V of each sequence, cut into tiles by the rules."""

    def __init__(self, pool):
        self.pool, self.cfg = pool, pool.cfg
        self.tokens = {}  # sequence -> per layer (k, v), [length, kv_heads, head_dim]
        self.committed = {}
        self.rng = np.random.default_rng(1)

    def create(self):
        sequence = self.pool.create()
        self.tokens[sequence] = [tuple(np.zeros((2, 0, *shape), np.float32)) for shape in LAYERS]
        self.committed[sequence] = 0
        return sequence

    def rows(self, count, shape):
        return self.rng.standard_normal((count, *shape)).astype(np.float32)

    def step(self, sequences, counts, holds=None):
        """Runs a step through the pool, compares attention around each append, and records the tokens."""
        holds = holds or [0] * len(sequences)
        step = self.pool.step(sequences, counts, holds)
        for layer, shape in enumerate(LAYERS):
            k, v = self.rows(sum(counts), shape), self.rows(sum(counts), shape)
            q = self.rows(sum(counts), (shape.kv_heads * 2, shape.head_dim))
            past = [self.stored(sequence, layer, self.committed[sequence]) for sequence in sequences]
            starts = [len(k_past) for k_past, _ in past]
            check_attention(step.attend(layer, q, return_lse=True), q, past, starts, counts)
            for index, (k_past, v_past) in enumerate(past):
                for got, want in zip(step.expand(layer, index), (k_past, v_past), strict=True):
                    assert np.abs(got - want).max(initial=0) < 1e-5
            step.append(layer, k, v)
            row = 0
            for sequence, count in zip(sequences, counts, strict=True):
                k_all, v_all = self.tokens[sequence][layer]
                self.tokens[sequence][layer] = (
                    np.concatenate([k_all, k[row : row + count]]),
                    np.concatenate([v_all, v[row : row + count]]),
                )
                row += count
            now = []
            for sequence, count, start, hold in zip(sequences, counts, starts, holds, strict=True):
                now.append(self.stored(sequence, layer, start + count - hold))
            for index, stored in enumerate(now):
                for got, want in zip(step.expand(layer, index), stored, strict=True):
                    assert got.shape == want.shape
                    assert np.abs(got - want).max(initial=0) < 1e-5
            options = {
                "window": 50,
                "softcap": 3.0,
                "sink_logits": np.linspace(-1, 2, q.shape[1], dtype="f4"),
            }
            check_attention(step.attend(layer, q, return_lse=True), q, now, starts, counts)
            check_attention(
                step.attend(layer, q, scale=0.3, return_lse=True, **options),
                q,
                now,
                starts,
                counts,
                scale=0.3,
                **options,
            )
        step.finish()
        for sequence, hold in zip(sequences, holds, strict=True):
            self.committed[sequence] = len(self.tokens[sequence][0][0]) - hold
        self.check()

    def fork(self, sequence):
        made = self.pool.fork(sequence)
        self.tokens[made] = list(self.tokens[sequence])
        self.committed[made] = self.committed[sequence]
        self.check()
        return made

    def reorder(self, sequences, order):
        self.pool.reorder(sequences, order)
        tokens = [list(self.tokens[sequences[index]]) for index in order]
        committed = [self.committed[sequences[index]] for index in order]
        self.tokens.update(zip(sequences, tokens, strict=True))
        self.committed.update(zip(sequences, committed, strict=True))
        self.check()

    def truncate(self, sequence, length):
        self.pool.truncate(sequence, length)
        self.tokens[sequence] = [(k[:length], v[:length]) for k, v in self.tokens[sequence]]
        self.committed[sequence] = min(length, self.committed[sequence])
        self.check()

    def sealed(self, tile, committed):
        whole_sink = tile == 0 and self.cfg.sink_tokens == GROUP
        return not whole_sink and committed >= (tile + 1) * GROUP + self.cfg.recent_tokens

    def stored(self, sequence, layer, committed):
        """K and V as they must be read."""
        cfg = self.cfg.replace(head_dim=LAYERS[layer].head_dim)
        k, v = (array.copy() for array in self.tokens[sequence][layer])
        for tile in range(len(k) // GROUP):
            if not self.sealed(tile, committed):
                continue
            at = slice(tile * GROUP, (tile + 1) * GROUP)
            raw = [np.ascontiguousarray(array[at].transpose(1, 0, 2)) for array in (k, v)]
            sinks = max(0, cfg.sink_tokens - tile * GROUP)
            for array, decoded in zip((k, v), kvarn.decode(kvarn.encode(*raw, cfg), cfg), strict=True):
                array[at][sinks:] = decoded.transpose(1, 0, 2)[sinks:]
        return k, v

    def check(self):
        """Lengths, tables and contents of every sequence."""
        for sequence, layers in self.tokens.items():
            length = len(layers[0][0])
            assert (sequence.length, sequence.committed) == (length, self.committed[sequence])
            tiles = -(-length // GROUP)
            blocks = np.from_dlpack(sequence.block_table)
            slots = np.from_dlpack(sequence.slot_table)
            sealed = [self.sealed(tile, sequence.committed) for tile in range(tiles)]
            assert (blocks >= 0).tolist() == sealed
            keeps = [not now or (tile == 0 and self.cfg.sink_tokens > 0) for tile, now in enumerate(sealed)]
            assert (slots >= 0).tolist() == keeps
            for layer in range(len(LAYERS)):
                expected = self.stored(sequence, layer, sequence.committed)
                for got, want in zip(self.pool.expand(sequence, layer), expected, strict=True):
                    assert got.shape == want.shape
                    assert np.abs(got - want).max(initial=0) < 1e-5


def check_attention(
    result, q, stored, starts, counts, *, scale=None, window=None, softcap=None, sink_logits=None
):
    out, lse = result
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:2], np.float32)
    row = 0
    for (k, v), start, count in zip(stored, starts, counts, strict=True):
        for token in range(count):
            position = start + token
            first = max(0, position - window + 1) if window else 0
            for head in range(q.shape[1]):
                kv_head = head * k.shape[1] // q.shape[1]
                keys = k[first : position + 1, kv_head].astype(np.float64)
                logits = keys @ q[row, head] * (scale or q.shape[2] ** -0.5)
                if softcap:
                    logits = softcap * np.tanh(logits / softcap)
                weights = np.exp(logits)
                total = weights.sum() + (np.exp(sink_logits[head]) if sink_logits is not None else 0)
                expected = (
                    weights @ v[first : position + 1, kv_head] / total if total else np.zeros(q.shape[2])
                )
                assert np.abs(out[row, head] - expected).max() < 5e-4 * max(1, np.abs(expected).max())
                with np.errstate(divide="ignore"):
                    wanted = np.log(total)
                assert lse[row, head] == pytest.approx(wanted, abs=1e-4)
            row += 1


@pytest.mark.parametrize("recent_tokens", [0, 70])
@pytest.mark.parametrize("sink_tokens", [0, 16, 64])
def test_ragged_batches_are_stored_and_read_by_the_rules(sink_tokens, recent_tokens):
    model = Model(make_pool(make_config(sink_tokens=sink_tokens, recent_tokens=recent_tokens)))
    a, b, c = model.create(), model.create(), model.create()
    model.step([a], [1])
    model.step([b, a], [130, 62])
    model.step([c, b, a], [64, 1, 1])
    model.step([a, c], [3, 70], [3, 2])  # drafts
    model.truncate(a, a.length - 2)
    model.step([a, b, c], [64, 5, 0], [4, 0, 0])  # c only commits
    model.pool.free(b)
    del model.tokens[b]
    d = model.create()
    model.step([d, a], [200, 2])
    assert model.pool.stats().sequences == 3


@pytest.mark.parametrize("recent_tokens", [0, 70])
@pytest.mark.parametrize("sink_tokens", [0, 16, 64])
@pytest.mark.parametrize("length", [40, 64, 130])
def test_forks_share_what_was_stored_and_go_their_own_ways(sink_tokens, recent_tokens, length):
    model = Model(
        make_pool(make_config(sink_tokens=sink_tokens, recent_tokens=recent_tokens), pages=64, slots=64)
    )
    a = model.create()
    model.step([a], [length], [3])
    used = model.pool.stats()
    b, c = model.fork(a), model.fork(a)
    assert (model.pool.stats().pages_used, model.pool.stats().slots_used) == (
        used.pages_used,
        used.slots_used,
    )
    model.truncate(b, length - 3)  # drafts, which the others keep
    model.step([a, b], [1, 2], [1, 0])
    model.step([c, b, a], [90, 30, 24])  # complete a shared tile, and go beyond it
    d = model.fork(c)
    model.pool.free(c)
    del model.tokens[c]
    model.step([d, a], [5, 70])
    model.reorder([a, b, d], [2, 2, 0])
    model.step([a, b, d], [1, 1, 1])
    model.step([b, a, d], [20, 64, 3])
    model.reorder([a], [0])
    for sequence in (a, b, d):
        model.pool.free(sequence)
    assert (model.pool.stats().pages_used, model.pool.stats().slots_used) == (0, 0)


def test_an_abandoned_step_leaves_forks_alone():
    model = Model(make_pool(make_config()))
    a = model.create()
    model.step([a], [70])
    b = model.fork(a)
    before = model.pool.stats()
    step = model.pool.step([a, b], [1, 90])
    for layer, shape in enumerate(LAYERS):
        k = model.rows(91, shape)
        step.append(layer, k, k)
    step.abandon()
    assert model.pool.stats() == before
    model.check()
    model.step([a, b], [2, 1])


def test_records_in_pages_are_those_of_encode():
    cfg = make_config(sink_tokens=0)
    pool = Pool(cfg, layers=1, kv_heads=2, pages=4, slots=4)
    sequence = pool.create()
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 150, 2, 32)).astype(np.float16)
    for first, last in [(0, 5), (5, 150)]:  # the first tile is sealed from a slot, the second from the input
        with pool.step([sequence], [last - first]) as step:
            step.append(0, k[first:last], v[first:last])
    pages = np.from_dlpack(pool.pages[0])
    for tile, page in enumerate(np.from_dlpack(sequence.block_table)[:2]):
        at = slice(tile * 64, tile * 64 + 64)
        rec = kvarn.encode(k[at].transpose(1, 0, 2), v[at].transpose(1, 0, 2), cfg)
        assert np.array_equal(pages[page], rec)
    assert np.from_dlpack(sequence.block_table).tolist() == [0, 1, -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_torch_tensors_of_every_type(dtype):
    name = "float32" if dtype == torch.float32 else "float16"
    pool = Pool(make_config(), layers=1, kv_heads=2, pages=4, slots=4, dtype=dtype)
    assert pool.dtype == name
    sequence = pool.create()
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(140, heads, 32, generator=generator).to(dtype) for heads in (2, 2, 6))
    step = pool.step([sequence], [140])
    # Half of the rows of a wider tensor, transposed from the layout of transformers.
    wide = (
        torch.stack([k, torch.full_like(k, 7)], dim=1)
        .flatten(0, 1)
        .transpose(0, 1)
        .contiguous()
        .transpose(0, 1)
    )
    assert not wide[::2].is_contiguous()
    assert step.append(0, wide[::2], v) == (0, 0)
    out, lse = step.attend(0, q, return_lse=True)
    assert (out.dtype, out.shape, lse.dtype, lse.shape) == (dtype, q.shape, torch.float32, q.shape[:2])
    step.finish()
    k2, v2 = pool.expand(sequence, 0, like=q)
    assert (k2.dtype, v2.dtype, tuple(k2.shape)) == (dtype, dtype, (140, 2, 32))
    repeated = [x.double().repeat_interleave(3, dim=1).transpose(0, 1) for x in (k2, v2)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double().transpose(0, 1), *repeated, is_causal=True
    )
    error = (out.double() - expected.transpose(0, 1)).norm() / expected.norm()
    assert error < {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 1e-4}[dtype]
    assert (k2[:64].float() - k[:64].float()).abs().max() < 0.02  # sinks


def test_attention_writes_to_the_output_that_it_is_given():
    pool = make_pool(make_config())
    sequence = pool.create()
    rng = np.random.default_rng(3)
    k, v, q = (rng.standard_normal((100, heads, 32)).astype(np.float32) for heads in (2, 2, 4))
    with pool.step([sequence], [100]) as step:
        step.append(0, k, v)
        expected, expected_lse = step.attend(0, q, return_lse=True)
        given = np.full_like(q, np.nan)
        out, lse = step.attend(0, q, return_lse=True, out=given)
        assert out is given
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(lse, expected_lse)
        rows = torch.full((3, 100, 4, 32), torch.nan)
        part = step.attend(0, torch.from_numpy(q), out=rows[1])
        assert part.data_ptr() == rows[1].data_ptr()
        np.testing.assert_array_equal(rows[1].numpy(), expected)
        assert rows[[0, 2]].isnan().all()
        step.abandon()


def test_the_rotated_frame():
    pool = Pool(make_config(), layers=1, kv_heads=1, pages=4, slots=4, dtype="float32")
    rng = np.random.default_rng(0)
    k, v, q = rng.standard_normal((3, 100, 1, 32)).astype(np.float32)
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < 32:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.float32(np.sqrt(2))
    plain, turned = pool.create(), pool.create()
    step = pool.step([plain], [100])
    step.append(0, k, v)
    out = step.attend(0, q)
    step.finish()
    step = pool.step([turned], [100])
    step.append(0, k @ matrix, v @ matrix, rotated=True)
    out_turned = step.attend(0, q @ matrix, rotated=True)
    step.finish()
    assert np.abs(out_turned @ matrix - out).max() < 1e-5
    for a, b in zip(pool.expand(plain, 0), pool.expand(turned, 0, rotated=True), strict=True):
        assert np.abs(a - b @ matrix).max() < 1e-5


def test_a_step_is_a_context_manager():
    pool = make_pool(make_config())
    sequence = pool.create()
    before = pool.stats()

    def fill(step, layers):
        for layer in layers:
            k = np.ones((3, *LAYERS[layer]), np.float32)
            step.append(layer, k, k)

    with pytest.raises(ZeroDivisionError), pool.step([sequence], [3]) as step:
        fill(step, [0, 1 // 0])
    assert pool.stats() == before
    with (
        pytest.raises(kvarn.StateError, match="layer 1 has not been appended to"),
        pool.step([sequence], [3]) as step,
    ):
        fill(step, [0])
    assert pool.stats() == before
    with pool.step([sequence], [3]) as step:
        fill(step, [0, 1])
    assert sequence.length == 3
    with pool.step([sequence], [3]) as step:
        fill(step, [0, 1])
        step.finish()
    with pool.step([sequence], [3]) as step:
        step.abandon()
    assert sequence.length == 6
    step = pool.step([sequence], [100])
    assert pool.stats().open_steps == 1
    del step
    gc.collect()
    assert pool.stats().open_steps == 0
    assert sequence.length == 6


def test_what_a_step_shows():
    pool = make_pool(make_config(sink_tokens=16))
    a, b = pool.create(), pool.create()
    step = pool.step([a, b], [130, 3])
    assert step.tokens == 133
    assert np.from_dlpack(step.first_rows).tolist() == [0, 130, 133]
    assert np.from_dlpack(step.lengths).tolist() == [130, 3]
    assert torch.from_dlpack(step.block_table).tolist() == [[0, 1, -1], [-1, -1, -1]]
    assert torch.from_dlpack(step.slot_table).tolist() == [[0, -1, 1], [2, -1, -1]]
    assert (a.length, b.length) == (0, 0)


def test_capacity_is_refused_before_any_write_and_comes_back():
    pool = make_pool(make_config(), pages=2, slots=4)
    a, b = pool.create(), pool.create()
    ones = [np.ones((200, *shape), np.float32) for shape in LAYERS]

    def run(sequence, count):
        with pool.step([sequence], [count]) as step:
            for layer, k in enumerate(ones):
                step.append(layer, k[:count], k[:count])

    run(a, 192)
    before = pool.stats()
    assert (before.pages_used, before.slots_used) == (2, 1)
    with pytest.raises(kvarn.CapacityError, match="sequence 1 needs 2 pages with 0 free"):
        run(b, 192)
    assert pool.stats() == before
    pool.free(a)
    assert pool.stats().pages_free == 2
    run(b, 192)
    assert b.length == 192


def test_sequences_of_one_pool_may_be_used_by_several_threads():
    cfg = make_config(sink_tokens=0)
    rng = np.random.default_rng(0)
    k = rng.standard_normal((4, 300, 2, 32)).astype(np.float16)
    pool = Pool(cfg, layers=1, kv_heads=2, pages=64, slots=64)
    sequences = [pool.create() for _ in range(4)]
    errors = []

    def work(index):
        try:
            for first in range(0, 300, 20):
                with pool.step([sequences[index]], [20]) as step:
                    step.append(0, k[index, first : first + 20], k[index, first : first + 20])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for index, sequence in enumerate(sequences):
        alone = Pool(cfg, layers=1, kv_heads=2, pages=8, slots=8)
        other = alone.create()
        with alone.step([other], [300]) as step:
            step.append(0, k[index], k[index])
        for got, want in zip(pool.expand(sequence, 0), alone.expand(other, 0), strict=True):
            assert np.array_equal(got, want)


def test_stats_and_reprs():
    pool = Pool(make_config(), layers=2, kv_heads=2, pages=4, slots=4)
    sequence = pool.create()
    k = np.ones((3, 2, 32), np.float16)
    k[0, 0, 0], k[1, 0, :] = np.nan, 65504
    with pool.step([sequence], [3]) as step:
        counts = [step.append(layer, k, k) for layer in range(2)]
    stats = pool.stats()
    assert counts[0].non_finite == 2
    assert stats.non_finite == 4
    assert stats.saturated == sum(count.saturated for count in counts) > 0
    assert (stats.tokens, stats.slots_used, stats.slots_free) == (3, 1, 3)
    assert (stats.page_bytes, stats.slot_bytes) == (0, 2 * 2 * 2 * 64 * 32 * 2)
    assert repr(stats).startswith("Stats(pages=4, pages_used=0,")
    assert "1 of 4 slots" in repr(pool)
    assert repr(sequence) == "<kvarn sequence 0 of 3 tokens>"
    pool.free(sequence)
    assert repr(sequence) == "<kvarn sequence 0, freed>"


def test_other_threads_run_while_attending():
    pool = Pool(
        Config("kvarn_k4v2_g128", head_dim=64), layers=1, kv_heads=4, pages=32, slots=4, dtype="float32"
    )
    k = np.random.default_rng(0).standard_normal((4096, 4, 64), dtype=np.float32)
    step = pool.step([pool.create()], [4096])
    step.append(0, k, k)
    started, spent = threading.Event(), []

    def work():
        started.set()
        begin = time.perf_counter()
        step.attend(0, np.repeat(k, 2, axis=1))
        spent.append(time.perf_counter() - begin)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    longest, last = 0.0, time.perf_counter()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    # Holding the interpreter would stop this thread for as long as attending takes.
    assert longest < spent[0] / 2
