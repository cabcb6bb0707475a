"""`kvarn convert`: records to published ones and back, byte by byte, or an error and no file."""

import json
from pathlib import Path

import kvarn
import numpy as np
import pytest
from kvarn import Config
from kvarn.cli import main

GOLDEN = Path(__file__).parents[1] / "golden"
CFG = Config("kvarn_k4v2_g64", head_dim=32, iterations=7, sink_tokens=16, recent_tokens=5)


def tiles(cfg, count=5, seed=0):
    rng = np.random.default_rng(seed)
    shape = (2, count, cfg.group, cfg.head_dim)
    k, v = rng.standard_normal(shape, dtype=np.float32)
    return kvarn.encode(k, v, cfg)


def convert(capsys, *arguments):
    """What the command reports."""
    assert main(["convert", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments):
    """The error; no file is left behind."""
    folder = Path(arguments[1]).parent
    before = sorted(folder.iterdir())
    assert main(["convert", *map(str, arguments)]) == 2
    assert sorted(folder.iterdir()) == before
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("name", ["k2v8_g64", "k4v2_g64", "k8v4_g128", "k2v2_g128"])
@pytest.mark.parametrize("refit", [True, False])
def test_there_and_back_is_the_same_file(tmp_path, capsys, name, refit):
    cfg = CFG.replace(name=f"kvarn_{name}", refit=refit)
    records = tiles(cfg)
    native, published, again = (tmp_path / name for name in ("a.kvarn", "a.npz", "b.kvarn"))
    kvarn.save_records(native, records, cfg)
    report = convert(capsys, native, published)
    assert (report["order"], report["tiles"], report["refit"]) == ("published", 5, refit)
    with np.load(published) as arrays:
        np.testing.assert_array_equal(arrays["record"], kvarn.to_published(records, cfg))
        assert {name: int(arrays[name]) for name in arrays if name != "record"} == {
            "head_dim": 32,
            "group": cfg.group,
            "key_bits": cfg.key_bits,
            "value_bits": cfg.value_bits,
            "refit": int(refit),
            "iterations": 7,
            "sink_tokens": 16,
            "recent_tokens": 5,
        }
    assert convert(capsys, published, again)["guarded"] == 0
    assert again.read_bytes() == native.read_bytes()
    assert kvarn.load_records(again)[1] == cfg


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("official_*.npz")), ids=lambda path: path.stem)
def test_records_of_the_published_code_decode_to_its_values(tmp_path, capsys, path):
    with np.load(path) as arrays:
        preset, head_dim = str(arrays["preset"]), int(arrays["head_dim"])
        expected = arrays["k_dequant_rotated"], arrays["v_dequant_rotated"]
    out = tmp_path / "a.kvarn"
    error = refusal(capsys, path, out)
    assert "without key_bits, value_bits, refit" in error
    assert "pass --config NAME --head-dim D" in error
    report = convert(capsys, path, out, "--config", preset, "--head-dim", head_dim)
    assert report["guarded"] > 0
    records, cfg = kvarn.load_records(out)
    assert (cfg.name, cfg.refit) == (preset, False)
    for got, want in zip(kvarn.decode(records, cfg, rotated=True), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())
    # Guarded once, they come and go unchanged.
    back, again = tmp_path / "b.npz", tmp_path / "c.kvarn"
    convert(capsys, out, back)
    assert convert(capsys, back, again)["guarded"] == 0
    assert again.read_bytes() == out.read_bytes()


def test_the_line_says_what_was_written(tmp_path, capsys):
    kvarn.save_records(tmp_path / "a", tiles(CFG), CFG)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "a.npz")]) == 0
    assert capsys.readouterr().out.endswith(
        f"a.npz: 5 published records of kvarn_k4v2_g64, head dim 32, {CFG.published_bytes:,} bytes each\n"
    )


