"""Keys of tiles: the same for the same tokens in every process, and for nothing else."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from kvarn import DTypeError, ShapeError, prefix_keys

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def digest(parent, salt, tokens):
    message = struct.pack("<Q", len(salt)) + salt + parent + struct.pack(f"<{len(tokens)}q", *tokens)
    return hashlib.blake2b(message, digest_size=16, person=b"kvarn prefix").digest()


@pytest.mark.parametrize("salt", [b"", b"adapter", bytes(300)])
def test_each_key_is_a_digest_of_the_key_before_salt_and_tokens(salt):
    first = digest(bytes(16), salt, TOKENS[:4])
    second = digest(first, salt, TOKENS[4:8])
    assert prefix_keys(TOKENS, 4, salt) == [first, second]
    assert prefix_keys(TOKENS[4:], 4, salt, parent=first) == [second]


def test_keys_are_what_they_were_in_earlier_releases():
    keys = [key.hex() for key in prefix_keys(TOKENS, 4)]
    assert keys == ["6eed00d25ee67a16a10e06bb623a4832", "aa1b19ae78a11ceb963b03f707729c51"]


@pytest.mark.parametrize(
    "tokens",
    [
        tuple(TOKENS),
        np.array(TOKENS, "u1"),
        np.array(TOKENS, ">i4"),
        np.array(TOKENS, np.uint64),
        np.repeat(TOKENS, 2)[::2],
        torch.tensor(TOKENS),
        torch.tensor(TOKENS, dtype=torch.int32),
    ],
)
def test_keys_do_not_depend_on_what_holds_the_tokens(tokens):
    assert prefix_keys(tokens, 4) == prefix_keys(TOKENS, 4)


def test_only_whole_tiles_have_keys():
    for count in range(len(TOKENS)):
        assert prefix_keys(TOKENS[:count], 4) == prefix_keys(TOKENS, 4)[: count // 4]
    assert prefix_keys(np.zeros(0, np.int64), 128) == []


def test_whatever_differs_gives_other_keys():
    different = [
        prefix_keys([1, 2, 3, 4], 2),
        prefix_keys([1, 2, 3, 4], 2, b"a"),
        prefix_keys([1, 2, 3, 4], 2, b"b"),
        prefix_keys([2, 1, 3, 4], 2),  # the second tile's tokens are the same, those before it are not
        prefix_keys([-1, 2, 3, 4], 2),
        prefix_keys([1, 2, 3, 4], 2, parent=bytes(15) + b"\1"),
        prefix_keys([1, 2, 3, 4, 5, 6, 7, 8], 4),
        prefix_keys([1, 2, 1, 2], 2, b"c"),  # equal tiles one after the other
    ]
    keys = [key for keys in different for key in keys]
    assert len(set(keys)) == len(keys)
    # A salt is not taken for the tokens that follow it.
    assert prefix_keys([1], 1, struct.pack("<q", 2)) != prefix_keys([2, 1], 2)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1, 2], 0), ShapeError, "group 0: expected 1 or more"),
        (([1, 2], -4), ShapeError, "group -4: expected 1 or more"),
        (([[1, 2]], 2), ShapeError, r"token_ids of shape \[1, 2\]: expected \[tokens\]"),
        ((5, 2), ShapeError, r"token_ids of shape \[\]: expected \[tokens\]"),
        (([1.5, 2], 2), DTypeError, "token_ids of dtype float64: expected integers"),
        (([True, False], 2), DTypeError, "token_ids of dtype bool: expected integers"),
        ((["a", "b"], 2), DTypeError, "token_ids of dtype <U1: expected integers"),
        (([2**80, 1], 2), DTypeError, "token_ids of dtype object: expected integers"),
        ((np.array([2**63], np.uint64), 1), DTypeError, "expected integers of up to 64 bits"),
        ((torch.zeros(4), 2), DTypeError, "token_ids of dtype float32: expected integers"),
        (([1, 2], 2, "salt"), DTypeError, "salt of type str: expected bytes"),
        (([1, 2], 2, 5), DTypeError, "salt of type int: expected bytes"),
        (([1, 2], 2, b"", "parent"), DTypeError, "parent of type str: expected bytes"),
        (([1, 2], 2, b"", b"short"), ShapeError, "parent of 5 bytes: expected 16"),
        (([1, 2], 2, b"", b""), ShapeError, "parent of 0 bytes: expected 16"),
    ],
)
def test_bad_input_is_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        prefix_keys(*arguments)
