import numpy as np
import pytest
from kvarn.reference import Counts, decode, encode, layout
from kvarn.reference.settings import BITS

G, D = 64, 48


def constant_channels(rng):
    return np.broadcast_to(rng.standard_normal(D) * 3, (G, D))


def constant_tokens(rng):
    return np.broadcast_to((rng.standard_normal(G) * 3)[:, None], (G, D))


def one_huge_token(rng):
    x = rng.standard_normal((G, D))
    x[17] *= 5e4 / np.abs(x[17]).max()
    return x


def one_outlier_channel(rng):
    x = rng.standard_normal((G, D))
    x[:, 5] += 3e4
    return x


def alternating(_):
    return np.where((np.arange(G)[:, None] + np.arange(D)) % 2, 1.0, -1.0)


def one_element(_):
    x = np.zeros((G, D))
    x[3, 7] = 2.5
    return x


def mixed_magnitudes(rng):
    return rng.standard_normal((G, D)) * 10.0 ** rng.integers(-30, 30, (G, D))


TILES = {
    "zeros": lambda rng: np.zeros((G, D)),
    "minus zeros": lambda rng: np.full((G, D), -0.0),
    "constant": lambda rng: np.full((G, D), 3.7),
    "negative constant": lambda rng: np.full((G, D), -300.0),
    "constant channels": constant_channels,
    "constant tokens": constant_tokens,
    "one huge token": one_huge_token,
    "one outlier channel": one_outlier_channel,
    "alternating": alternating,
    "one element": one_element,
    "beyond half": lambda rng: rng.standard_normal((G, D)) * 1e6,
    "far beyond half": lambda rng: rng.standard_normal((G, D)) * 1e30,
    "largest float32": lambda rng: np.full((G, D), np.finfo(np.float32).max),
    "1e-5": lambda rng: rng.standard_normal((G, D)) * 1e-5,
    "1e-30": lambda rng: rng.standard_normal((G, D)) * 1e-30,
    "subnormal": lambda rng: rng.standard_normal((G, D)) * 1e-42,
    "mixed magnitudes": mixed_magnitudes,
    "nan": lambda rng: np.full((G, D), np.nan),
    "inf": lambda rng: np.where(rng.random((G, D)) < 0.5, np.inf, -np.inf),
}


@pytest.mark.parametrize("slot_type", ["float16", "float32"])
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", TILES)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_tile_encodes_to_finite_numbers(name, rotated, refit, slot_type, settings, rng):
    tile = TILES[name](rng).astype(np.float32)[None]
    for bits in BITS:
        cfg = settings(key_bits=bits, value_bits=bits, group=G, head_dim=D, refit=refit)
        record = encode(tile, tile, cfg, rotated, slot_type=slot_type)
        for one in layout.read(record, cfg):
            assert all(np.isfinite(x).all() for x in (one.row_scale, one.row_zero, one.column_scale))
            assert (one.row_scale >= 0).all()
            assert (one.column_scale >= 0).all()
        for x in decode(record, cfg, rotated):
            assert np.isfinite(x).all()


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", ["zeros", "minus zeros", "nan", "inf"])
def test_zero_tiles_decode_to_zero(name, refit, settings, rng):
    cfg = settings(group=G, head_dim=D, refit=refit)
    tile = TILES[name](rng).astype(np.float32)[None]
    for x in decode(encode(tile, tile, cfg), cfg):
        assert not x.any()


