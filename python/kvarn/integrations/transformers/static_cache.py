"""The cache for models that are compiled as one graph."""

from typing import Any

import torch
from torch import Tensor
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
        config: the model's config (``model.config``).
        preset: ``kvarn_k{bits}v{bits}_g{group}``, see `kvarn.presets`.
        max_tokens: columns that a row can hold, padding included; None: ``config.max_position_embeddings``.
        max_rows: rows that the cache and its copies can hold together; None: as `KVarNCache`.
        **options: as `KVarNCache` has them.

    Raises:
        UnsupportedError: as `KVarNCache`; or a layer other than full attention counts its tokens, as sliding
            layers do; or layers share keys and values.
        ConfigError: the preset, or another argument, is not supported.

    Attributes:
        handle: what names the cache to operators in a graph, int64 [1] on the CPU.
        kvarn_layers: the full-attention layers.
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
        if self._rows.sharing:
            raise UnsupportedError(
                f"later layers of {type(config).__name__} attend to the keys and values of earlier ones: "
                "expected keys and values of its own in every layer of a KVarNStaticCache, whose operators "
                "append where they attend; use a KVarNCache without fullgraph"
            )
        self.handle: Tensor = torch.tensor([static_ops.serial_of(self)])
        self.kvarn_layers = [layer for layer in self.layers if isinstance(layer, KVarNStaticLayer)]
        for layer in self.kvarn_layers:
            layer.cache = self.handle

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
        if not (kind.full or kind.static):
            raise UnsupportedError(
                f"layer {number} of {type(decoder).__name__} is of type {kind.name}: expected "
                "full_attention, or a type whose state is of one size, as linear_attention, in a "
                "KVarNStaticCache. Other static layers of transformers count tokens in Python numbers, for "
                "which a graph is compiled anew, and cannot be cropped; use a KVarNCache without fullgraph"
            )
