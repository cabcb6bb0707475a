"""Keys of tiles, for sequences of a pool that begin with the same tokens."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from kvarn.errors import DTypeError, ShapeError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["prefix_keys"]

KEY_BYTES = 16


def prefix_keys(
    token_ids: Sequence[int] | NDArray[Any] | torch.Tensor,
    group: int,
    salt: bytes = b"",
    parent: bytes | None = None,
) -> list[bytes]:
    """A key for each whole tile of a prompt, for `Pool.publish` and ``Pool.create(prefix=…)``.

    The key of a tile is a digest (BLAKE2b, RFC 7693, 16 bytes) of the key of the tile before it, `salt` and
    the tile's tokens, so equal keys mean equal tokens from the start on. It is the same in every process.

    Args:
        token_ids: Token ids [tokens], integers of up to 64 bits. Those behind the last whole tile have no
            key.
        group: Tokens of a tile, ``cfg.group``.
        salt: What else the cached K and V depend on: the model and its adapter, an image at these tokens, or
            who may share them. Any length.
        parent: Key of the tile before `token_ids`, to go on with a prompt. None: they are its beginning.

    Raises:
        ShapeError: `token_ids` is not one-dimensional, `group` is below 1, or `parent` has not 16 bytes.
        DTypeError: Token ids that are no integers, or not bytes where bytes are expected.
    """
    group = operator.index(group)
    if group < 1:
        raise ShapeError(f"group {group}: expected 1 or more; pass cfg.group")
    for name, value in (("salt", salt), ("parent", b"" if parent is None else parent)):
        if not isinstance(value, bytes):
            kind = type(value).__name__
            raise DTypeError(f"{name} of type {kind}: expected bytes; encode it first")
    if parent is not None and len(parent) != KEY_BYTES:
        raise ShapeError(
            f"parent of {len(parent)} bytes: expected {KEY_BYTES}; pass a key that was made here"
        )
    tokens = _tokens(token_ids)
    # The length of the salt keeps it apart from the tokens that follow.
    salted = blake2b(len(salt).to_bytes(8, "little") + salt, digest_size=KEY_BYTES, person=b"kvarn prefix")
    key = bytes(KEY_BYTES) if parent is None else parent
    keys = []
    for first in range(0, len(tokens) - group + 1, group):
        digest = salted.copy()
        digest.update(key)
        digest.update(tokens[first : first + group].tobytes())
        key = digest.digest()
        keys.append(key)
    return keys


def _tokens(token_ids: Any) -> NDArray[np.int64]:
    """Token ids as little-endian int64, whatever they came in."""
    if hasattr(token_ids, "detach"):  # a torch tensor, on any device
        token_ids = token_ids.detach().cpu()
    array = np.asarray(token_ids)
    if array.ndim != 1:
        raise ShapeError(
            f"token_ids of shape {list(array.shape)}: expected [tokens]; pass one prompt at a time"
        )
    if array.size == 0:
        array = array.astype(np.int64)
    wide = array.dtype == np.uint64 and array.size > 0 and int(array.max()) > np.iinfo(np.int64).max
    if array.dtype.kind not in "iu" or wide:
        raise DTypeError(
            f"token_ids of dtype {array.dtype}: expected integers of up to 64 bits; convert them"
        )
    return array.astype("<i8")
