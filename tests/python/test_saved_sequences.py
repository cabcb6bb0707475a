"""Sequences that are saved, loaded, offloaded and restored: the same bits as ones that stayed."""

import contextlib
import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from kvarn import CapacityError, Config, DTypeError, FormatError, LayerShape, Pool, StateError

LAYERS = [LayerShape(2, 32), LayerShape(1, 48)]
CFG = Config("kvarn_k4v2_g64", head_dim=32, sink_tokens=16, recent_tokens=10)


def make_pool(cfg=CFG, dtype="float32", pages=32, slots=32):
    return Pool(cfg, layers=LAYERS, pages=pages, slots=slots, dtype=dtype)


def forward(pool, sequences, counts, hold=0, seed=0):
    """One finished step of random tokens; what attention gave in each layer."""
    rng = np.random.default_rng(seed)
    outputs = []
    with pool.step(sequences, counts, hold) as step:
        for layer, (heads, channels) in enumerate(LAYERS):
            rows = [rng.standard_normal((sum(counts), n, channels)) for n in (heads, heads, 2 * heads)]
            k, v, q = (array.astype(pool.dtype) for array in rows)
            step.append(layer, k, v)
            outputs.append(step.attend(layer, q))
    return outputs


def saved(pool, sequence):
    file = io.BytesIO()
    pool.save(sequence, file)
    return file.getvalue()


def loaded(pool, data):
    return pool.load(io.BytesIO(data))


def expanded(pool, sequence):
    return [x.tobytes() for layer in range(len(LAYERS)) for x in pool.expand(sequence, layer)]


@contextlib.contextmanager
def unchanged(pool):
    before = pool.stats()
    yield
    assert pool.stats() == before


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sinks", [0, 16, 64])
@pytest.mark.parametrize(("length", "hold"), [(0, 0), (7, 7), (64, 0), (300, 12), (330, 0)])
def test_a_loaded_sequence_goes_on_as_the_saved_one(tmp_path, dtype, sinks, length, hold):
    cfg = CFG.replace(sink_tokens=sinks)
    one, other = make_pool(cfg, dtype), make_pool(cfg, dtype)
    a = one.create()
    if length:
        forward(one, [a], [length], hold)
    noise = other.create()
    forward(other, [noise], [200], seed=9)
    path = tmp_path / "sequence.kvarn"
    one.save(a, path)
    assert path.read_bytes() == saved(one, a)
    b = other.load(path)
    assert (b.length, b.committed, b.offloaded) == (length, length - hold, False)
    assert saved(other, b) == saved(one, a)
    assert expanded(other, b) == expanded(one, a)
    for x, y in zip(forward(one, [a], [90], 3, seed=1), forward(other, [b], [90], 3, seed=1), strict=True):
        np.testing.assert_array_equal(x, y)
    assert saved(other, b) == saved(one, a)


