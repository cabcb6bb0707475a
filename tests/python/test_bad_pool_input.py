"""Bad input to pools: an error that names it, and the pool is as it was, to the byte."""

import contextlib

import numpy as np
import pytest
import torch
from kvarn import (
    CapacityError,
    Config,
    ConfigError,
    DeviceError,
    DTypeError,
    LayerShape,
    NonFiniteError,
    Pool,
    ShapeError,
    StateError,
    TensorError,
)
from lenders import Lender, capsule

CFG = Config("kvarn_k4v2_g64", head_dim=32)


def zeros(*shape, dtype=np.float16):
    return np.zeros(shape, dtype)


def refused(error, text):
    return pytest.raises(error, match=text)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"layers": 0}, ShapeError, "layers 0: expected 1 or more"),
        ({"layers": -1}, ShapeError, "layers 0: expected 1 or more"),
        ({"layers": []}, ShapeError, "kv_heads 2 beside a list"),
        ({"layers": [], "kv_heads": None}, ShapeError, "layers 0: expected 1 or more"),
        ({"kv_heads": None}, ShapeError, "kv_heads None with 2 layers"),
        ({"kv_heads": 0}, ShapeError, "kv_heads 0 of layer 0: expected 1 to 4096"),
        ({"kv_heads": -2}, ShapeError, "kv_heads -2: expected 0 or more"),
        ({"layers": [(2, 40)], "kv_heads": None}, ConfigError, "head_dim 40: expected a multiple of 16"),
        ({"pages": -1}, ShapeError, "pages -1: expected 0 or more"),
        ({"slots": -1}, ShapeError, "slots -1: expected 0 or more"),
        ({"pages": 2**40}, ShapeError, "pages: expected at most"),
        ({"pages": 2**31 - 1, "layers": 2**12}, CapacityError, "use fewer pages or slots"),
        ({"dtype": "float64"}, DTypeError, "dtype float64: expected float16, bfloat16 or float32"),
        ({"dtype": torch.int8}, DTypeError, "dtype int8: expected"),
        ({"dtype": np.float64}, DTypeError, "dtype float64: expected"),
        (
            {"device": "cuda:x"},
            DeviceError,
            "device 'cuda:x': expected 'cpu', 'cuda' or 'cuda:N'",
        ),
        ({"device": torch.device("meta")}, DeviceError, "device 'meta': expected 'cpu', 'cuda' or 'cuda:N'"),
    ],
)
def test_pools_are_refused(changes, error, text):
    with refused(error, text):
        Pool(CFG, **{"layers": 2, "kv_heads": 2, "pages": 4, "slots": 4, **changes})


@pytest.fixture
def pool():
    return Pool(CFG, layers=[LayerShape(2, 32), LayerShape(1, 32)], pages=8, slots=8)


@pytest.fixture
def filled(pool):
    """Two sequences: one with sealed tiles, one short."""
    rng = np.random.default_rng(0)
    a, b = pool.create(), pool.create()
    with pool.step([a, b], [200, 10]) as step:
        for layer, shape in enumerate(pool.layers):
            k = rng.standard_normal((210, *shape)).astype(np.float16)
            step.append(layer, k, k)
    return a, b


@contextlib.contextmanager
def unchanged(pool, *sequences):
    """Use, lengths, tables, and every byte of the pool are as they were."""

    def state():
        memory = [np.from_dlpack(view).tobytes() for view in (*pool.pages, *pool.slots)]
        tables = [
            (s.length, s.committed, *(np.from_dlpack(t).tolist() for t in (s.block_table, s.slot_table)))
            for s in sequences
        ]
        return pool.stats(), tables, memory

    before = state()
    yield
    assert state() == before


ROWS = zeros(4, 2, 32)