def test_what_published_order_does_not_have_is_refused(tmp_path, capsys):
    cfg = CFG.replace(name="kvarn_k3v2_g64")
    kvarn.save_records(tmp_path / "a", tiles(cfg), cfg)
    assert "published order with 3-bit keys" in refusal(capsys, tmp_path / "a", tmp_path / "a.npz")
    # A byte of the padding: published records have none.
    records = tiles(CFG)
    assert CFG.published_bytes < CFG.record_bytes
    records[3, -1] = 1
    kvarn.save_records(tmp_path / "b", records, CFG)
    assert "tile 3 of " in refusal(capsys, tmp_path / "b", tmp_path / "b.npz")


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**-20])
def test_scales_that_no_guard_moves_exactly_are_refused(tmp_path, capsys, value):
    published = kvarn.to_published(tiles(CFG), CFG)
    # Scales of K's channels: the first is odd, all others large, so that the guard makes it subnormal.
    scales = published[2, 32 * 64 // 2 :][: 2 * 32].view("<f2")
    scales[:] = 60000
    scales[0] = value * 1.5
    fields = {name: getattr(CFG, name) for name in ("head_dim", "group", "key_bits", "value_bits", "refit")}
    rest = {name: getattr(CFG, name) for name in ("iterations", "sink_tokens", "recent_tokens")}
    np.savez(tmp_path / "a.npz", record=published, **fields, **rest)
    error = refusal(capsys, tmp_path / "a.npz", tmp_path / "a.kvarn")
    assert "tile 2 of " in error
    assert "keep the published records" in error


def test_options_and_names_that_do_not_fit_are_refused(tmp_path, capsys):
    native, published = tmp_path / "a.kvarn", tmp_path / "a.npz"
    kvarn.save_records(native, tiles(CFG), CFG)
    convert(capsys, native, published)
    out, folder = tmp_path / "out", tmp_path / "folder"
    folder.mkdir()
    named = ("--config", "kvarn_k4v2_g64", "--head-dim", "32")
    assert "expected a name that ends in .npz" in refusal(capsys, native, out)
    assert "expected a name that does not end in .npz" in refusal(capsys, published, tmp_path / "b.npz")
    assert "expected it for published ones" in refusal(capsys, native, tmp_path / "b.npz", *named)
    assert "expected both or neither" in refusal(capsys, published, out, *named[:2])
    assert "refit False: expected 1, as " in refusal(capsys, published, out, *named)
    assert "expected a readable file" in refusal(capsys, tmp_path / "missing", out)
    assert "expected a file to write" in refusal(capsys, published, folder)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({}, "no array"),
        ({"record": np.zeros((2, 9), np.uint8)}, "with record of type uint8 and shape [2, 9]"),
        ({"record": np.zeros(9, np.uint8)}, "shape [9]"),
        ({"record": np.zeros((2, 1984), np.int8)}, "type int8"),
        ({"head_dim": np.float64(32)}, "with head_dim of type float64"),
        ({"head_dim": np.zeros(2, np.int64)}, "shape [2]"),
    ],
)
def test_files_of_other_arrays_are_refused(tmp_path, capsys, arrays, text):
    np.savez(tmp_path / "a.npz", **arrays)
    error = refusal(
        capsys, tmp_path / "a.npz", tmp_path / "a", "--config", "kvarn_k4v2_g64", "--head-dim", "32"
    )
    assert text in error


def test_damaged_files_are_refused(tmp_path, capsys):
    native, published = tmp_path / "a.kvarn", tmp_path / "a.npz"
    kvarn.save_records(native, tiles(CFG), CFG)
    convert(capsys, native, published)
    for path in (native, published):
        data = bytearray(path.read_bytes())
        for bad in (data[:-1], data[: len(data) // 2], data[:4]):
            path.write_bytes(bad)
            out = tmp_path / ("out.npz" if path is native else "out")
            error = refusal(capsys, path, out)
            assert error.startswith("error: ")
        path.write_bytes(data)
