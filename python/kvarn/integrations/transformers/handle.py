"""The storage-free tensor that carries a cache layer from `update` to the attention function."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from kvarn.integrations.transformers.chunk import Chunk


class Handle(Tensor):
    """Stands for a layer's keys or values, [batch, kv_heads, columns, head_dim], without holding them.

    transformers hands the attention function what `update` returned, never the cache. The function registered
    as ``"kvarn"`` reads `source`; every other operation builds the dense tensor, which the cache counts.
    """

    # Results of operations are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    source: "Chunk"
    is_values: bool

    @staticmethod
    def __new__(cls, chunk: "Chunk", columns: int, *, values: bool) -> "Handle":
        """Make the handle of the keys, or of the values, of a layer that holds `columns` columns."""
        like = chunk.k
        shape = (like.shape[0], like.shape[1], columns, like.shape[3])
        handle: Handle = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        handle.source, handle.is_values = chunk, values
        return handle

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return (
            f"Handle({'values' if self.is_values else 'keys'}, shape={tuple(self.shape)}, dtype={self.dtype})"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run any operation on the dense tensors."""

        def dense(value: Any) -> Any:
            return value.source.dense()[value.is_values] if isinstance(value, cls) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))