@pytest.mark.parametrize(
    ("layer", "k", "v", "error", "text"),
    [
        (2, ROWS, ROWS, ShapeError, "layer 2: expected 0 to 1"),
        (-1, ROWS, ROWS, ShapeError, "layer -1: expected 0 or more"),
        (
            0,
            zeros(5, 2, 32),
            zeros(5, 2, 32),
            ShapeError,
            r"k of shape \[5, 2, 32\]: expected \[4, 2, 32\] \(sum of counts",
        ),
        (0, ROWS, zeros(4, 1, 32), ShapeError, r"v of shape \[4, 1, 32\]: expected \[4, 2, 32\]"),
        (1, ROWS, ROWS, ShapeError, r"k of shape \[4, 2, 32\]: expected \[4, 1, 32\]"),
        (0, zeros(4, 2, 64), ROWS, ShapeError, r"k of shape \[4, 2, 64\]: expected \[4, 2, 32\]"),
        (0, zeros(8, 32), ROWS, ShapeError, r"k of shape \[8, 32\]: expected three dimensions"),
        (0, zeros(4, 32, 2).transpose(0, 2, 1), ROWS, ShapeError, r"k with strides \[64, 1, 2\]"),
        (
            0,
            ROWS.astype("f4"),
            ROWS.astype("f4"),
            DTypeError,
            "k of dtype float32: expected float16 or bfloat16",
        ),
        (0, ROWS, torch.zeros(4, 2, 32).bfloat16(), DTypeError, "v of dtype bfloat16: expected float16"),
        (0, ROWS, ROWS.astype("f8"), DTypeError, "v of dtype float64: expected"),
        (0, torch.zeros(4, 2, 32, device="meta"), ROWS, DeviceError, "k: device meta: expected cpu"),
        (0, ROWS, torch.zeros(4, 2, 32, requires_grad=True), TensorError, "v requires grad"),
        (0, Lender(capsule(b"other")), ROWS, TensorError, 'k: capsule "other": expected a DLPack capsule'),
        (0, ROWS, "v", DTypeError, "v of type str: expected"),
    ],
)
def test_append_refuses(pool, filled, layer, k, v, error, text):
    step = pool.step(filled, [3, 1])
    with unchanged(pool, *filled), refused(error, text):
        step.append(layer, k, v)
    step.append(0, ROWS, ROWS)  # and the step goes on
    step.append(1, ROWS[:, :1], ROWS[:, :1])
    step.finish()
    assert [sequence.length for sequence in filled] == [203, 11]


@pytest.mark.parametrize("name", ["k", "v"])
def test_append_with_check_names_tensor_layer_token_and_head(pool, filled, name):
    step = pool.step(filled, [3, 1])
    tensors = {"k": ROWS.copy(), "v": ROWS.copy()}
    tensors[name][2, 1, 30] = np.nan
    text = rf"{name}\[2, 1, 30\] \(layer 0, token 2, head 1, channel 30\) is NaN or infinite"
    with unchanged(pool, *filled), refused(NonFiniteError, text):
        step.append(0, *tensors.values(), check=True)
    assert step.append(0, *tensors.values()) == (1, 0)


QUERIES = zeros(4, 4, 32)


