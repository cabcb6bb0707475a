"""The cache layer that transformers talks to: one KVarN layer of a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvarn import DTypeError, ShapeError, TensorError
from kvarn.integrations.transformers.chunk import Chunk
from kvarn.integrations.transformers.errors import UnsupportedError
from kvarn.integrations.transformers.handle import Handle
from kvarn.integrations.transformers.rows import Rows

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class KVarNLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One full-attention layer of a `KVarNCache`; the tokens are in the rows that all its layers share.

    Args:
        rows: the rows of the cache.
        index: which of the KVarN layers this is.
        reads_handles: whether the model's attention function is ``"kvarn"`` right now.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, rows: Rows, index: int, reads_handles: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.index = index
        self._number = rows.numbers[index]
        self._reads_handles = reads_handles

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shape from [batch, kv_heads, any, head_dim] tensors."""
        self._check(key_states, value_states)
        self.rows.open(self.index, key_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Bring new keys and values, [batch, kv_heads, columns, head_dim] in float16, bfloat16 or float32.

        Returns:
            Keys and values of past and new columns: handles for the attention function ``"kvarn"``, dense
            tensors for any other.

        Raises:
            ShapeError: shape or batch differ from what the cache holds.
            DTypeError: the dtype is none of the three, or is not the first one's.
            CapacityError: more than max_tokens columns.
            TensorError: the tensors require grad.
        """
        chunk = self.enter(key_states, value_states)
        if not self._reads_handles():
            return chunk.dense()
        total = self.rows.columns + key_states.shape[2]
        return Handle(chunk, total, values=False), Handle(chunk, total, values=True)

    def enter(self, key_states: Tensor, value_states: Tensor) -> Chunk:
        """Check new keys and values, and enter them into the open forward pass; raises as `update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        else:
            self._check(key_states, value_states)
        batch, _, columns, _ = key_states.shape
        if batch != len(self.rows.sequences):
            raise ShapeError(
                f"batch {batch}: expected {len(self.rows.sequences)}, the rows that the cache holds; call "
                "reset() first"
            )
        return Chunk(self.index, key_states, value_states, self.rows.begin(self.index, columns))

    def _check(self, k: Tensor, v: Tensor) -> None:
        if k.ndim != 4 or k.shape != v.shape:
            raise ShapeError(
                f"layer {self._number}: keys {list(k.shape)} and values {list(v.shape)}: expected the same "
                "shape [batch, kv_heads, tokens, head_dim]; models with unequal head dims need another cache"
            )
        expected = self.dtype if self.is_initialized else k.dtype
        if k.dtype not in _DTYPES or k.dtype != expected or v.dtype != expected:
            raise DTypeError(
                f"layer {self._number}: keys {k.dtype} and values {v.dtype}: expected both float16, bfloat16 "
                "or float32, and the same as at first; load the model in one of them, or call reset() after "
                "changing it"
            )
        if k.requires_grad or v.requires_grad:
            raise TensorError(
                f"layer {self._number}: keys or values require grad: expected inference; call the model in "
                "torch.no_grad()"
            )

    def get_seq_length(self) -> int:
        """Return the columns of finished forward passes, padding included."""
        self.rows.settle()
        return self.rows.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the mask's key columns for query_length new ones, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return the most columns that the cache takes."""
        return self.rows.settings.max_tokens

    def reset(self) -> None:
        """Forget all rows, in every KVarN layer, and give the pool back."""
        self.rows.close()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: the layers share their rows, see `KVarNCache.crop`."""
        self._refuse("crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse: the layers share their rows, see `KVarNCache.reorder_cache`."""
        self._refuse("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: the layers share their rows, see `KVarNCache.batch_repeat_interleave`."""
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: the layers share their rows, see `KVarNCache.batch_select_indices`."""
        self._refuse("batch_select_indices")

    def offload(self) -> None:
        """Refuse: the layers share their rows."""
        self._refuse("offload")

    def prefetch(self) -> None:
        """Refuse: the layers share their rows."""
        self._refuse("prefetch")

    def _refuse(self, operation: str) -> Any:
        raise UnsupportedError(
            f"{operation} of layer {self._number} alone: expected all layers at once, as they share their "
            "rows; call it on the KVarNCache"
        )
