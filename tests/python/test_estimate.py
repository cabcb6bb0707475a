"""`kvarn estimate` and the layers it reads from a config.json."""

import json

import kvarn
import pytest
from kvarn import LayerShape, cached_layers
from kvarn._model_config import read_model_config
from kvarn.cli import main
from kvarn.cli.estimate import parse_size
from kvarn.errors import ConfigError, ShapeError

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def rows(capsys, *arguments):
    assert main(["estimate", *arguments, "--json"]) == 0
    return {row["format"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


def test_figures_worked_out_by_hand(folder, capsys):
    found = rows(capsys, "--model", str(folder), "--context", "131072", "--batch", "4", "--memory", "80GiB")
    assert set(found) == {"fp16", "fp8", *kvarn.presets()}
    assert found["fp16"]["bytes_per_token"] == 131_072
    assert found["fp16"]["sequence_bytes"] == 16 * 2**30
    assert (found["fp16"]["sequences"], found["fp16"]["tokens"]) == (5, 80 * 2**30 // 131_072)
    assert found["fp8"]["batch_bytes"] == 4 * 8 * 2**30
    assert found["fp8"]["times_smaller"] == 2
    k4v2 = found["kvarn_k4v2_g128"]
    # 1023 sealed tiles, the sink tile and two more slots.
    expected = 1_023 * 32 * 8 * 13_824 + 3 * 32 * 8 * 128 * 128 * 4
    assert k4v2["sequence_bytes"] == expected
    assert k4v2["bytes_per_token"] == 27_648
    assert k4v2["times_smaller"] == 16 * 2**30 / expected
    assert k4v2["sequences"] == 80 * 2**30 // expected
    cfg = kvarn.Config("kvarn_k4v2_g128", head_dim=128)
    fits = kvarn.capacity(cfg, 80 * 2**30, layers=32, kv_heads=8)
    assert k4v2["tokens"] == fits.tokens_per_sequence


def test_what_fits_nowhere_is_zero(folder, capsys):
    found = rows(capsys, "--model", str(folder), "--context", "4096", "--memory", "1MB")
    assert found["fp16"]["tokens"] == 1_000_000 // 131_072
    assert {(found[str(name)]["sequences"], found[str(name)]["tokens"]) for name in kvarn.presets()} == {
        (0, 0)
    }


def test_the_table_names_formats_and_what_is_left_out(tmp_path, capsys):
    kinds = ["full_attention", "sliding_attention", "linear_attention", "full_attention"]
    config = {**LLAMA, "num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 1024}
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"model_type": "vision", "text_config": config}))
    assert main(["estimate", "--model", str(file), "--context", "4096"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("fp16", "fp8", *map(str, kvarn.presets())))
    assert "1 layers keep 1,024 tokens in 16 bit" in out
    assert "linear_attention" in out
    found = rows(capsys, "--model", str(file), "--context", "4096")
    token = 8 * 128 * 2
    assert found["fp8"]["sequence_bytes"] == 2 * 4096 * token + 2 * 1024 * token


@pytest.mark.parametrize(
    ("changes", "full", "sliding", "window"),
    [
        ({}, 32, 0, 0),
        ({"sliding_window": 4096}, 0, 32, 4096),
        ({"sliding_window": 4096, "use_sliding_window": False}, 32, 0, 0),
        ({"sliding_window": None}, 32, 0, 0),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}, 1, 1, 9),
    ],
)
def test_kinds_of_layers(changes, full, sliding, window):
    found = cached_layers({**LLAMA, **changes})
    assert found.full == (LayerShape(8, 128),) * full
    assert (found.sliding, found.window) == ((LayerShape(8, 128),) * sliding, window)


def test_heads_and_head_dim():
    config = {**LLAMA, "num_key_value_heads": None, "head_dim": 64}
    assert cached_layers(config).full[0] == LayerShape(32, 64)


def test_agrees_with_the_cache_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with the cache of transformers")
    for config in (
        transformers.LlamaConfig(num_hidden_layers=3, num_key_value_heads=4),
        transformers.Gemma3TextConfig(num_hidden_layers=7, sliding_window=64),
        transformers.Qwen3Config(num_hidden_layers=2),
    ):
        config.save_pretrained(tmp_path)
        layers = read_model_config(tmp_path)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        assert len(layers.full) == kinds.count("full_attention")
        assert len(layers.sliding) == kinds.count("sliding_attention")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        assert layers.full[0] == LayerShape(config.num_key_value_heads, head_dim)


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("1.5 GB", 1_500_000_000), ("4096", 4096), ("7 mib", 7 * 2**20)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "80TiBs", "-1GiB", "0", "1e3", "80 G iB"])
def test_bad_sizes(text):
    with pytest.raises(ShapeError, match="expected"):
        parse_size(text)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({**LLAMA, "kv_lora_rank": 512}, "latent attention"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"model_type": "mamba", "hidden_size": 4}, "mamba with num_hidden_layers None"),
        ([1], "a list: expected a JSON object"),
        ({**LLAMA, "sliding_window": 9}, "without full_attention layers"),
    ],
)
def test_models_without_such_a_cache(config, text, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert main(["estimate", "--model", str(file), "--context", "10"]) == 2
    assert text in capsys.readouterr().err


def test_bad_files_and_numbers(folder, tmp_path, capsys):
    def error(*arguments):
        assert main(["estimate", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    assert "expected a model's config.json" in error("--model", str(tmp_path / "none"), "--context", "1")
    (tmp_path / "bad.json").write_text("{")
    assert "expected a model's config.json" in error("--model", str(tmp_path / "bad.json"), "--context", "1")
    assert "context 0: expected 1 or more" in error("--model", str(folder), "--context", "0")
    assert "batch -1: expected 1 or more" in error("--model", str(folder), "--context", "1", "--batch", "-1")
    assert "size lots" in error("--model", str(folder), "--context", "1", "--memory", "lots")
    with pytest.raises(ConfigError):
        read_model_config(tmp_path / "bad.json")
