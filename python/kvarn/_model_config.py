"""The cached layers of a model, by its config: neither transformers nor weights are needed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarn._layers import LayerShape
from kvarn.errors import ConfigError


@dataclass(frozen=True)
class CachedLayers:
    """What a model caches; made by `cached_layers`.

    Attributes:
        name: type of the model.
        full: layers that keep all tokens, which kvarn stores as records.
        sliding: layers that keep the last `window` tokens, in 16 bit whatever the format of the others.
        window: tokens that sliding layers keep.
        other: kinds of further layers, whose state does not grow and is not counted.
    """

    name: str
    full: tuple[LayerShape, ...]
    sliding: tuple[LayerShape, ...]
    window: int
    other: tuple[str, ...]


def read_model_config(path: Path) -> CachedLayers:
    """Read a config.json, or the one in a folder.

    Raises:
        ConfigError: no such file, no JSON, or a model whose cache is not K and V by heads.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}: expected a model's config.json, or its folder"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file}: {error}: expected a model's config.json") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{file}: a {type(config).__name__}: expected a JSON object; pass a model's config.json"
        )
    return cached_layers(config)


def cached_layers(config: Any) -> CachedLayers:
    """The layers that a model caches; of several models in one those of the decoder.

    Args:
        config: A transformers config, or what a ``config.json`` holds, as a dict.

    Raises:
        ConfigError: A number is missing, or the cache is not K and V by heads.
    """
    config = config if isinstance(config, dict) else config.to_dict()
    text = next((config[key] for key in ("text_config", "decoder", "llm_config") if key in config), config)
    name = str(text.get("model_type") or config.get("model_type") or "model")
    if "kv_lora_rank" in text:
        raise ConfigError(
            f"{name} with kv_lora_rank {text['kv_lora_rank']}: expected K and V by heads; latent attention "
            "has no format here"
        )
    layers = _number(name, text, "num_hidden_layers")
    heads = _number(name, text, "num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or _number(name, text, "hidden_size") // heads
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    usual = "full_attention" if window is None else "sliding_attention"
    kinds = text.get("layer_types") or [usual] * layers
    shape = LayerShape(int(kv_heads), int(head_dim))
    full, sliding = (kinds.count(kind) for kind in ("full_attention", "sliding_attention"))
    return CachedLayers(
        name=name,
        full=(shape,) * full,
        sliding=(shape,) * sliding,
        window=int(window or 0),
        other=tuple(sorted({*kinds} - {"full_attention", "sliding_attention"})),
    )


def _number(name: str, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{name} with {key} {value}: expected a number from 1 on; pass a model's config.json"
        )
    return value