@pytest.mark.parametrize(
    ("name", "bits", "bound"),
    [
        ("constant", 4, 1e-3),
        ("negative constant", 4, 1e-3),
        ("constant channels", 8, 8e-3),
        ("constant tokens", 8, 8e-3),
        ("one outlier channel", 8, 2e-3),
        ("one huge token", 8, 8e-3),
        ("beyond half", 8, 8e-3),
    ],
)
@pytest.mark.parametrize("refit", [False, True])
def test_hostile_tiles_keep_their_values(name, bits, bound, refit, settings, rng):
    cfg = settings(key_bits=bits, value_bits=bits, group=G, head_dim=D, refit=refit)
    tile = TILES[name](rng).astype(np.float32)[None]
    for x in decode(encode(tile, tile, cfg, rotated=True), cfg, rotated=True):
        error = np.linalg.norm(x - tile) / np.linalg.norm(tile)
        assert error <= bound


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("name", "side"), [("constant channels", 0), ("constant tokens", 1)])
def test_constant_rows_are_kept_by_their_offsets(name, side, refit, settings, rng):
    # A row of K is a channel, a row of V a token: where it is constant, only half rounding is lost.
    cfg = settings(key_bits=2, value_bits=2, group=G, head_dim=D, refit=refit)
    tile = TILES[name](rng).astype(np.float32)[None]
    x = decode(encode(tile, tile, cfg, rotated=True), cfg, rotated=True)[side]
    np.testing.assert_allclose(x, tile, rtol=1.5e-3)


def test_counts_of_nonfinite_elements(settings, rng):
    cfg = settings(group=G, head_dim=D)
    k, v = rng.standard_normal((2, 3, G, D)).astype(np.float32)
    clean = encode(k, v, cfg)
    k[1, 5, 7] = np.nan
    k[1, 6, :2] = np.inf, -np.inf
    v[2, 0, 0] = np.nan
    counts = Counts()
    record = encode(k, v, cfg, counts=counts)
    assert counts == Counts(nonfinite=4, saturated=0)
    np.testing.assert_array_equal(record[0], clean[0])
    start = layout.offsets_of(cfg).value_codes
    assert (record[1, :start] != clean[1, :start]).any()
    np.testing.assert_array_equal(record[1, start:], clean[1, start:])
    np.testing.assert_array_equal(record[2, :start], clean[2, :start])
    k[~np.isfinite(k)] = 0
    v[~np.isfinite(v)] = 0
    np.testing.assert_array_equal(record, encode(k, v, cfg))


def test_counts_of_saturated_elements(settings):
    cfg = settings(group=G, head_dim=D)
    k = np.zeros((1, G, D), np.float32)
    k[0, 3, 4], k[0, 3, 5], k[0, 3, 6] = 65504.0, 65504.1, -1e6
    counts = Counts()
    encode(k, k * 0, cfg, rotated=True, slot_type="float16", counts=counts)
    assert counts == Counts(nonfinite=0, saturated=2)  # 65504.1 is beyond the range in float32
    counts = Counts()
    encode(k, k * 0, cfg, rotated=True, slot_type="float32", counts=counts)
    assert counts == Counts()


def test_counts_of_input_beyond_the_codec(settings):
    cfg = settings(group=G, head_dim=D)
    k = np.zeros((1, G, D), np.float32)
    k[0, 0, 0] = 2.0**48
    k[0, 1, 0] = 2.0**49
    counts = Counts()
    encode(k, k * 0, cfg, rotated=True, slot_type="float32", counts=counts)
    assert counts.nonfinite == 0
    assert counts.saturated >= 1


def test_half_input_is_rounded_to_half_after_the_rotation(settings, rng):
    cfg = settings(group=G, head_dim=D)
    k, v = rng.standard_normal((2, 2, G, D)).astype(np.float16)
    half = encode(k, v, cfg)
    np.testing.assert_array_equal(
        half, encode(k.astype(np.float32), v.astype(np.float32), cfg, slot_type="float16")
    )
    assert (half != encode(k.astype(np.float32), v.astype(np.float32), cfg)).any()


@pytest.mark.parametrize("shape", [(2, 64, 48), (128, 128), (1, 128, 64)])
def test_wrong_shapes_are_refused(shape, settings):
    x = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"k \[.*\]: expected \[tiles, 128, 128\]"):
        encode(x, x, settings())
