"""The cache layer of a `KVarNStaticCache`: eagerly a `KVarNLayer`, and operators where a graph is traced."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvarn import TensorError
from kvarn.integrations.transformers import static_ops
from kvarn.integrations.transformers.dense import Scoring
from kvarn.integrations.transformers.errors import UnsupportedError
from kvarn.integrations.transformers.layer import KVarNLayer
from kvarn.integrations.transformers.rows import Rows


class TracedChunk:
    """New keys and values of one layer on their way to the attention function, while a graph is traced.

    What `Handle` is to eager calls. It is no tensor: only the attention function ``"kvarn"`` can read it.

    Args:
        cache: the cache's handle.
        layer: index among the KVarN layers.
        k: new keys, [batch, kv_heads, columns, head_dim].
        v: new values, like k.
    """

    def __init__(self, cache: Tensor, layer: int, k: Tensor, v: Tensor) -> None:
        self.cache = cache
        self.layer = layer
        self.k = k
        self.v = v

    def attend(self, query: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
        """Append and attend at run time; see `static_ops.attend`."""
        return static_ops.attend(self.cache, self.layer, query, self.k, self.v, mask, scoring)


class KVarNStaticLayer(KVarNLayer):  # type: ignore[no-untyped-call]
    """One layer of a `KVarNStaticCache`.

    What a graph would have to be compiled anew for (lengths, rows, the pool) is looked up when it runs.

    Args:
        rows: the rows of the cache.
        index: which of the KVarN layers this is.
        reads_handles: whether the model's attention function is ``"kvarn"`` right now.
    """

    is_compileable = True

    def __init__(self, rows: Rows, index: int, reads_handles: Callable[[], bool]) -> None:
        super().__init__(rows, index, reads_handles)
        # The cache writes its serial here; one tensor for all layers.
        self.cache = torch.zeros(1, dtype=torch.int64)
        self._columns_device = torch.device("cpu")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shape from [batch, kv_heads, any, head_dim] tensors."""
        super().lazy_initialization(key_states, value_states)
        self._columns_device = key_states.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Any:
        """Bring new keys and values, as `KVarNLayer.update`; while a graph is traced, for ``"kvarn"`` only.

        Raises:
            TensorError: the tensors require grad; and as `KVarNLayer.update`, when a graph runs too.
        """
        if not torch.compiler.is_compiling():
            return super().update(key_states, value_states)
        if key_states.requires_grad or value_states.requires_grad:
            raise TensorError(
                "keys or values require grad: expected inference; call the compiled model in torch.no_grad()"
            )
        chunk = TracedChunk(self.cache, self.index, key_states, value_states)
        return chunk, chunk

    def get_seq_length(self) -> Any:
        """Return the columns of finished forward passes: an int, or int64 [] while a graph is traced."""
        if torch.compiler.is_compiling():
            return static_ops.columns(self.cache, self._columns_device)
        return super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> Any:
        """Return the mask's key columns for query_length new ones, and the first of them.

        Under ``"kvarn"`` max_tokens and None, by which the mask function knows that a mask is of this cache.

        Raises:
            UnsupportedError: a graph is traced under another attention function.
        """
        if self._reads_handles():
            return self.rows.settings.max_tokens, None
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                "KVarNStaticCache in a compiled model: expected the attention implementation 'kvarn'; call "
                "model.set_attn_implementation('kvarn')"
            )
        return super().get_mask_sizes(query_length)
