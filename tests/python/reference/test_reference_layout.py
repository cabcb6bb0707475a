import numpy as np
import pytest
from kvarn.reference import layout
from kvarn.reference.matrix import Matrix
from kvarn.reference.settings import BITS, GROUPS, HEAD_DIMS


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("side", ["key", "value"])
def test_codes_fill_their_section_without_gaps(side, bits):
    for group in GROUPS:
        for head_dim in HEAD_DIMS:
            places = layout.code_bits(side, bits, group, head_dim)
            assert places.shape == (group, head_dim, bits)
            uses = np.bincount(places.ravel(), minlength=group * head_dim * bits)
            assert uses.size == group * head_dim * bits, (group, head_dim)
            assert (uses == 1).all(), (group, head_dim)


def place_of(side, bits, head_dim, group, t, d):
    """Byte and bit of the lowest bit of one contiguous code, written out one code at a time."""
    f = (t // 16) * (head_dim // 16) + d // 16
    row, k = (t % 16, d % 16) if side == "key" else (d % 16, t % 16)
    lane = 4 * (row % 8) + (k % 8) // 2
    rr, kh, e = row // 8, k // 8, k % 2
    h, u = (kh, rr) if side == "key" else (rr, kh)
    word, bit = {
        4: (f, 8 * u + 4 * h),
        2: (f // 2, 8 * u + 4 * (f % 2) + 2 * h),
        8: (2 * f + h, 8 * u),
    }[bits]
    bit += 16 * e
    words = group * head_dim * bits // 1024
    quads = 4 * (words // 4)
    if word < quads:
        byte = word // 4 * 512 + 16 * lane + 4 * (word % 4)
    else:
        byte = 128 * quads + 4 * (words - quads) * lane + 4 * (word - quads)
    return byte + bit // 8, bit % 8


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(("group", "head_dim"), [(64, 16), (128, 80), (128, 128)])
def test_pack_puts_each_code_where_the_formula_says(side, bits, group, head_dim, rng):
    codes = rng.integers(0, 2**bits, (group, head_dim)).astype(np.uint8)
    data = layout.pack(codes[None], side, bits)[0]
    for t in range(0, group, 3):
        for d in range(head_dim):
            byte, bit = place_of(side, bits, head_dim, group, t, d)
            assert data[byte] >> bit & (2**bits - 1) == codes[t, d], (t, d)


def test_three_bit_places_by_hand():
    # D 64: fragments 0 … 3 of the first 16 tokens share words 0, 1, 2 of a lane; word w of lane 0 is at 4·w.
    places = layout.code_bits("key", 3, 128, 64)
    assert places[0, 0].tolist() == [3, 4, 5]  # f 0, lane 0, (h, u) = (0, 0): word 0, bits 3 …
    assert places[8, 0].tolist() == [9, 10, 11]  # u = 1
    assert places[0, 8].tolist() == [6, 7, 8]  # h = 1: crosses a byte
    assert places[0, 1].tolist() == [19, 20, 21]  # e = 1
    assert places[0, 16].tolist() == [35, 36, 37]  # f 1: word 1
    assert places[0, 48].tolist() == [0, 1, 2]  # f 3, (0, 0): word 0
    assert places[8, 48].tolist() == [32, 33, 34]  # (0, 1): word 1
    assert places[0, 56].tolist() == [64, 65, 66]  # (1, 0): word 2
    assert places[8, 56].tolist() == [15, 47, 79]  # (1, 1): bit 15 of words 0, 1, 2
    assert places[8, 57].tolist() == [31, 63, 95]
    value = layout.code_bits("value", 3, 128, 64)
    assert value[8, 0].tolist() == [9, 10, 11]  # V: the token half is u …
    assert value[0, 8].tolist() == [6, 7, 8]  # … and the channel half is h
    assert value[1, 0].tolist() == [19, 20, 21]  # neighbouring tokens are a pair


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(("group", "head_dim"), [(64, 16), (64, 48), (128, 112), (128, 256)])
def test_unpack_inverts_pack(side, bits, group, head_dim, rng):
    codes = rng.integers(0, 2**bits, (3, group, head_dim)).astype(np.uint8)
    data = layout.pack(codes, side, bits)
    assert data.shape == (3, group * head_dim * bits // 8)
    np.testing.assert_array_equal(layout.unpack(data, side, bits, group, head_dim), codes)


@pytest.mark.parametrize("order", [layout.row_order, layout.k_order])
@pytest.mark.parametrize("n", sorted({*HEAD_DIMS, *GROUPS}))
def test_parameter_orders_are_bijections(order, n):
    np.testing.assert_array_equal(np.sort(order(n)), 2 * np.arange(n))


def test_parameter_orders_by_hand():
    # n = 128: 8 parameters 16 apart lie together.
    assert layout.row_order(128)[[0, 1, 7, 8, 9, 16]].tolist() == [0, 32, 224, 2, 34, 4]
    assert layout.k_order(128)[[0, 1, 2, 8, 9, 16]].tolist() == [0, 2, 64, 4, 6, 8]


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "head_dim", "end", "padded"),
    [
        (4, 4, 128, 17920, 17920),
        (4, 2, 128, 13824, 13824),
        (3, 3, 128, 13824, 13824),
        (2, 2, 128, 9728, 9728),
        (3, 3, 96, 10560, 10624),
    ],
)
def test_record_sizes(key_bits, value_bits, head_dim, end, padded):
    at = layout.offsets(key_bits, value_bits, 128, head_dim)
    assert (at.end, at.padded_end) == (end, padded)


def test_bits_per_element_are_those_of_the_presets():
    for bits, expected in (((4, 4), 4.375), ((4, 2), 3.375), ((3, 3), 3.375), ((2, 2), 2.375)):
        assert layout.offsets(*bits, 128, 128).padded_end * 8 / (2 * 128 * 128) == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((5, 2, 128, 128), "5 bits: expected 2, 3, 4 or 8"),
        ((4, 2, 32, 128), "group 32: expected 64 or 128"),
        ((4, 2, 128, 100), "head_dim 100: expected a multiple of 16 from 16 to 256"),
        ((4, 2, 128, 272), "head_dim 272"),
    ],
)
def test_a_record_that_does_not_exist_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        layout.offsets(*arguments)


