"""The cache for models that are compiled as one graph."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from kvarn.integrations.transformers import static_ops
from kvarn.integrations.transformers.cache import KVarNCache
from kvarn.integrations.transformers.errors import UnsupportedError
from kvarn.integrations.transformers.kinds import layer_kinds
from kvarn.integrations.transformers.rows import Rows
from kvarn.integrations.transformers.static_layer import KVarNStaticLayer


class KVarNStaticCache(KVarNCache):
    """A `KVarNCache` that a model compiled with ``torch.compile(…, fullgraph=True)`` can use.

    The graph has no break, and one graph serves every step of the same shape: lengths, sealing and rows are
    looked up when it runs. It computes what `KVarNCache` computes, by the same calls. Eager and compiled
    calls can take turns, as in `generate`, which prefills eagerly. Everything else (`crop`, `reset`,
    `reorder_cache`, copies…) is as with `KVarNCache`, outside of what is compiled::

        model.set_attn_implementation("kvarn")
        cache = KVarNStaticCache(model.config, "kvarn_k4v2_g128", max_tokens=4096)
        logits = model(prompt, past_key_values=cache).logits
        step = torch.compile(model, fullgraph=True)
        while True:
            logits = step(logits[:, -1:].argmax(-1), past_key_values=cache).logits

    Compiled steps need the attention implementation ``"kvarn"``. With left padding, give them the padding
    mask, best as [batch, max_tokens]: a mask that grows is compiled a second time, for any length. As with
    `KVarNCache`, the host reads the mask once a step; without padding, give none.

    Args:
        config: the model's config (``model.config``). All its layers must be full attention.
        preset: ``kvarn_k{bits}v{bits}_g{group}``, see `kvarn.presets`.
        max_tokens: columns that a row can hold, padding included; None: ``config.max_position_embeddings``.
        max_rows: rows that the cache and its copies can hold together; None: as `KVarNCache`.
        **options: as `KVarNCache` has them.

    Raises:
        UnsupportedError: as `KVarNCache`; or a layer is not a full-attention layer.
        ConfigError: the preset, or another argument, is not supported.
    """

    layer_class = KVarNStaticLayer

    def __init__(
        self,
        config: PreTrainedConfig,
        preset: str = "kvarn_k4v2_g128",
        *,
        max_tokens: int | None = None,
        max_rows: int | None = None,
        **options: Any,
    ) -> None:
        _check_layers(config.get_text_config(decoder=True))
        super().__init__(config, preset, max_tokens=max_tokens, max_rows=max_rows, **options)
        self.handle = torch.tensor([static_ops.serial_of(self)])
        for layer in self.kvarn_layers:
            layer.cache = self.handle

    @property
    def kvarn_layers(self) -> list[KVarNStaticLayer]:
        """The layers, all of them."""
        layers: Any = self.layers
        return list(layers)

    @property
    def rows(self) -> Rows:
        """The rows that all layers share."""
        return self._rows

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVarNStaticCache":
        """Return a cache of its own with the same rows, in the same pool.

        Raises:
            CapacityError: more rows than max_rows.
        """
        made: KVarNStaticCache = super().__deepcopy__(memo)  # type: ignore[assignment]
        # One tensor for the copy and its layers.
        made.handle.fill_(static_ops.serial_of(made))
        return made


def _check_layers(decoder: PreTrainedConfig) -> None:
    for number, kind in enumerate(layer_kinds(decoder)):
        if not kind.full:
            raise UnsupportedError(
                f"layer {number} of {type(decoder).__name__} is of type {kind.name}: expected full_attention "
                "in every layer of a KVarNStaticCache. transformers' own static layers count tokens in "
                "Python numbers, for which a graph is compiled anew, and cannot be cropped; use a KVarNCache "
                "without fullgraph"
            )
