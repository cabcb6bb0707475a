"""The command `kvarn`, called in process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kvarn
import pytest
from kvarn.cli import doctor, main, presets
from kvarn.cli.compare import first_difference, segment_length
from kvarn.cli.driver import cuda_driver_version
from tiny_model import CONTEXT, HEAD_DIM, KV_HEADS, LAYERS, TEMPLATE, save_tiny_model

PROMPT = "The quick brown fox jumps over the lazy dog. " * 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


class TestPresets:
    def test_json_has_the_sizes_of_the_format(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = _json(capsys, "presets", "--json")
        assert found["head_dim"] == 128
        rows = {row["name"]: row for row in found["presets"]}
        sizes = {"k4v4": 17_920, "k4v2": 13_824, "k3v3": 13_824, "k2v2": 9_728}
        for bits, size in sizes.items():
            row = rows[f"kvarn_{bits}_g128"]
            assert row["record_bytes"] == size
            assert row["bits_per_element"] == size * 8 / (2 * 128 * 128)
            assert row["ratio_to_16_bit"] == 16 / row["bits_per_element"]
            assert (f"k{row['key_bits']}v{row['value_bits']}", row["group"]) == (bits, 128)

    def test_the_table_fits_80_columns_and_cuts_nothing(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        assert main(["presets", "--head-dim", "64"]) == 0
        out = capsys.readouterr().out
        assert all(str(name) in out for name in kvarn.presets())
        assert "…" not in out
        assert max(map(len, out.splitlines())) <= 80

    def test_a_head_dim_that_does_not_fit_is_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "100" in _error(capsys, "presets", "--head-dim", "100")


class TestDoctor:
    def test_json_names_versions_machine_and_uses(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = _json(capsys, "doctor", "--json")
        assert found["versions"]["kvarn"] == kvarn.__version__
        assert found["versions"]["torch"]
        assert found["threads"]["pool"] >= 1
        assert found["instruction_set"] in found["instruction_sets"]
        assert found["usable"]["transformers cache"][0] is True
        driver = found["cuda_driver"]
        assert found["usable"]["CUDA"][0] is (driver is not None and driver[0] >= 13)

    def test_tables_say_whether_a_driver_is_present(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor"]) == 0
        out = capsys.readouterr().out
        expected = "absent" if cuda_driver_version() is None else "present, CUDA up to"
        assert expected in out
        assert "instruction set" in out

    @pytest.mark.parametrize(
        ("transformers", "torch", "usable"),
        [
            ("5.16.3", "2.13.0", False),
            ("5.17.0", "2.13.0", True),
            ("5.23.1.dev0", "2.13.0", True),
            ("5.24.0", "2.13.0", False),
            ("5.23.0", None, False),
            (None, "2.13.0", False),
        ],
    )
    def test_the_transformers_cache_needs_torch_and_a_known_version(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        transformers: str | None,
        torch: str | None,
        usable: bool,
    ) -> None:
        installed = {"transformers": transformers, "torch": torch}
        monkeypatch.setattr(doctor, "_installed", lambda name: installed.get(name, "1.0"))
        assert _json(capsys, "doctor", "--json")["usable"]["transformers cache"][0] is usable

    def test_an_absent_driver_is_none(self) -> None:
        assert cuda_driver_version("libcuda-that-does-not-exist.so.1") is None

    @pytest.mark.parametrize(("status", "expected"), [(0, (13, 2)), (999, None)])
    def test_the_driver_is_asked_for_its_version(
        self, tmp_path: Path, status: int, expected: tuple[int, int] | None
    ) -> None:
        source, library = tmp_path / "driver.c", tmp_path / "libdriver.so"
        source.write_text(f"int cuDriverGetVersion(int *version) {{ *version = 13020; return {status}; }}")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        assert cuda_driver_version(str(library)) == expected


class TestGenerate:
    @pytest.mark.parametrize(("name", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
    def test_a_dense_cache_is_counted_to_the_byte(
        self, capsys: pytest.CaptureFixture[str], folder: Path, name: str, size: int
    ) -> None:
        row = _generate(capsys, folder, "--kv-cache-dtype", name)
        tokens = len(PROMPT) + 20 - 1
        expected = tokens * LAYERS * KV_HEADS * HEAD_DIM * 2 * size
        assert row["prompt_tokens"] == len(PROMPT)
        assert row["new_tokens"] == len(row["text"]) == 20
        assert row["cache"]["tokens"] == tokens
        assert row["cache"]["total"] == row["cache"]["dense"] == expected
        assert row["cache"]["ratio_to_16_bit"] == 2 / size
        assert row["prefill_tokens_per_second"] > 0
        assert row["decode_tokens_per_second"] > 0

    def test_a_kvarn_cache_is_the_default_and_counts_records_sinks_and_tail(
        self, capsys: pytest.CaptureFixture[str], folder: Path
    ) -> None:
        """315 + 19 tokens: tile 0 is the sink slot, tile 1 is sealed, the rest is the tail."""
        row = _generate(capsys, folder)
        assert row["kv_cache_dtype"] == "kvarn_k4v2_g128"
        cache = row["cache"]
        record = kvarn.Config("kvarn_k4v2_g128", head_dim=HEAD_DIM).record_bytes
        slot = 2 * 128 * HEAD_DIM * 4
        assert cache["pages"] == LAYERS * KV_HEADS * record
        assert cache["slots"] == LAYERS * KV_HEADS * 2 * slot
        assert cache["dense"] == 0
        assert cache["total"] == cache["pages"] + cache["slots"] + cache["tables"]
        assert cache["per_token"] == cache["total"] / cache["tokens"]

    def test_what_is_streamed_is_the_text(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        text = _generate(capsys, folder)["text"]
        assert main(["generate", PROMPT, "--model", str(folder), "--max-new-tokens", "20"]) == 0
        captured = capsys.readouterr()
        assert captured.out.startswith(text + "\n\n")
        assert "kvarn_k4v2_g128" in captured.out
        assert "B/token" in captured.out

    def test_one_token_has_no_decode_speed(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        row = _generate(capsys, folder, "--max-new-tokens", "1")
        assert row["new_tokens"] == 1
        assert row["decode_tokens_per_second"] is None

    def test_sampling_follows_its_seed(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        def sampled(seed: str) -> str:
            return str(_generate(capsys, folder, "--temperature", "1.5", "--seed", seed)["text"])

        assert sampled("1") == sampled("1")
        assert sampled("1") != sampled("2")

    def test_a_file_comes_before_the_prompt(
        self, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
    ) -> None:
        text = tmp_path / "text.txt"
        text.write_text("abc\n")
        apart = _json(
            capsys,
            "generate",
            "q?",
            "--file",
            str(text),
            "--model",
            str(folder),
            "--max-new-tokens",
            "9",
            "--json",
        )
        joined = _json(
            capsys, "generate", "abc\n\nq?", "--model", str(folder), "--max-new-tokens", "9", "--json"
        )
        assert apart["prompt_tokens"] == joined["prompt_tokens"] == len("abc\n\nq?")
        assert apart["text"] == joined["text"]

    def test_the_chat_template_is_used_unless_raw(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        chat = save_tiny_model(tmp_path / "chat", template=TEMPLATE)
        assert _generate(capsys, chat)["prompt_tokens"] == len(PROMPT) + 2
        assert _generate(capsys, chat, "--raw")["prompt_tokens"] == len(PROMPT)


class TestCompare:
    def test_json_holds_every_arm_and_the_divergence(
        self, capsys: pytest.CaptureFixture[str], folder: Path
    ) -> None:
        found = _generate(capsys, folder, "--compare", "--kv-cache-dtype", "kvarn_k2v2_g64")
        arms = {row["kv_cache_dtype"]: row for row in found["arms"]}
        assert found["reference"] == "fp16"
        assert list(arms) == ["fp32", "fp16", "kvarn_k2v2_g64 (published)", "kvarn_k2v2_g64"]
        assert arms["fp16"]["departs_at"] is None
        for row in list(arms.values())[2:]:
            kl = row["kl"]
            assert len(kl["per_token"]) == 20
            assert kl["mean"] == pytest.approx(sum(kl["per_token"]) / 20, rel=1e-4)
            assert kl["mean"] > 0
            assert [(part["first"], part["end"]) for part in kl["segments"]] == [
                (first, min(first + 3, 20)) for first in range(0, 20, 3)
            ]
            same = row["text"] == arms["fp16"]["text"]
            assert (row["departs_at"] is None) == same
        assert "kl" not in arms["fp16"]

    def test_tables_show_answers_cost_and_divergence(
        self, capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        assert main(["generate", PROMPT, "--model", str(folder), "--max-new-tokens", "20", "--compare"]) == 0
        out = capsys.readouterr().out
        assert "the reference" in out
        assert "kvarn_k4v2_g128 (published)" in out
        assert "× smaller" in out
        assert "nats per token" in out
        assert "same top token" in out

    def test_a_dense_cache_cannot_be_compared(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--compare needs a KVarN preset" in _error(
            capsys, "generate", "x", "--compare", "--kv-cache-dtype", "bf16"
        )

    def test_a_comparison_is_greedy(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--compare is greedy" in _error(capsys, "generate", "x", "--compare", "--temperature", "0.5")

    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([1], [1, 2], 1), ([], [4], 0)],
    )
    def test_first_difference(self, a: list[int], b: list[int], expected: int | None) -> None:
        assert first_difference(a, b) == expected

    @pytest.mark.parametrize(("tokens", "length"), [(1, 1), (8, 1), (9, 2), (96, 12), (97, 13)])
    def test_segment_length(self, tokens: int, length: int) -> None:
        assert segment_length(tokens) == length


class TestErrors:
    def test_an_unknown_preset_is_refused_before_a_model_is_loaded(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "kvarn_k9v9_g128" in _error(
            capsys, "generate", "x", "--kv-cache-dtype", "kvarn_k9v9_g128", "--model", "/absent"
        )

    def test_an_unknown_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no such file or folder" in _error(capsys, "generate", "x", "--model", "./absent")

    def test_an_absent_file(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path = tmp_path / "absent.txt"
        assert "No such file" in _error(capsys, "generate", "x", "--file", str(path))

    def test_a_file_that_is_no_text(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path = tmp_path / "binary"
        path.write_bytes(b"\xff\xfe\x00\x80")
        assert "not UTF-8 text" in _error(capsys, "generate", "x", "--file", str(path))

    def test_a_prompt_beyond_the_context(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        text = "x" * CONTEXT
        assert f"{CONTEXT} prompt + 128 new tokens: the model's context is {CONTEXT}" in _error(
            capsys, "generate", text, "--model", str(folder)
        )

    def test_an_empty_prompt(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        assert "prompt of 0 tokens" in _error(capsys, "generate", "", "--model", str(folder))

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["absent"],
            ["generate", "x", "--max-new-tokens", "0"],
            ["generate", "x", "--max-new-tokens", "many"],
            ["generate", "x", "--temperature", "-1"],
            ["generate", "x", "--temperature", "nan"],
            ["generate", "x", "--dtype", "int8"],
        ],
    )
    def test_wrong_options_exit_with_2(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage: kvarn" in capsys.readouterr().err

    def test_the_traceback_can_be_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVARN_TRACEBACK", "1")
        with pytest.raises(kvarn.KvarnError):
            main(["presets", "--head-dim", "100"])

    def test_ctrl_c_is_one_line(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(presets, "describe", interrupted)
        assert main(["presets"]) == 130
        assert capsys.readouterr().err == "interrupted\n"

    @pytest.mark.parametrize(("no_color", "red"), [(None, True), ("1", False)])
    def test_errors_are_red_unless_no_color(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        no_color: str | None,
        red: bool,
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        if no_color:
            monkeypatch.setenv("NO_COLOR", no_color)
        assert main(["presets", "--head-dim", "100"]) == 2
        assert ("\x1b[31m" in capsys.readouterr().err) is red


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"kvarn {kvarn.__version__}\n"


def test_commands_without_a_model_do_not_import_torch() -> None:
    code = (
        "import sys; from kvarn.cli import main; main(['presets']); main(['doctor']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m kvarn presets --json | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def _generate(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> Any:
    options = ["--model", str(folder), "--json"]
    if "--max-new-tokens" not in more:
        options += ["--max-new-tokens", "20"]
    return _json(capsys, "generate", PROMPT, *options, *more)