def test_the_header_is_as_documented():
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    table = text[text.index("<!-- sequence-header: begin") : text.index("<!-- sequence-header: end")]
    sizes = {
        name.split(",")[0].strip(): (int(at), int(size))
        for at, size, name in (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines()
            if line.startswith("| ") and line[2].isdigit() and "·" not in line
        )
    }
    assert sum(size for _, size in sizes.values()) == 112
    pool = make_pool(dtype="float16")
    a = pool.create()
    forward(pool, [a], [300], 12)
    data = saved(pool, a)

    def number(name):
        at, size = sizes[name]
        return int.from_bytes(data[at : at + size], "little")

    header = number("header bytes")
    assert header == 112 + 8 * len(LAYERS)
    assert data[:8] == b"KVARNSEQ"
    assert [number(name) for name in ("format version", "D of layer 0", "G", "layers")] == [1, 32, 64, 2]
    assert [number(name) for name in ("bits of a K code", "bits of a V code", "refit")] == [4, 2, 1]
    assert [number(name) for name in ("sink tokens", "recent tokens")] == [16, 10]
    assert [number(name) for name in ("tokens", "committed tokens", "sealed tiles")] == [300, 288, 4]
    assert [number(name) for name in ("tiles with records", "tiles with a slot")] == [4, 2]
    shapes = [struct.unpack_from("<HHI", data, 112 + 8 * layer) for layer in range(2)]
    assert shapes == [(*shape, CFG.replace(head_dim=shape.head_dim).record_bytes) for shape in LAYERS]
    at = header + number("bytes of the records")
    assert number("CRC-32 of the records") == zlib.crc32(data[header:at])
    assert number("CRC-32 of the slots") == zlib.crc32(data[at:])
    assert number("fingerprint") == zlib.crc32(data[16:44] + data[112:header])
    assert number("CRC-32 of bytes 0 to 107") == zlib.crc32(data[:108])
    # The first record of the first layer, and K of the first slot.
    page = a.block_table
    pages, slots = (np.from_dlpack(memory[0]) for memory in (pool.pages, pool.slots))
    assert data[header:][: CFG.record_bytes] == pages[np.from_dlpack(page)[0], 0].tobytes()
    assert data[at:][: 64 * 32 * 2] == slots[np.from_dlpack(a.slot_table)[0], 0, 0].tobytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "kvarn_k2v2_g64"}, "key_bits 4 of the saved sequence: expected 2, as the pool has"),
        ({"refit": False}, "refit 1 of the saved sequence: expected 0"),
        ({"sink_tokens": 0}, "sink_tokens 16 of the saved sequence: expected 0"),
        ({"recent_tokens": 11}, "recent_tokens 10 of the saved sequence: expected 11"),
    ],
)
def test_another_configuration_is_refused(tmp_path, change, text):
    one = make_pool()
    a = one.create()
    forward(one, [a], [300])
    one.save(a, tmp_path / "a")
    other = make_pool(CFG.replace(**change))
    with unchanged(other), pytest.raises(FormatError, match=text) as caught:
        other.load(tmp_path / "a")
    assert str(caught.value).startswith(str(tmp_path / "a") + ": ")
    with pytest.raises(FormatError, match="dtype float32 of the saved sequence: expected float16"):
        make_pool(dtype="float16").load(tmp_path / "a")


def test_damaged_files_are_refused():
    pool = make_pool()
    a = pool.create()
    forward(pool, [a], [300])
    data = saved(pool, a)
    rng = np.random.default_rng(3)
    with unchanged(pool):
        for _ in range(200):
            bad = bytearray(data)
            bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
            with pytest.raises(FormatError):
                loaded(pool, bytes(bad))
            with pytest.raises(FormatError):
                loaded(pool, data[: rng.integers(len(data))])
        with pytest.raises(FormatError, match="trailing bytes"):
            loaded(pool, data + b"\0")
        with pytest.raises(FormatError, match="no saved sequence"):
            loaded(pool, b"KVARNREC" + bytes(200))


