"""What a model must be like to be served from one pool."""

from typing import Any

from kvarn import LayerShape
from kvarn.integrations.transformers.errors import UnsupportedError
from kvarn.integrations.transformers.kinds import layer_kinds, shares_layers


def check_model(model: Any) -> None:
    """Refuse a model that a `KVarNBatching` cannot serve.

    Raises:
        UnsupportedError: the text names the reason.
    """
    decoder = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{name} has an encoder: expected a decoder alone; use generate() with transformers' own cache"
        )
    for number, kind in enumerate(layer_kinds(decoder)):
        if not kind.full:
            raise UnsupportedError(
                f"layer {number} of {name} is of type {kind.name}: expected full_attention in every layer, "
                "as the requests of a batch have only their sequences in the pool; use generate() with a "
                "KVarNCache, which keeps such layers in transformers' own classes"
            )
    if shares_layers(decoder):
        raise UnsupportedError(
            f"layers of {name} share keys and values: expected its own in every layer; use generate() with a "
            "KVarNCache"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or getattr(model, "_device_mesh", None) is not None:
        raise UnsupportedError(
            f"{name} is spread over several devices ({', '.join(sorted(devices))}): expected one, that of "
            "the pool; load it on one device"
        )


def layer_shapes(model: Any) -> list[LayerShape]:
    """Return KV heads and head dim of every layer, by the model's config."""
    decoder = model.config.get_text_config(decoder=True)
    per_layer = getattr(decoder, "per_layer_config", None) or [decoder] * decoder.num_hidden_layers
    shapes = []
    for config in per_layer:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shapes.append(LayerShape(getattr(config, "num_key_value_heads", None) or heads, head_dim))
    return shapes