def random_matrix(rng, rows, columns, bits, tiles):
    def halves(n):
        return rng.standard_normal((tiles, n)).astype(np.float16)

    codes = rng.integers(0, 2**bits, (tiles, rows, columns)).astype(np.uint8)
    return Matrix(codes, halves(rows), halves(rows), halves(columns))


@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 2), (3, 8), (2, 3), (8, 4)])
@pytest.mark.parametrize(("group", "head_dim"), [(128, 128), (64, 48), (128, 16)])
def test_read_inverts_write(key_bits, value_bits, group, head_dim, settings, rng):
    cfg = settings(key_bits=key_bits, value_bits=value_bits, group=group, head_dim=head_dim)
    key = random_matrix(rng, head_dim, group, key_bits, 3)
    value = random_matrix(rng, group, head_dim, value_bits, 3)
    record = layout.write(key, value, cfg)
    assert record.shape == (3, cfg.record_bytes)
    assert not record[:, layout.offsets_of(cfg).end :].any()
    for wrote, got in zip((key, value), layout.read(record, cfg), strict=True):
        for name in ("codes", "row_scale", "row_zero", "column_scale"):
            np.testing.assert_array_equal(getattr(got, name), getattr(wrote, name), err_msg=name)


def test_records_of_another_size_are_refused(settings):
    with pytest.raises(ValueError, match=r"record uint8 \[2, 100\]: expected uint8 \[tiles, 13824\]"):
        layout.read(np.zeros((2, 100), np.uint8), settings())
    with pytest.raises(ValueError, match="record float32"):
        layout.read(np.zeros((2, 13824), np.float32), settings())
