"""Bad input to codec and files: an error that names it, and nothing has changed."""

import kvarn
import numpy as np
import pytest
import torch
from kvarn import (
    CapacityError,
    Config,
    DeviceError,
    DTypeError,
    FormatError,
    KvarnError,
    NonFiniteError,
    ShapeError,
    TensorError,
)
from lenders import Lender, capsule

CFG = Config("kvarn_k4v2_g64", head_dim=32)


def zeros(*shape, dtype=np.float16):
    return np.zeros(shape, dtype)


def refused(error, text):
    return pytest.raises(error, match=text)


# Encode.

GOOD = zeros(2, 64, 32)


@pytest.mark.parametrize(
    ("k", "v", "error", "text"),
    [
        (
            zeros(64, 32),
            GOOD,
            ShapeError,
            r"k of shape \[64, 32\]: expected three dimensions, \[tiles, group, head_dim\]",
        ),
        (zeros(2, 128, 32), GOOD, ShapeError, r"k of shape \[2, 128, 32\]: expected \[2, 64, 32\]"),
        (zeros(2, 64, 48), GOOD, ShapeError, r"k of shape \[2, 64, 48\]: expected \[2, 64, 32\]"),
        (GOOD, zeros(3, 64, 32), ShapeError, r"v of shape \[3, 64, 32\]: expected \[2, 64, 32\]"),
        (
            GOOD,
            zeros(2, 32, 64).transpose(0, 2, 1),
            ShapeError,
            r"v with strides \[2048, 1, 64\]: expected 1 .* v.contiguous",
        ),
        (zeros(2, 64, 64)[..., ::2], GOOD, ShapeError, r"k with strides \[4096, 64, 2\]: expected 1"),
        (
            torch.zeros(2, 64, 32).half()[..., :1].expand(2, 64, 32),
            GOOD,
            ShapeError,
            r"k with strides \[2048, 32, 0\]",
        ),
        (
            zeros(2, 64, 32, dtype=np.float64),
            GOOD,
            DTypeError,
            "k of dtype float64: expected float16, bfloat16 or float32",
        ),
        (zeros(2, 64, 32, dtype=np.int64), GOOD, DTypeError, "k of dtype int64: expected"),
        (zeros(2, 64, 32, dtype=np.uint8), GOOD, DTypeError, "k of dtype uint8: expected"),
        (zeros(2, 64, 32, dtype=np.complex64), GOOD, DTypeError, "k of dtype complex64: expected"),
        (torch.zeros(2, 64, 32).to(torch.float8_e4m3fn), GOOD, DTypeError, "k of dtype float8: expected"),
        (
            GOOD,
            zeros(2, 64, 32, dtype=np.float32),
            DTypeError,
            "v of dtype float32: expected float16; cast v",
        ),
        ([[1.0]], GOOD, DTypeError, "k of type list: expected a NumPy array or a torch tensor"),
        (None, GOOD, DTypeError, "k of type NoneType: expected"),
        (GOOD.astype(object), GOOD, TensorError, "k cannot be lent through DLPack"),
        (GOOD.astype(">f2"), GOOD, TensorError, "k cannot be lent through DLPack"),
        (
            torch.zeros(2, 64, 32, requires_grad=True),
            GOOD,
            TensorError,
            r"k requires grad: .* pass k.detach\(\)",
        ),
        (torch.zeros(2, 64, 32, device="meta"), GOOD, DeviceError, "k: device meta: expected cpu"),
        (torch.zeros(2, 64, 32).to_sparse(), GOOD, TensorError, "k cannot be lent through DLPack"),
        (
            np.frombuffer(bytes(8193), np.uint8)[1:].view(np.float16).reshape(2, 64, 32),
            GOOD,
            TensorError,
            "k: data at 0x|k cannot be lent",
        ),
    ],
)
def test_encode_refuses(k, v, error, text):
    with refused(error, text) as caught:
        kvarn.encode(k, v, CFG)
    assert isinstance(caught.value, KvarnError)


def test_more_tiles_than_memory_are_refused():
    endless = np.broadcast_to(zeros(1, 64, 32), (2**40, 64, 32))
    with refused(CapacityError, "a result of shape .*: the system has not as much memory"):
        kvarn.encode(endless, endless, CFG)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("convert", [np.asarray, lambda x: torch.from_numpy(x).bfloat16()])
def test_encode_with_check_names_tensor_tile_token_and_channel(bad, name, convert):
    tensors = {"k": GOOD.copy(), "v": GOOD.copy()}
    tensors[name][1, 40, 9] = bad
    tensors[name][1, 41, 0] = bad
    arguments = [convert(tensor) for tensor in tensors.values()]
    with refused(NonFiniteError, rf"{name}\[1, 40, 9\] \(tile 1, token 40, channel 9\) is NaN or infinite"):
        kvarn.encode(*arguments, CFG, check=True)
    assert kvarn.encode(*arguments, CFG, return_counts=True)[1].non_finite == 2


@pytest.mark.parametrize("version", [(1, 0), None])
def test_consumed_capsules_are_refused(version):
    lender = Lender(GOOD.__dlpack__(max_version=version))
    with refused(TensorError, 'v: capsule "used_dltensor(_versioned)?": expected .* it was consumed before'):
        kvarn.encode(lender, lender, CFG)


