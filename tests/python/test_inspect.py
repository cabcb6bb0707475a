"""`kvarn inspect`: its figures against independent ones in float64, its text and its errors."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import kvarn
import numpy as np
import pytest
from kvarn.cli import main
from kvarn.reference.rotation import matrix

TOKENS, HEADS, HEAD_DIM = 300, 2, 32
PAIRS = {"k4v4": (4, 4), "k4v2": (4, 2), "k3v3": (3, 3), "k2v2": (2, 2)}


def tensors(seed, dtype=np.float32, tokens=TOKENS, heads=HEADS, head_dim=HEAD_DIM):
    """K and V with uneven channels and tokens."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, tokens, heads, head_dim))
    x *= np.exp(rng.standard_normal((2, 1, heads, head_dim)))
    x *= np.exp(0.3 * rng.standard_normal((2, tokens, heads, 1)))
    return x.astype(dtype)


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def inspected(tmp_path, *arguments):
    """What the command writes as JSON."""
    out = tmp_path / "out.json"
    assert main(["inspect", *arguments, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def failure(capsys, *arguments):
    """The one line of an error; nothing is printed as a result."""
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def expected_statistics(x, group):
    """Median and largest of each statistic over tiles, each tile by itself, from the definitions."""
    found = {"rms": [], "peak": [], "channel_spread": [], "token_spread": []}
    for first in range(0, len(x) // group * group, group):
        for head in range(x.shape[1]):
            tile = x[first : first + group, head].astype(np.float64)
            rms = (sum(float(value) ** 2 for value in tile.flat) / tile.size) ** 0.5
            channels = [tile[:, channel].std(ddof=1) for channel in range(tile.shape[1])]
            tokens = [token.std(ddof=1) for token in tile]
            found["rms"].append(rms)
            found["peak"].append(max(map(abs, tile.flat)) / rms)
            found["channel_spread"].append(max(channels) / min(channels))
            found["token_spread"].append(max(tokens) / min(tokens))
    return {name: {"median": np.median(each), "largest": max(each)} for name, each in found.items()}


def expected_errors(k, v, cfg, rotated):
    """Errors of [tokens, heads, head_dim], tile by tile, from the definitions."""
    difference, energy, scales = [0.0, 0.0], [0.0, 0.0], ([], [])
    for first in range(0, len(k) // cfg.group * cfg.group, cfg.group):
        for head in range(k.shape[1]):
            tile = [np.ascontiguousarray(x[first : first + cfg.group, head])[None] for x in (k, v)]
            decoded = kvarn.decode(kvarn.encode(*tile, cfg, rotated), cfg, rotated)
            for index in range(2):
                for token, token_hat in zip(tile[index][0], decoded[index][0], strict=True):
                    a, b = token.astype(np.float64), token_hat.astype(np.float64)
                    difference[index] += float(np.dot(a - b, a - b))
                    energy[index] += float(np.dot(a, a))
                    scales[index].append(np.dot(a, b) / np.dot(a, a) - 1)
    return {
        name: {
            "error": (difference[index] / energy[index]) ** 0.5,
            "scale_mean": np.mean(scales[index]),
            "scale_spread": np.std(scales[index]),
        }
        for index, name in enumerate("kv")
    }


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, figures in expected.items():
        assert found[name] == pytest.approx(figures, rel=1e-6, abs=1e-9), name


class TestFigures:
    @pytest.mark.parametrize(
        ("dtype", "group", "rotated"),
        [(np.float32, 128, False), (np.float16, 64, False), (np.float32, 64, True)],
    )
    def test_agree_with_the_definitions(self, tmp_path, dtype, group, rotated):
        k, v = tensors(1, dtype)
        options = ["--group", str(group), *(["--rotated"] if rotated else [])]
        found = inspected(tmp_path, save(tmp_path / "a.npz", k=k, v=v), *options)
        assert (found["group"], found["rotated"]) == (group, rotated)
        (layer,) = found["layers"]
        assert (layer["layer"], layer["k"], layer["v"]) == (None, "k", "v")
        assert (layer["dtype"], layer["tokens"]) == (np.dtype(dtype).name, TOKENS)
        assert layer["tiles"] == TOKENS // group * HEADS
        assert layer["tokens_left_out"] == TOKENS % group
        assert (layer["kv_heads"], layer["head_dim"]) == (HEADS, HEAD_DIM)
        assert "heads" not in layer
        for name, given in (("k", k), ("v", v)):
            turned = (given.astype(np.float64) @ matrix(HEAD_DIM)).astype(np.float32)
            plain = turned if rotated else given
            other = given if rotated else turned
            for key, x in ((name, plain), (f"{name}_rotated", other)):
                expected = expected_statistics(x, group)
                for statistic, figures in expected.items():
                    assert layer["statistics"][key][statistic] == pytest.approx(figures, rel=1e-5)
        assert [row["preset"] for row in layer["bits"]] == [f"kvarn_{bits}_g{group}" for bits in PAIRS]
        for row in layer["bits"]:
            cfg = kvarn.Config(row["preset"], head_dim=HEAD_DIM)
            assert row["bytes_per_token"] == HEADS * cfg.record_bytes / group
            sixteen = 2 * HEADS * HEAD_DIM * 2
            assert row["times_smaller"] == pytest.approx(sixteen / row["bytes_per_token"])
            for encoder, refit in (("refit", True), ("published", False)):
                coded = dict(row[encoder])
                assert coded.pop("saturated") == 0
                assert_close(coded, expected_errors(k, v, cfg.replace(refit=refit), rotated))

    def test_refit_makes_token_scales_and_errors_smaller(self, tmp_path):
        k, v = tensors(2)
        (layer,) = inspected(tmp_path, save(tmp_path / "a.npz", k=k, v=v))["layers"]
        for row in layer["bits"]:
            for matrix_name in "kv":
                refit, published = (row[encoder][matrix_name] for encoder in ("refit", "published"))
                assert refit["scale_spread"] < 0.1 * published["scale_spread"]
                assert refit["error"] < published["error"]

    def test_heads_are_inspected_apart_and_add_up(self, tmp_path):
        k, v = tensors(3)
        together = inspected(tmp_path, save(tmp_path / "a.npz", k=k, v=v), "--heads")["layers"][0]
        assert [head["head"] for head in together["heads"]] == [0, 1]
        for head in together["heads"]:
            index = head.pop("head")
            one = {"k": k[:, index : index + 1], "v": v[:, index : index + 1]}
            apart = inspected(tmp_path, save(tmp_path / "b.npz", **one))["layers"][0]
            assert head == {key: apart[key] for key in head}
        for bits, *each in zip(together["bits"], *(head["bits"] for head in together["heads"]), strict=True):
            assert bits["bytes_per_token"] == sum(part["bytes_per_token"] for part in each)

    def test_more_tiles_than_are_held_in_float64_at_once(self, tmp_path):
        k, v = tensors(4, np.float16, tokens=64 * 70, heads=1, head_dim=16)
        (layer,) = inspected(tmp_path, save(tmp_path / "a.npz", k=k, v=v), "--group", "64")["layers"]
        assert layer["tiles"] == 70
        expected = expected_statistics(k, 64)
        assert layer["statistics"]["k"]["peak"] == pytest.approx(expected["peak"])
        cfg = kvarn.Config("kvarn_k2v2_g64", head_dim=16)
        coded = {name: layer["bits"][-1]["refit"][name] for name in "kv"}
        assert_close(coded, expected_errors(k, v, cfg, False))

    def test_bfloat16_is_what_the_codec_makes_of_it_in_torch(self, tmp_path):
        torch = pytest.importorskip("torch", reason="makes bfloat16")
        from safetensors.torch import save_file

        k, v = (torch.from_numpy(x.copy()).to(torch.bfloat16) for x in tensors(5))
        k[7, 1, 3] = 3e38  # beyond half: stored as the largest, and counted
        path = tmp_path / "a.safetensors"
        save_file({"k": k, "v": v}, path)
        (layer,) = inspected(tmp_path, str(path))["layers"]
        assert layer["dtype"] == "bfloat16"
        whole = TOKENS // 128 * 128
        for row in layer["bits"]:
            cfg = kvarn.Config(row["preset"], head_dim=HEAD_DIM)
            tiles = [x[:whole].reshape(-1, 128, HEADS, HEAD_DIM) for x in (k, v)]
            difference, energy, saturated = 0.0, 0.0, 0
            for head in range(HEADS):
                here = [x[:, :, head] for x in tiles]
                records, counts = kvarn.encode(*here, cfg, return_counts=True)
                decoded = kvarn.decode(records, cfg)[1].double()
                difference += float(((decoded - here[1].double()) ** 2).sum())
                energy += float((here[1].double() ** 2).sum())
                saturated += counts.saturated
            assert saturated >= 1
            assert row["refit"]["saturated"] == saturated
            assert row["refit"]["v"]["error"] == pytest.approx((difference / energy) ** 0.5, rel=1e-9)

    def test_zeros_have_no_error_and_constants_no_spread(self, tmp_path, capsys):
        zeros, ones = np.zeros((128, 1, 16), np.float32), np.ones((128, 1, 16), np.float32)
        svg = tmp_path / "a.svg"
        file = save(tmp_path / "a.npz", k=zeros, v=ones)
        (layer,) = inspected(tmp_path, file, "--plot", str(svg))["layers"]
        one = {"median": 1.0, "largest": 1.0}
        nought = {"median": 0.0, "largest": 0.0}
        spreads = {"channel_spread": one, "token_spread": one}
        assert layer["statistics"]["k"] == {"rms": nought, "peak": nought, **spreads}
        assert layer["statistics"]["v"] == {"rms": one, "peak": one, **spreads}
        for row in layer["bits"]:
            assert row["refit"]["k"] == {"error": None, "scale_mean": None, "scale_spread": None}
            assert row["refit"]["v"]["error"] < 1e-3
        assert "–" in capsys.readouterr().out
        assert "K: relative L2 error: 0 everywhere" in svg.read_text()

    def test_zero_tokens_have_no_scale(self, tmp_path):
        k, v = tensors(6, tokens=128)
        k[5:20] = 0
        (layer,) = inspected(tmp_path, save(tmp_path / "a.npz", k=k, v=v))["layers"]
        cfg = kvarn.Config("kvarn_k2v2_g128", head_dim=HEAD_DIM)
        scales = []
        for head in range(HEADS):
            tile = [np.ascontiguousarray(x[None, :, head]) for x in (k, v)]
            decoded = kvarn.decode(kvarn.encode(*tile, cfg), cfg)[0][0].astype(np.float64)
            for token in (*range(5), *range(20, 128)):
                a = k[token, head].astype(np.float64)
                scales.append(a @ decoded[token] / (a @ a) - 1)
        found = layer["bits"][-1]["refit"]["k"]
        assert found["scale_mean"] == pytest.approx(np.mean(scales), rel=1e-6, abs=1e-9)
        assert found["scale_spread"] == pytest.approx(np.std(scales), rel=1e-6, abs=1e-9)


class TestNames:
    def test_layers_are_in_the_order_of_their_numbers(self, tmp_path):
        arrays = {}
        for layer in (10, 2, 0):
            arrays[f"k.{layer}"], arrays[f"v.{layer}"] = tensors(layer, tokens=128)
        arrays["positions"] = np.arange(128)
        found = inspected(tmp_path, save(tmp_path / "a.npz", **arrays))
        assert [(row["layer"], row["k"], row["v"]) for row in found["layers"]] == [
            (layer, f"k.{layer}", f"v.{layer}") for layer in (0, 2, 10)
        ]

    def test_keys_and_values_or_names_of_ones_own(self, tmp_path):
        k, v = tensors(1, tokens=128)
        usual = inspected(tmp_path, save(tmp_path / "a.npz", keys=k, values=v))["layers"]
        assert (usual[0]["k"], usual[0]["v"]) == ("keys", "values")
        file = save(tmp_path / "b.npz", k=v, v=k, mine=k, other=v)
        own = inspected(tmp_path, file, "--k", "mine", "--v", "other")["layers"]
        assert [row["bits"] for row in own] == [row["bits"] for row in usual]

    @pytest.mark.parametrize(
        ("names", "options", "text"),
        [
            (["a", "b"], [], "with a, b: expected k and v, keys and values, or k.LAYER and v.LAYER"),
            (["k.01", "v.01"], [], "expected k and v, keys and values"),
            ([], [], "with no arrays: expected k and v"),
            (["k"], [], "with k: expected v among them"),
            (["k.0", "v.0", "k.1"], [], "with k.0, v.0, k.1: expected v.1 among them"),
            (["k", "v", "keys", "values"], [], "expected one of k and v, keys and values"),
            (["k", "v", "k.0", "v.0"], [], "choose with --k and --v"),
            (["k", "v"], ["--k", "k"], "--k k with --v None: expected both or neither"),
            (["k", "v"], ["--k", "k", "--v", "w"], "with k, v: expected w among them"),
            ([f"x{index}" for index in range(11)], [], "x7 and 3 more: expected"),
        ],
    )
    def test_what_is_found_and_what_was_expected(self, tmp_path, capsys, names, options, text):
        x = np.ones((128, 1, 16), np.float32)
        file = save(tmp_path / "a.npz", **dict.fromkeys(names, x))
        assert text in failure(capsys, file, *options)


class TestErrors:
    @pytest.mark.parametrize(
        ("k", "v", "text"),
        [
            ((1, 2, 128, 16), None, "k of shape [1, 2, 128, 16]: expected [tokens, kv_heads, head_dim]"),
            ((128, 16), None, "k of shape [128, 16]: expected [tokens"),
            ((128, 0, 16), None, "k of shape [128, 0, 16]: expected"),
            ((0, 1, 16), None, "k of shape [0, 1, 16]: expected"),
            ((128, 1, 16), (256, 1, 16), "v of shape [256, 1, 16]: expected [128, 1, 16], as k has"),
            ((100, 1, 16), None, "k of 100 tokens: expected a tile of 128 or more"),
            ((128, 1, 24), None, "k: head_dim 24: expected a multiple of 16"),
        ],
    )
    def test_shapes(self, tmp_path, capsys, k, v, text):
        file = save(tmp_path / "a.npz", k=np.ones(k, np.float32), v=np.ones(v or k, np.float32))
        assert text in failure(capsys, file)

    def test_a_short_file_is_told_of_shorter_tiles(self, tmp_path, capsys):
        x = np.ones((100, 1, 16), np.float32)
        file = save(tmp_path / "a.npz", k=x, v=x)
        assert "use --group 64" in failure(capsys, file)
        assert main(["inspect", file, "--group", "64"]) == 0

    @pytest.mark.parametrize(
        ("k", "v", "text"),
        [
            ("float64", "float64", "k of type float64: expected float16, bfloat16 or float32"),
            (">f4", ">f4", "k of type >f4: expected"),
            ("int8", "int8", "k of type int8: expected"),
            ("float16", "float32", "v of type float32: expected float16, as k has"),
        ],
    )
    def test_types(self, tmp_path, capsys, k, v, text):
        x = np.ones((128, 1, 16))
        assert text in failure(capsys, save(tmp_path / "a.npz", k=x.astype(k), v=x.astype(v)))

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite_are_named(self, tmp_path, capsys, value):
        k, v = tensors(1)
        v[297, 1, 5] = v[298, 0, 0] = value  # among the tokens that are left out
        text = failure(capsys, save(tmp_path / "a.npz", k=k, v=v))
        assert f"v with {value} at token 297, KV head 1, channel 5, 2 of {v.size} elements" in text

    def test_paths(self, tmp_path, capsys):
        x = np.ones((128, 1, 16), np.float32)
        file = save(tmp_path / "a.npz", k=x, v=x)
        assert "expected a .npz or .safetensors file" in failure(capsys, str(tmp_path / "a.pt"))
        assert "No such file" in failure(capsys, str(tmp_path / "none.npz"))
        (tmp_path / "folder.npz").mkdir()
        assert "no regular file" in failure(capsys, str(tmp_path / "folder.npz"))
        for option in ("--json", "--plot"):
            assert "in a folder that exists" in failure(capsys, file, option, str(tmp_path / "no" / "x"))
            assert "can be written" in failure(capsys, file, option, str(tmp_path))

    def test_a_wrong_group_is_a_wrong_option(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["inspect", "a.npz", "--group", "32"])
        assert caught.value.code == 2
        assert "--group" in capsys.readouterr().err


class TestText:
    def test_tables_show_the_figures_of_the_json(self, tmp_path, capsys):
        k, v = tensors(7)
        (layer,) = inspected(tmp_path, save(tmp_path / "a.npz", k=k, v=v))["layers"]
        out = capsys.readouterr().out
        assert out.startswith(
            "k, v: 300 tokens, 2 KV heads, head dim 32, float32; 4 tiles of 128 tokens, 44 tokens left out\n"
        )
        for row, bits in zip(layer["bits"], PAIRS, strict=True):
            (line,) = (line for line in out.splitlines() if f"{bits} refit" in line)
            error = 100 * row["refit"]["k"]["error"]
            assert f"{row['bytes_per_token']:,.0f}" in line.split()
            assert f"{error:.{2 if error < 10 else 1}f}" in line.split()
            assert f"±{100 * row['refit']['k']['scale_spread']:.2f}" in line.split()
        peak = layer["statistics"]["v_rotated"]["peak"]
        (line,) = (line for line in out.splitlines() if "V rotated" in line)
        assert f"{peak['median']:.3g} ({peak['largest']:.3g})" in line
        assert "beyond half range" not in out

    def test_heads_have_tables_of_their_own(self, tmp_path, capsys):
        k, v = tensors(8)
        assert main(["inspect", save(tmp_path / "a.npz", k=k, v=v), "--heads"]) == 0
        out = capsys.readouterr().out
        assert [out.count(f"KV head {head}: ") for head in range(3)] == [2, 2, 0]

    def test_tables_fit_80_columns_and_cut_nothing(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        k, v = tensors(9, heads=8)
        k[::7] *= 1e3
        file = save(tmp_path / "a.npz", k=k, v=v)
        assert main(["inspect", file, "--heads"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines[1:])) <= 80
        assert not any("…" in line for line in lines)

    def test_saturation_is_told(self, tmp_path, capsys):
        k, v = tensors(10)
        assert main(["inspect", save(tmp_path / "a.npz", k=k * np.float32(1e30), v=v)]) == 0
        assert "beyond half range and stored as the largest" in capsys.readouterr().out

    def test_names_with_brackets_are_no_markup(self, tmp_path, capsys):
        k, v = tensors(11)
        file = save(tmp_path / "a.npz", **{"[red]k": k, "v[/]": v})
        assert main(["inspect", file, "--k", "[red]k", "--v", "v[/]"]) == 0
        assert capsys.readouterr().out.startswith("[red]k, v[/]: 300 tokens")

    def test_help_says_names_and_shape(self, capsys):
        with pytest.raises(SystemExit):
            main(["inspect", "--help"])
        out = capsys.readouterr().out
        for text in ("[tokens, kv_heads, head_dim]", "k.LAYER and v.LAYER", "bfloat16", "--rotated"):
            assert text in out

    def test_torch_is_not_imported(self, tmp_path):
        k, v = tensors(12)
        file = save(tmp_path / "a.npz", k=k, v=v)
        code = "import sys; from kvarn.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", code, "inspect", file], check=True, capture_output=True)


class TestPlot:
    @pytest.mark.parametrize("layers", [1, 3, 40])
    def test_has_a_point_for_every_figure_inside_the_picture(self, tmp_path, layers):
        arrays = {}
        for layer in range(layers):
            arrays[f"k.{layer}"], arrays[f"v.{layer}"] = tensors(layer, tokens=64, heads=1, head_dim=16)
        svg = tmp_path / "a.svg"
        file = save(tmp_path / "a<&>.npz", **arrays)
        assert main(["inspect", file, "--group", "64", "--plot", str(svg)]) == 0
        root = ElementTree.fromstring(svg.read_text())
        name = "{http://www.w3.org/2000/svg}"
        assert {element.tag.removeprefix(name) for element in root.iter()} <= {
            "svg",
            "rect",
            "text",
            "path",
            "g",
            "circle",
        }
        panels = root.findall(f"{name}g")
        assert len(panels) == 4
        for panel in panels:
            circles = panel.findall(f"{name}circle")
            assert len(circles) == 2 * 3 * layers  # refit and published, 4, 3 and 2 bits
            for circle in circles:
                assert 64 <= float(circle.get("cx")) <= 424
                assert 30 - 0.1 <= float(circle.get("cy")) <= 220 + 0.1
        texts = [element.text for element in root.iter(f"{name}text")]
        assert "a<&>.npz, tiles of 64 tokens" in texts
        assert {"K: relative L2 error", "V: token-scale spread", "layer", "0"} <= set(texts)
        numbers = [text for text in (element.text for element in panels[0].iter(f"{name}text")) if text]
        assert sum(bool(re.fullmatch(r"\d+", text)) for text in numbers) <= 16

    def test_more_bits_lie_lower(self, tmp_path):
        k, v = tensors(1)
        svg = tmp_path / "a.svg"
        assert main(["inspect", save(tmp_path / "a.npz", k=k, v=v), "--plot", str(svg)]) == 0
        root = ElementTree.fromstring(svg.read_text())
        name = "{http://www.w3.org/2000/svg}"
        for panel in root.findall(f"{name}g")[:2]:
            heights = {
                circle.get("stroke"): float(circle.get("cy"))
                for circle in panel.findall(f"{name}circle")
                if circle.get("fill") != "white"
            }
            four, three, two = (heights[colour] for colour in ("#1b6ca8", "#d17a00", "#b3263a"))
            assert four > three > two  # y points down