@pytest.mark.parametrize(
    ("layer", "q", "options", "error", "text"),
    [
        (2, QUERIES, {}, ShapeError, "layer 2: expected 0 to 1"),
        (0, zeros(3, 4, 32), {}, ShapeError, r"q of shape \[3, 4, 32\]: expected \[4, a multiple of 2, 32\]"),
        (0, zeros(4, 3, 32), {}, ShapeError, r"q of shape \[4, 3, 32\]: expected"),
        (0, zeros(4, 0, 32), {}, ShapeError, r"q of shape \[4, 0, 32\]: expected"),
        (0, zeros(4, 4, 16), {}, ShapeError, r"q of shape \[4, 4, 16\]: expected"),
        (0, zeros(4, 128), {}, ShapeError, r"q of shape \[4, 128\]: expected three dimensions"),
        (
            0,
            zeros(4, 128),
            {"return_lse": True},
            ShapeError,
            r"q of shape \[4, 128\]: expected three dimensions",
        ),
        (0, zeros(4, 4, 64)[..., ::2], {}, ShapeError, "q with strides"),
        (0, QUERIES.astype("f8"), {}, DTypeError, "q of dtype float64: expected"),
        (0, QUERIES.tolist(), {}, DTypeError, "q of type list: expected"),
        (0, torch.zeros(4, 4, 32, device="meta"), {}, DeviceError, "q: device meta: expected cpu"),
        (0, torch.zeros(4, 4, 32, requires_grad=True), {}, TensorError, "q requires grad"),
        (0, QUERIES, {"window": 0}, ShapeError, "window 0: expected 1 or more"),
        (0, QUERIES, {"window": -4}, ShapeError, "window -4: expected 0 or more"),
        (0, QUERIES, {"scale": float("nan")}, ShapeError, "scale NaN: expected a finite number"),
        (0, QUERIES, {"softcap": 0.0}, ShapeError, "softcap 0: expected a positive number"),
        (0, QUERIES, {"softcap": float("inf")}, ShapeError, "softcap inf: expected a positive number"),
        (
            0,
            QUERIES,
            {"sink_logits": zeros(3, dtype="f4")},
            ShapeError,
            r"sink_logits of shape \[3\]: expected \[4\]",
        ),
        (
            0,
            QUERIES,
            {"sink_logits": zeros(1, 4, dtype="f4")},
            ShapeError,
            r"sink_logits of shape \[1, 4\]: expected one",
        ),
        (0, QUERIES, {"sink_logits": zeros(4)}, DTypeError, "sink_logits of dtype float16: expected float32"),
        (0, QUERIES, {"sink_logits": [0.0] * 4}, DTypeError, "sink_logits of type list: expected"),
    ],
)
def test_attend_refuses(pool, filled, layer, q, options, error, text):
    step = pool.step(filled, [3, 1])
    with unchanged(pool, *filled), refused(error, text):
        step.attend(layer, q, **options)
    assert step.attend(0, QUERIES).shape == QUERIES.shape


def test_outputs_are_checked(pool, filled):
    step = pool.step(filled, [3, 1])._step
    read_only = QUERIES.copy()
    read_only.setflags(write=False)
    sums = zeros(4, 4, dtype="f4")
    whole = np.concatenate([QUERIES, QUERIES])
    for out, lse, error, text in [
        (read_only, None, TensorError, "out: read-only memory: expected a writable output"),
        (
            zeros(4, 8, 32)[:, ::2],
            None,
            ShapeError,
            r"out with strides \[256, 64, 1\]: expected a contiguous output",
        ),
        (np.broadcast_to(QUERIES[:1], QUERIES.shape), None, TensorError, "out: read-only"),
        (zeros(4, 2, 32), None, ShapeError, r"out of shape \[4, 2, 32\]: expected \[4, 4, 32\], as q"),
        (QUERIES, None, TensorError, "out: it shares memory with q: expected memory of its own"),
        (whole[2:], None, TensorError, "out: it shares memory with q"),
        (QUERIES.astype("f4"), None, DTypeError, "out of dtype float32: expected float16, the type of q"),
        (QUERIES.copy(), sums.T[:3], ShapeError, r"lse of shape \[3, 4\]: expected \[4, 4\]"),
        (QUERIES.copy(), sums.T, ShapeError, "lse with strides"),
        (QUERIES.copy(), sums.astype("f8"), DTypeError, "lse of dtype float64: expected float32"),
    ]:
        q = QUERIES if out is QUERIES else whole[:4]
        with refused(error, text):
            step.attend(0, q, out, lse, None, None, None, None, False)