@pytest.mark.parametrize(
    ("lender", "error", "text"),
    [
        (Lender(capsule(b"tensor")), TensorError, 'k: capsule "tensor": expected a DLPack capsule'),
        (Lender(capsule(None)), TensorError, 'k: capsule "": expected a DLPack capsule'),
        (Lender(7), TensorError, "k: __dlpack__ gave an object of type int: expected a DLPack capsule"),
        (capsule(b"dltensor"), DTypeError, "k of type PyCapsule: expected a NumPy array"),
        (Lender(None, device=(2, 1)), DeviceError, "k: device cuda:1: expected cpu"),
        (Lender(None, device="cpu"), TensorError, "k cannot be lent through DLPack"),
    ],
)
def test_foreign_lenders_are_refused(lender, error, text):
    with refused(error, text):
        kvarn.encode(lender, GOOD, CFG)


# Decode and published order.

RECORDS = kvarn.encode(GOOD, GOOD, CFG)


@pytest.mark.parametrize("call", [kvarn.decode, kvarn.to_published, kvarn.from_published])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            lambda r: r[0],
            ShapeError,
            r"of shape \[\d+\]: expected \[tiles, \d+\], records of kvarn_k4v2_g64, head_dim 32",
        ),
        (lambda r: r[:, :-1].copy(), ShapeError, r"of shape \[2, \d+\]: expected \[tiles, \d+\]"),
        (lambda r: r.repeat(2, axis=0)[::2], ShapeError, "with strides .*: expected contiguous memory; pass"),
        (lambda r: r.astype(np.int8), DTypeError, "of dtype int8: expected uint8"),
        (lambda r: r.astype(np.float16), DTypeError, "of dtype float16: expected uint8"),
        (lambda r: r.tolist(), DTypeError, "of type list: expected a NumPy array"),
        (lambda r: torch.from_numpy(r).to("meta"), DeviceError, "device meta: expected cpu"),
    ],
)
def test_records_are_refused(call, change, error, text):
    records = kvarn.to_published(RECORDS, CFG) if call is kvarn.from_published else RECORDS
    with refused(error, text):
        call(change(records), CFG)


def test_records_of_another_configuration_are_refused():
    other = CFG.replace(key_bits=8, value_bits=8)
    sizes = rf"\[2, {CFG.record_bytes}\]: expected \[tiles, {other.record_bytes}\]"
    with refused(ShapeError, rf"records of shape {sizes}, records of kvarn_k8v8_g64"):
        kvarn.decode(RECORDS, other)


def test_published_order_has_no_3_bit_codes():
    cfg = CFG.replace(key_bits=3)
    rec = kvarn.encode(GOOD, GOOD, cfg)
    for call in (kvarn.to_published, kvarn.from_published):
        with refused(FormatError, "3-bit keys and 2-bit values: it is defined for 2, 4 and 8 bits only"):
            call(rec, cfg)


# Saved records.


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiles.kvarn"
    kvarn.save_records(path, RECORDS, CFG)
    return path


@pytest.mark.parametrize("length", [0, 7, 71, 72, 73, 500, 72 + RECORDS.size - 1])
def test_truncated_files_are_refused(saved, length):
    data = saved.read_bytes()
    saved.write_bytes(data[:length])
    with refused(FormatError, rf"{saved}: .*truncated"):
        kvarn.load_records(saved)


@pytest.mark.parametrize("at", [0, 8, 12, 16, 20, 22, 23, 24, 36, 40, 47, 48, 56, 60, 68, 71, 72, 1000, -1])
def test_corrupted_files_are_refused(saved, at):
    data = bytearray(saved.read_bytes())
    data[at] ^= 0x10
    saved.write_bytes(data)
    with refused(FormatError, str(saved)):
        kvarn.load_records(saved)


def test_other_versions_other_files_and_longer_files_are_refused(saved):
    data = saved.read_bytes()
    for change, text in [
        (data[:8] + (9).to_bytes(4, "little") + data[12:], "format version 9: expected 1"),
        (b"PK\x03\x04" + data[4:], "this is no file of kvarn records"),
        (data + b"\0", "trailing"),
    ]:
        saved.write_bytes(change)
        with refused(FormatError, text):
            kvarn.load_records(saved)


def test_files_that_cannot_be_opened_are_os_errors(tmp_path):
    for path, error in [
        (tmp_path / "none", FileNotFoundError),
        (tmp_path / "file" / "x", NotADirectoryError),
    ]:
        (tmp_path / "file").touch()
        with pytest.raises(error) as caught:
            kvarn.load_records(path)
        assert str(caught.value.filename) == str(path)
    with pytest.raises(FileNotFoundError):
        kvarn.save_records(tmp_path / "no" / "folder", RECORDS, CFG)
    with refused(FormatError, "directory"):
        kvarn.load_records(tmp_path)


def test_a_refused_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    for bad in (RECORDS[:, 1:], RECORDS[0], RECORDS.astype(np.int8)):
        with pytest.raises(KvarnError):
            kvarn.save_records(saved, bad, CFG)

    def full(descriptor):
        raise OSError(28, "no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        kvarn.save_records(saved, RECORDS[:1].copy(), CFG)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