def test_what_does_not_fit_is_refused(tmp_path):
    one = make_pool()
    a = one.create()
    forward(one, [a], [300])
    small = make_pool(pages=3, slots=3)
    with unchanged(small), pytest.raises(CapacityError, match="300 tokens of a saved or offloaded sequence"):
        loaded(small, saved(one, a))


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    pool = make_pool()
    a = pool.create()
    forward(pool, [a], [70])
    path = tmp_path / "a.kvarn"
    path.write_bytes(b"before")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        pool.save(a, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    pool.save(a, str(path))
    assert pool.load(str(path)).length == 70
    with pytest.raises(FileNotFoundError):
        pool.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        pool.save(a, tmp_path / "missing" / "a")


def test_unbuffered_files_get_all_of_it(tmp_path):
    class Slow(io.BytesIO):
        def write(self, data):
            return super().write(data[:1000])

    pool = make_pool()
    a = pool.create()
    forward(pool, [a], [70])
    slow = Slow()
    pool.save(a, slow)
    assert slow.getvalue() == saved(pool, a)
    with open(tmp_path / "a", "wb", buffering=0) as file:
        pool.save(a, file)
    with open(tmp_path / "a", "rb", buffering=0) as file:
        assert saved(pool, pool.load(file)) == saved(pool, a)


@pytest.mark.parametrize("file", [3, None, object(), io.StringIO()])
def test_what_is_no_file_is_refused(file):
    pool = make_pool()
    a = pool.create()
    with unchanged(pool):
        with pytest.raises((DTypeError, TypeError)):
            pool.save(a, file)
        with pytest.raises(DTypeError, match=r"expected a path or a binary file|expected bytes"):
            pool.load(file)


def test_an_offloaded_sequence_is_restored_first():
    pool = make_pool()
    a, b = pool.create(), pool.create()
    forward(pool, [a, b], [300, 20])
    before, values = saved(pool, a), expanded(pool, a)
    pool.offload(a)
    stats = pool.stats()
    assert (stats.offloaded_sequences, stats.offloaded_bytes) == (1, len(before) - 128)
    assert (stats.pages_used, stats.sequences, stats.tokens) == (0, 2, 320)
    assert (a.length, a.offloaded, b.offloaded) == (300, True, False)
    assert (np.from_dlpack(a.block_table) == -1).all()
    with unchanged(pool):
        for call in (
            lambda: pool.step([a, b], [1, 1]),
            lambda: pool.fork(a),
            lambda: pool.truncate(a, 299),
            lambda: pool.expand(a, 0),
            lambda: pool.reorder([a, b], [1, 0]),
            lambda: pool.offload(a),
        ):
            with pytest.raises(StateError, match=r"sequence 0, which is offloaded: .*; restore it first"):
                call()
        with pytest.raises(StateError, match="sequence 1, which is in the pool"):
            pool.restore(b)
    assert saved(pool, a) == before
    pool.restore(a)
    assert expanded(pool, a) == values
    pool.offload(a)
    pool.free(a)
    with pytest.raises(StateError, match="which was freed"):
        pool.restore(a)
    assert (pool.stats().offloaded_sequences, pool.stats().offloaded_bytes) == (0, 0)


def test_a_sequence_in_a_step_is_neither_saved_nor_offloaded():
    pool = make_pool()
    a, foreign = pool.create(), make_pool().create()
    step = pool.step([a], [1])
    for call in (saved, Pool.offload):
        with pytest.raises(StateError, match="which is in open step"):
            call(pool, a)
        with pytest.raises(StateError, match="of another pool"):
            call(pool, foreign)
    step.abandon()


def test_random_travels_change_nothing():
    """Two pools take the same steps; in one, sequences leave and come back, and pages are scarce."""
    rng = np.random.default_rng(7)
    travels, stays = make_pool(pages=16, slots=16), make_pool(pages=64, slots=64)
    pairs = [(travels.create(), stays.create()) for _ in range(3)]
    refused = 0
    for number in range(150):
        index = int(rng.integers(len(pairs)))
        a, b = pairs[index]
        match rng.integers(7):
            case 0 if a.offloaded:
                with contextlib.suppress(CapacityError):
                    travels.restore(a)
            case 0:
                travels.offload(a)
            case 1:
                with contextlib.suppress(CapacityError):
                    again = loaded(travels, saved(travels, a))
                    travels.free(a)
                    pairs[index] = (again, b)
            case 2 if not a.offloaded and len(pairs) < 6:
                pairs.append((travels.fork(a), stays.fork(b)))
            case 3 if len(pairs) > 2:
                pairs.pop(index)
                travels.free(a)
                stays.free(b)
            case _ if not a.offloaded:
                count = int(rng.integers(1, 80))
                hold = int(rng.integers(0, min(count, 9)))
                try:
                    outputs = forward(travels, [a], [count], hold, seed=number)
                except CapacityError:
                    refused += 1
                    continue
                for x, y in zip(outputs, forward(stays, [b], [count], hold, seed=number), strict=True):
                    np.testing.assert_array_equal(x, y)
        for a, b in pairs:
            assert (a.length, a.committed) == (b.length, b.committed)
            assert saved(travels, a) == saved(stays, b)
    assert refused > 0
    for a, _ in pairs:
        travels.free(a)
    stats = travels.stats()
    assert (stats.pages_used, stats.slots_used, stats.offloaded_bytes, stats.sequences) == (0, 0, 0, 0)


def test_a_save_is_of_one_moment_while_another_thread_goes_on():
    pool = make_pool(pages=64)
    a = pool.create()
    forward(pool, [a], [200])
    alone = make_pool(pages=64)
    b = alone.create()
    forward(alone, [b], [200])
    moments = {200: saved(alone, b)}
    done = threading.Event()
    seen = []

    def save():
        while not done.is_set():
            with contextlib.suppress(StateError):  # in an open step at the moment
                seen.append(saved(pool, a))

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for number in range(60):
            forward(pool, [a], [17], seed=number)
            forward(alone, [b], [17], seed=number)
            moments[b.length] = saved(alone, b)
    finally:
        done.set()
        thread.join()
    assert seen
    known = set(moments.values())
    assert all(data in known for data in seen)