@pytest.mark.parametrize(
    ("batch", "counts", "hold", "error", "text"),
    [
        ([0, 1], [3], 0, ShapeError, "1 counts and 2 hold for 2 sequences"),
        ([0, 1], [3, 1, 1], 0, ShapeError, "3 counts and 2 hold for 2 sequences"),
        ([0, 1], [3, 1], [0], ShapeError, "2 counts and 1 hold for 2 sequences"),
        ([], [], 0, ShapeError, "0 sequences: expected at least one"),
        ([0], [-1], 0, ShapeError, "count -1: expected 0 or more"),
        ([0], [2], 3, ShapeError, "hold 3 for sequence 0: expected at most its count, 2"),
        ([0], [2], -1, ShapeError, "hold -1: expected 0 or more"),
        ([0, 0], [1, 1], 0, ShapeError, "sequence 0 at 0 and 1 of the batch"),
        ([0], [2**40], 0, ShapeError, "expected at most"),
        ([0], [64 * 9], 0, CapacityError, "sequence 0 needs 9 pages with 6 free"),
        ([1, 0], [64 * 8, 1], 0, CapacityError, "sequence 1 needs 7 pages with 6 free"),
    ],
)
def test_steps_are_refused(pool, filled, batch, counts, hold, error, text):
    with unchanged(pool, *filled), refused(error, text):
        pool.step([filled[index] for index in batch], counts, hold)
    pool.step(filled, [1, 1]).abandon()


@pytest.mark.parametrize("bad", [["a"], [None], [0]])
def test_sequences_of_the_wrong_kind_are_type_errors(pool, bad):
    with pytest.raises(TypeError):
        pool.step(bad, [1])


def test_too_few_slots(filled):
    pool = Pool(CFG, layers=1, kv_heads=1, pages=8, slots=1)
    a, b = pool.create(), pool.create()
    k = zeros(3, 1, 32)
    with pool.step([a], [3]) as step:
        step.append(0, k, k)
    with unchanged(pool, a, b), refused(CapacityError, "sequence 1 needs 1 slot with 0 free"):
        pool.step([a, b], [1, 1])
    pool.free(a)
    with pool.step([b], [3]) as step:
        step.append(0, k, k)
    assert b.length == 3


def test_freed_sequences_are_refused(pool, filled):
    a, b = filled
    pool.free(b)
    with unchanged(pool, a):
        for call in (
            lambda: pool.free(b),
            lambda: pool.fork(b),
            lambda: pool.reorder([a, b], [0, 0]),
            lambda: pool.truncate(b, 0),
            lambda: pool.step([a, b], [1, 1]),
            lambda: pool.expand(b, 0),
            lambda: b.length,
            lambda: b.committed,
            lambda: b.block_table,
            lambda: b.slot_table,
        ):
            with refused(StateError, "sequence 1, which was freed: expected a live sequence"):
                call()


@pytest.mark.parametrize(
    ("batch", "order", "error", "text"),
    [
        ([0, 1], [0], ShapeError, "order of 1 for 2 sequences: expected one index per sequence"),
        ([0, 1], [0, 2], ShapeError, "order 2 at 1: expected 0 to 1, an index into the sequences"),
        ([0, 1], [0, -1], ShapeError, "order -1"),
        ([0, 0], [0, 1], ShapeError, "sequence 0 at 0 and 1 of the batch: expected each sequence once"),
    ],
)
def test_orders_are_refused(pool, filled, batch, order, error, text):
    with unchanged(pool, *filled), refused(error, text):
        pool.reorder([filled[index] for index in batch], order)
    pool.reorder([], [])


def test_a_copy_of_a_shared_slot_needs_a_free_one():
    pool = Pool(CFG, layers=1, kv_heads=1, pages=8, slots=1)
    a = pool.create()
    k = zeros(3, 1, 32)
    with pool.step([a], [3]) as step:
        step.append(0, k, k)
    b = pool.fork(a)
    with unchanged(pool, a, b), refused(CapacityError, "sequence 1 needs 1 slot with 0 free"):
        pool.step([b], [1])
    pool.free(a)
    with pool.step([b], [3]) as step:
        step.append(0, k, k)
    assert b.length == 6


def test_foreign_sequences_are_refused(pool, filled):
    foreign = Pool(CFG, layers=1, kv_heads=1, pages=1, slots=1).create()
    with unchanged(pool, *filled):
        for call in (
            lambda: pool.free(foreign),
            lambda: pool.truncate(foreign, 0),
            lambda: pool.step([foreign], [1]),
            lambda: pool.expand(foreign, 0),
        ):
            with refused(StateError, "of another pool: expected a sequence of this pool"):
                call()


