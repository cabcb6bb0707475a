"""Files of tensors, sound and hostile: each is read as it was meant, or refused with an error of kvarn."""

import io
import json
import random
import struct
import zipfile

import numpy as np
import pytest
from kvarn.cli import main
from kvarn.cli.npz_file import NpzFile
from kvarn.cli.safetensors_file import SafetensorsFile
from kvarn.errors import FormatError, KvarnError

X = np.arange(4 * 2 * 16, dtype=np.float32).reshape(4, 2, 16)
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def raw(header, data=b"", length=None):
    """A .safetensors file, whatever the header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def member(shape, dtype="<f4", data=b"", version=(1, 0)):
    """A .npy file, whatever its header says."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text + data


def npz(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


class TestSafetensors:
    def test_reads_what_its_own_library_writes(self, tmp_path):
        torch = pytest.importorskip("torch", reason="makes bfloat16")
        from safetensors.torch import save_file

        x = torch.from_numpy(X) / 7
        sent = {"a": x, "b": x.half(), "c": x.bfloat16(), "d": x.long(), "e": x[:0], "f": torch.tensor(1.5)}
        save_file(sent, tmp_path / "a.safetensors", metadata={"from": "here"})
        file = SafetensorsFile(tmp_path / "a.safetensors")
        types = {"a": "float32", "b": "float16", "c": "bfloat16", "d": "I64", "e": "float32", "f": "float32"}
        assert {name: tensor.dtype for name, tensor in file.tensors.items()} == types
        for name in "abcef":
            found = file.read(name)
            assert found.shape == tuple(sent[name].shape)
            assert found.dtype == (np.float16 if name == "b" else np.float32)
            assert np.array_equal(found, sent[name].float().numpy().astype(found.dtype))

    def test_spaces_after_the_header_and_no_tensors(self, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(raw(json.dumps({"x": ENTRY}).encode() + b"   ", X.tobytes()[:16]))
        assert np.array_equal(SafetensorsFile(path).read("x"), [0, 1, 2, 3])
        path.write_bytes(raw(b"{}"))
        assert SafetensorsFile(path).tensors == {}

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b"", "0 bytes: expected 8 or more"),
            (b"1234567", "7 bytes: expected 8 or more"),
            (raw({"x": ENTRY}, bytes(16), length=10_000), "header of 10000 bytes: expected"),
            (raw({"x": ENTRY}, bytes(16), length=2**64 - 1), f"header of {2**64 - 1} bytes: expected"),
            (raw({"x": ENTRY}, bytes(16), length=5), "expected JSON"),
            (raw({"x": ENTRY}, bytes(16), length=0), "expected JSON"),
            (raw(b"\xff\xfe{}"), "expected JSON"),
            (raw(b"[" * 200_000), "expected JSON"),
            (raw(b"[1]"), "a list: expected a JSON object"),
            (raw(b'{"x": 1, "x": 2}'), "x twice: expected each name once"),
            (raw({"x": {**ENTRY, "dtype": 5}}, bytes(16)), "expected dtype, shape and two data_offsets"),
            (raw({"x": {**ENTRY, "shape": [-4]}}, bytes(16)), "expected dtype, shape and two data_offsets"),
            (raw({"x": {**ENTRY, "shape": [True, 4]}}, bytes(16)), "expected dtype, shape and two"),
            (raw({"x": {**ENTRY, "shape": [4.0]}}, bytes(16)), "expected dtype, shape and two"),
            (raw({"x": {**ENTRY, "data_offsets": [0]}}, bytes(16)), "expected dtype, shape and two"),
            (raw({"x": {**ENTRY, "data_offsets": [0, 16, 16]}}, bytes(16)), "expected dtype, shape and two"),
            (raw({"x": {**ENTRY, "data_offsets": [-16, 0]}}, bytes(16)), "expected dtype, shape and two"),
            (raw({"x": 7}), "x: 7: expected dtype, shape and two data_offsets"),
            (raw({"x": ENTRY}, bytes(15)), "[0, 16]: expected to end within 15 bytes of data"),
            (raw({"x": {**ENTRY, "data_offsets": [16, 0]}}, bytes(16)), "[16, 0]: expected to end within"),
            (raw({"x": {**ENTRY, "data_offsets": [0, 2**70]}}, bytes(16)), "expected to end within 16 bytes"),
            (raw({"x": {**ENTRY, "shape": [3]}}, bytes(16)), "x of 16 bytes: expected 12 for F32 [3]"),
            (raw({"x": {**ENTRY, "shape": [2**80, 2**80]}}, bytes(16)), "x of 16 bytes: expected"),
            (raw({"x": ENTRY}, bytes(20)), "20 bytes of data: expected 16"),
            (
                raw({"x": ENTRY, "y": {**ENTRY, "data_offsets": [8, 24]}}, bytes(24)),
                "y with data_offsets [8, 24] overlaps what is before it: expected to begin at 16",
            ),
            (raw({"x": ENTRY, "y": ENTRY}, bytes(16)), "y with data_offsets [0, 16] overlaps"),
            (
                raw({"x": ENTRY, "y": {**ENTRY, "data_offsets": [20, 36]}}, bytes(36)),
                "y with data_offsets [20, 36] leaves a gap before it: expected to begin at 16",
            ),
        ],
    )
    def test_hostile_files_are_refused(self, tmp_path, capsys, content, text):
        path = tmp_path / "a.safetensors"
        path.write_bytes(content)
        with pytest.raises(FormatError) as caught:
            SafetensorsFile(path)
        assert text in str(caught.value)
        assert main(["inspect", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {path}: ")

    def test_every_truncation_is_refused(self, tmp_path):
        whole = raw({"x": ENTRY, "y": {**ENTRY, "data_offsets": [16, 32]}}, bytes(32))
        path = tmp_path / "a.safetensors"
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(FormatError):
                SafetensorsFile(path)

    def test_a_file_that_shrinks_after_opening(self, tmp_path):
        path = tmp_path / "a.safetensors"
        whole = raw({"x": ENTRY}, bytes(16))
        path.write_bytes(whole)
        file = SafetensorsFile(path)
        path.write_bytes(whole[:-8])
        with pytest.raises(FormatError, match="x ends after 2 of 4 elements"):
            file.read("x")
        path.unlink()
        with pytest.raises(FormatError, match="No such file"):
            file.read("x")


class TestNpz:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_reads_what_numpy_writes(self, tmp_path, save):
        save(tmp_path / "a.npz", a=X, b=X.astype(np.float16), c=np.asfortranarray(X), d=X[:0])
        file = NpzFile(tmp_path / "a.npz")
        assert [(name, each.dtype) for name, each in file.tensors.items()] == [
            ("a", "float32"),
            ("b", "float16"),
            ("c", "float32"),
            ("d", "float32"),
        ]
        for name, x in (("a", X), ("b", X.astype(np.float16)), ("c", X), ("d", X[:0])):
            found = file.read(name)
            assert np.array_equal(found, x)
            assert found.dtype == x.dtype
            assert found.flags.c_contiguous

    def test_pickled_objects_are_not_loaded(self, tmp_path, capsys):
        class Trap:
            def __reduce__(self):
                return (pytest.fail, ("a pickle was loaded",))

        trap = np.array([Trap()], dtype=object)
        np.savez(tmp_path / "a.npz", k=trap, v=trap)
        assert NpzFile(tmp_path / "a.npz").tensors["k"].dtype == "object"
        assert main(["inspect", str(tmp_path / "a.npz")]) == 2
        assert capsys.readouterr().err.startswith("error: k of shape [1]: expected [tokens")

    @pytest.mark.parametrize(
        ("data", "text"),
        [
            (member((4,), data=bytes(12)), "x of 12 bytes: expected 16 for float32 [4]"),
            (member((4,), data=bytes(20)), "x of 20 bytes: expected 16 for float32 [4]"),
            (member((2**40,), data=bytes(16)), "x of 16 bytes: expected"),
            (member((-2, -2), data=bytes(16)), "x of shape [-2, -2]: expected no negative numbers"),
            (member("lots", data=bytes(16)), "expected the arrays of numpy.savez"),
            (member((4,), dtype="<q9", data=bytes(16)), "expected the arrays of numpy.savez"),
            (member((4,), data=bytes(16), version=(9, 0)), "version 9.0"),
            (member((4,))[:12], "expected the arrays of numpy.savez"),
            (b"", "expected the arrays of numpy.savez"),
            (b"not an array at all", "expected the arrays of numpy.savez"),
        ],
    )
    def test_hostile_members_are_refused(self, tmp_path, data, text):
        with pytest.raises(FormatError) as caught:
            NpzFile(npz(tmp_path / "a.npz", [("x.npy", data)]))
        assert text in str(caught.value)

    def test_names_that_repeat(self, tmp_path):
        data = member((4,), data=bytes(16))
        with pytest.warns(UserWarning, match="Duplicate"):
            path = npz(tmp_path / "a.npz", [("x.npy", data), ("x.npy", data)])
        with pytest.raises(FormatError, match="x twice"):
            NpzFile(path)

    def test_other_members_are_no_arrays(self, tmp_path):
        path = npz(tmp_path / "a.npz", [("read me.txt", b"hello"), ("x.npy", member((4,), data=bytes(16)))])
        assert list(NpzFile(path).tensors) == ["x"]

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive"])
    def test_no_archive(self, tmp_path, content, capsys):
        path = tmp_path / "a.npz"
        path.write_bytes(content)
        assert main(["inspect", str(path)]) == 2
        assert "expected the arrays of numpy.savez" in capsys.readouterr().err

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_any_damage_is_an_error_of_kvarn_or_does_no_harm(self, tmp_path, save):
        """Bytes are changed at random; a file that still opens holds arrays of the sizes it says."""
        memory = io.BytesIO()
        save(memory, k=X, v=-X)
        whole = memory.getvalue()
        draw = random.Random(7)
        path = tmp_path / "a.npz"
        refused = 0
        for trial in range(600):
            damaged = bytearray(whole)
            if trial % 3 == 0:
                del damaged[draw.randrange(len(whole)) :]
            else:
                for _ in range(draw.randint(1, 4)):
                    damaged[draw.randrange(len(whole))] = draw.randrange(256)
            path.write_bytes(damaged)
            try:
                file = NpzFile(path)
                for name, tensor in file.tensors.items():
                    if tensor.dtype in ("float16", "float32"):
                        assert file.read(name).shape == tensor.shape
            except KvarnError:
                refused += 1
        assert refused > 300
