"""Memory in and out through DLPack: fast and slow ways in, zero-copy views out, lifetimes."""

import ctypes
import gc
import threading
import weakref

import kvarn
import numpy as np
import pytest
import torch
from kvarn import Config, Pool
from kvarn._kvarn import Memory

CFG = Config("kvarn_k4v2_g64", head_dim=32, sink_tokens=0)


def filled_pool(dtype="float16"):
    pool = Pool(CFG, layers=2, kv_heads=2, pages=4, slots=4, dtype=dtype)
    sequence = pool.create()
    k = np.random.default_rng(0).standard_normal((100, 2, 32)).astype(dtype)
    with pool.step([sequence], [100]) as step:
        for layer in range(2):
            step.append(layer, k, k)
    return pool, sequence


class Exporter:
    """An array library of another kind: lends `array`, counts exports."""

    def __init__(self, array):
        self.array, self.exports = array, 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.exports += 1
        return self.array.__dlpack__(max_version=max_version)

    def __dlpack_device__(self):
        return (1, 0)


class OldExporter(Exporter):
    """One that knows nothing of DLPack 1.0."""

    def __dlpack__(self, stream=None):
        self.exports += 1
        return self.array.__dlpack__()


def tile():
    return np.random.default_rng(0).standard_normal((1, 64, 32)).astype(np.float16)


@pytest.mark.parametrize("kind", [Exporter, OldExporter])
def test_any_exporter_is_read_and_its_loan_ends(kind):
    array = tile()
    expected = kvarn.encode(array, array, CFG)
    exporter = kind(array)
    alive = weakref.ref(array)
    rec = kvarn.encode(exporter, exporter, CFG)
    assert exporter.exports == 2
    assert isinstance(rec, np.ndarray)
    assert np.array_equal(rec, expected)
    del array, exporter
    gc.collect()
    assert alive() is None


def test_torch_tensors_are_borrowed_by_the_function_table(monkeypatch):
    tensor = torch.from_numpy(tile())
    expected = kvarn.encode(tensor, tensor, CFG)

    def slow(*arguments, **options):
        raise AssertionError("the slow way was taken")

    monkeypatch.setattr(torch.Tensor, "__dlpack__", slow)
    assert torch.equal(kvarn.encode(tensor, tensor, CFG), expected)


@pytest.mark.parametrize("table", [None, "foreign"])
def test_torch_tensors_without_the_function_table_are_exported(monkeypatch, table):
    tensor = torch.from_numpy(tile()).bfloat16()
    expected = kvarn.encode(tensor, tensor, CFG)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    attribute = new(1, b"something else", None) if table else None
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", attribute, raising=False)
    exports = []
    export = torch.Tensor.__dlpack__

    def counted(self, **options):
        exports.append(options)
        return export(self, **options)

    monkeypatch.setattr(torch.Tensor, "__dlpack__", counted)
    assert torch.equal(kvarn.encode(tensor, tensor, CFG), expected)
    assert exports == [{"max_version": (1, 3)}] * 2


def test_tensor_subclasses_and_parameters_without_grad():
    tensor = torch.from_numpy(tile())
    expected = kvarn.encode(tensor, tensor, CFG)
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    assert torch.equal(kvarn.encode(parameter, tensor, CFG), expected)
    with torch.inference_mode():
        assert torch.equal(kvarn.encode(tensor.clone(), tensor, CFG), expected)


def test_pages_and_slots_are_views_of_the_pool():
    pool, sequence = filled_pool()
    pages, slots = np.from_dlpack(pool.pages[1]), torch.from_dlpack(pool.slots[1])
    assert (pages.shape, pages.dtype) == ((4, 2, CFG.record_bytes), np.uint8)
    assert (tuple(slots.shape), slots.dtype) == ((4, 2, 2, 64, 32), torch.float16)
    assert pages.flags.writeable
    assert pages.ctypes.data % 4096 == 0 or pages.ctypes.data % 128 == 0
    assert pool.pages[1].shape == pages.shape
    assert (pool.pages[1].dtype, pool.slots[1].dtype) == ("uint8", "float16")
    page = np.from_dlpack(sequence.block_table)[0]
    slot = np.from_dlpack(sequence.slot_table)[1]
    before = pool.expand(sequence, 1)[0]
    pages[page, 0] = 0  # what is written through a view is what the pool reads
    slots[slot, 1, 0] = 0
    after = pool.expand(sequence, 1)[0]
    assert not after[:64, 0].any()
    assert not after[64:, 1].any()
    assert np.array_equal(after[:64, 1], before[:64, 1])
    assert np.array_equal(after[64:, 0], before[64:, 0])
    assert np.array_equal(np.from_dlpack(filled_pool("float32")[0].slots[0]).dtype, np.float32)


def test_tables_are_read_only_snapshots():
    pool, sequence = filled_pool()
    table = np.from_dlpack(sequence.block_table)
    assert (table.dtype, table.tolist(), table.flags.writeable) == (np.int32, [0, -1], False)
    assert sequence.block_table.read_only
    assert not pool.pages[0].read_only
    k = np.ones((28, 2, 32), np.float16)
    with pool.step([sequence], [28]) as step:
        for layer in range(2):
            step.append(layer, k, k)
    assert table.tolist() == [0, -1]
    assert np.from_dlpack(sequence.block_table).tolist() == [0, 1]


def test_memory_outlives_its_python_objects():
    pool, sequence = filled_pool()
    views = [np.from_dlpack(pool.pages[0]), torch.from_dlpack(pool.slots[0]).numpy()]
    tables = [np.from_dlpack(sequence.block_table), torch.from_dlpack(sequence.slot_table).numpy()]
    copies = [view.copy() for view in views + tables]
    assert copies[0].any()
    pool.free(sequence)
    del pool, sequence
    gc.collect()
    for _ in range(20):  # would reuse freed memory
        filled_pool()
    for view, copy in zip(views + tables, copies, strict=True):
        assert np.array_equal(view, copy)


def test_views_may_end_on_any_thread():
    pool, _ = filled_pool()
    views = [torch.from_dlpack(pool.pages[0]), np.from_dlpack(pool.pages[0])]
    del pool
    thread = threading.Thread(target=views.clear)
    thread.start()
    thread.join()
    assert not views


def test_results_are_views_without_a_copy():
    rec = kvarn.encode(tile(), tile(), CFG)
    assert rec.base is not None
    k, v = kvarn.decode(rec, CFG)
    k[:] = 0  # writable, and their own memory
    assert v.any()


def test_the_protocol_of_lent_memory():
    pool, sequence = filled_pool()
    pages, table = pool.pages[0], sequence.block_table
    assert isinstance(pages, Memory)
    assert pages.__dlpack_device__() == (1, 0)
    assert '"dltensor"' in repr(pages.__dlpack__())
    assert '"dltensor_versioned"' in repr(pages.__dlpack__(max_version=(1, 0), dl_device=(1, 0), copy=False))
    assert '"dltensor"' in repr(pages.__dlpack__(max_version=(0, 8)))
    for options, text in [
        ({"stream": 1}, "stream 1: expected None"),
        ({"dl_device": (2, 0)}, r"device \(2, 0\): expected \(1, 0\)"),
        ({"copy": True}, "copy=True: expected False or None"),
    ]:
        with pytest.raises(BufferError, match=text):
            pages.__dlpack__(max_version=(1, 0), **options)
    with pytest.raises(BufferError, match="read-only memory"):
        table.__dlpack__()
    assert repr(table) == "<kvarn memory of shape [2], int32>"
    with pytest.raises(TypeError):
        Memory()