@pytest.mark.parametrize("close", ["finish", "abandon"])
def test_closed_steps_are_refused(pool, filled, close):
    step = pool.step(filled, [3, 1])
    step.append(0, ROWS, ROWS)
    step.append(1, ROWS[:, :1], ROWS[:, :1])
    getattr(step, close)()
    with unchanged(pool, *filled):
        for call in (
            step.finish,
            lambda: step.append(0, ROWS, ROWS),
            lambda: step.attend(0, QUERIES),
            lambda: step.expand(0, 0),
        ):
            with refused(StateError, "the step is closed: expected an open step"):
                call()
        step.abandon()


def test_sequences_of_an_open_step_are_kept_from_other_changes(pool, filled):
    a, b = filled
    step = pool.step([a], [1])
    with unchanged(pool, a, b):
        for call in (lambda: pool.free(a), lambda: pool.truncate(a, 199), lambda: pool.step([b, a], [1, 1])):
            with refused(StateError, "sequence 0, which is in open step"):
                call()
    step.abandon()
    pool.truncate(a, 199)


def test_a_layer_is_appended_to_once_and_every_layer_before_finish(pool, filled):
    step = pool.step(filled, [3, 1])
    step.append(0, ROWS, ROWS)
    with unchanged(pool, *filled):
        with refused(StateError, "layer 0 was appended to in this step"):
            step.append(0, ROWS + 1, ROWS)
        with refused(StateError, "layer 1 has not been appended to"):
            step.finish()


@pytest.mark.parametrize(
    ("length", "error", "text"),
    [
        (201, ShapeError, "201 tokens of sequence 0: expected at most its length, 200"),
        (10**18, ShapeError, "1000000000000000000 tokens of sequence 0: expected at most its length, 200"),
        (-1, ShapeError, "length -1: expected 0 or more"),
    ],
)
def test_truncations_are_refused(pool, filled, length, error, text):
    with unchanged(pool, *filled), refused(error, text):
        pool.truncate(filled[0], length)
    pool.truncate(filled[0], 191)
    assert filled[0].length == 191


def test_truncations_in_an_open_step_decode_nothing(pool, filled):
    step = pool.step([filled[0]], [1])
    with unchanged(pool, *filled), refused(StateError, "sequence 0, which is in open step"):
        pool.truncate(filled[0], 100)
    step.abandon()
    pool.truncate(filled[0], 100)
    assert pool.stats().unsealed == 1


def test_a_truncation_into_a_record_needs_a_free_slot():
    cfg = CFG.replace(sink_tokens=0)
    pool = Pool(cfg, layers=1, kv_heads=1, pages=8, slots=1)
    sequence, k = pool.create(), zeros(150, 1, 32)
    with pool.step([sequence], [150]) as step:
        step.append(0, k, k)
    text = "100 tokens of sequence 0: expected a free slot for tile 1, which is sealed, with 0 of 1 free"
    with unchanged(pool, sequence), refused(CapacityError, text):
        pool.truncate(sequence, 100)
    pool.truncate(sequence, 64)
    assert pool.stats().unsealed == 0


@pytest.mark.parametrize("layer", [-1, 2, 10**6])
def test_expand_refuses_layers_that_do_not_exist(pool, filled, layer):
    with refused(ShapeError, f"layer {layer}: expected"):
        pool.expand(filled[0], layer)


@pytest.mark.parametrize(
    ("layer", "index", "text"), [(2, 0, "layer 2"), (0, 2, "index 2"), (0, -1, "index -1")]
)
def test_expand_of_a_step_refuses_what_does_not_exist(pool, filled, layer, index, text):
    step = pool.step(filled, [3, 1])
    with refused(ShapeError, f"{text}: expected 0"):
        step.expand(layer, index)


def test_expand_refuses_types_that_do_not_hold_it(pool, filled):
    for like, text in [
        (zeros(1, dtype="i4"), "k of dtype int32"),
        (zeros(1, dtype="f8"), "k of dtype float64"),
    ]:
        with refused(DTypeError, text):
            pool.expand(filled[0], 0, like=like)
    with refused(DTypeError, "like of type list"):
        pool.expand(filled[0], 0, like=[1])
