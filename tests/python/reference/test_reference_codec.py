import numpy as np
import pytest
from kvarn.reference import decode, encode, rotate
from kvarn.reference.codec import TILES_PER_PASS
from kvarn.reference.settings import BITS, GROUPS, HEAD_DIMS

# Relative error of uniform rounding of normal values, from a little above what is seen.
ERRORS = {2: 0.56, 3: 0.24, 4: 0.115, 8: 0.0075}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_every_head_dim_is_reconstructed(bits, group, settings, rng):
    for head_dim in HEAD_DIMS:
        channels = np.exp(0.5 * rng.standard_normal(head_dim))
        k, v = (channels * rng.standard_normal((2, 2, group, head_dim))).astype(np.float32)
        errors = {}
        for refit in (False, True):
            cfg = settings(key_bits=bits, value_bits=bits, group=group, head_dim=head_dim, refit=refit)
            record = encode(k, v, cfg)
            assert record.shape == (2, cfg.record_bytes)
            for name, x, x2 in zip("KV", (k, v), decode(record, cfg), strict=True):
                assert x2.dtype == np.float32
                errors[name, refit] = np.linalg.norm(x2 - x) / np.linalg.norm(x)
        assert max(errors.values()) < ERRORS[bits], (head_dim, errors)
        if bits < 8 and head_dim >= 64:
            assert all(errors[name, True] < errors[name, False] for name in "KV"), (head_dim, errors)


@pytest.mark.parametrize("refit", [False, True])
def test_a_record_depends_on_its_tile_only(refit, settings, rng):
    cfg = settings(group=64, head_dim=16, refit=refit)
    k, v = rng.standard_normal((2, TILES_PER_PASS + 3, 64, 16)).astype(np.float16)
    record = encode(k, v, cfg)
    for tile in (0, TILES_PER_PASS - 1, TILES_PER_PASS, TILES_PER_PASS + 2):
        np.testing.assert_array_equal(encode(k[tile : tile + 1], v[tile : tile + 1], cfg)[0], record[tile])
    order = rng.permutation(TILES_PER_PASS + 3)
    np.testing.assert_array_equal(encode(k[order], v[order], cfg), record[order])


def test_key_and_value_do_not_meet(settings, rng):
    a, b, c = rng.standard_normal((3, 1, 128, 128)).astype(np.float32)
    cfg = settings(key_bits=3, value_bits=3)
    np.testing.assert_array_equal(decode(encode(a, b, cfg), cfg)[0], decode(encode(a, c, cfg), cfg)[0])
    np.testing.assert_array_equal(decode(encode(a, b, cfg), cfg)[1], decode(encode(c, b, cfg), cfg)[1])


def test_no_tiles_give_no_records(settings):
    cfg = settings()
    empty = np.zeros((0, 128, 128), np.float32)
    record = encode(empty, empty, cfg)
    assert record.shape == (0, cfg.record_bytes)
    assert decode(record, cfg)[0].shape == (0, 128, 128)


def test_decode_turns_back(settings, rng):
    cfg = settings()
    k, v = rng.standard_normal((2, 2, 128, 128)).astype(np.float32)
    record = encode(k, v, cfg)
    for plain, turned in zip(decode(record, cfg), decode(record, cfg, rotated=True), strict=True):
        np.testing.assert_array_equal(plain, rotate(turned))


def test_rotated_input_is_taken_as_it_is(settings, rng):
    cfg = settings()
    k, v = rng.standard_normal((2, 2, 128, 128)).astype(np.float32)
    np.testing.assert_array_equal(encode(k, v, cfg), encode(rotate(k), rotate(v), cfg, rotated=True))
