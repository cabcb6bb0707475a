"""What every layer of a model caches, by the model's config."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    get_layer_types_and_kwargs,
)

from kvarn.integrations.transformers.errors import UnsupportedError


@dataclass(frozen=True)
class LayerKind:
    """The cache layer that transformers has for one layer of a model.

    Attributes:
        name: transformers' word, as ``"full_attention"`` or ``"linear_attention"``.
        options: arguments of transformers' class.
    """

    name: str
    options: dict[str, Any]

    @property
    def full(self) -> bool:
        """Whether the layer keeps keys and values of all tokens: what records are for."""
        return self.name == "full_attention"

    @property
    def static(self) -> bool:
        """Whether what the layer keeps is of one size: transformers has the same class for static caches."""
        return STATIC_LAYER_TYPE_MAPPING.get(self.name) is DYNAMIC_LAYER_TYPE_MAPPING[self.name]

    def make(self) -> Any:
        """Return a new, empty layer of transformers' own class."""
        return DYNAMIC_LAYER_TYPE_MAPPING[self.name](**self.options)


def layer_kinds(decoder: PreTrainedConfig) -> list[LayerKind]:
    """Return the kind of every layer of a decoder.

    Raises:
        UnsupportedError: no layer is a full-attention layer, or those do not cache keys and values.
    """
    names, options = get_layer_types_and_kwargs(decoder)
    # Up to transformers 5.19 the layers of a type share their options.
    per_layer = [options] * len(names) if isinstance(options, dict) else options
    kinds = [LayerKind(name, kwargs) for name, kwargs in zip(names, per_layer, strict=True)]
    model = type(decoder).__name__
    full = [index for index, kind in enumerate(kinds) if kind.full]
    if not full:
        raise UnsupportedError(
            f"{model} has layers of type {', '.join(sorted(set(names)))}: expected at least one "
            "full_attention layer to store as records; use a DynamicCache"
        )
    latent = getattr(decoder, "kv_lora_rank", None)
    if latent is not None:
        raise UnsupportedError(
            f"layer {full[0]} of {model} caches a latent of {latent} and a rotary key of "
            f"{getattr(decoder, 'qk_rope_head_dim', None)} channels that all heads share (multi-head latent "
            "attention): expected keys and values of one head_dim; use a DynamicCache"
        )
    return kinds


def shares_layers(decoder: PreTrainedConfig) -> bool:
    """Return whether layers attend to the keys and values of others."""
    modes = getattr(decoder, "kv_sharing_modes", None) or ()
    return any(mode is not None for mode in modes) or bool(getattr(decoder, "num_kv_shared_layers", 0))
