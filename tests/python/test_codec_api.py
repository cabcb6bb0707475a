"""encode, decode, published order, saved records: NumPy and torch in, the same kind out, the same bytes."""

import threading
import time

import kvarn
import numpy as np
import pytest
import torch
from kvarn import Config

GRID = 64  # values on a grid of 1/64 within ±2 are the same in float16, bfloat16 and float32


def tiles(cfg, count=3, seed=0, dtype=np.float16):
    rng = np.random.default_rng(seed)
    shape = (2, count, cfg.group, cfg.head_dim)
    k, v = (rng.integers(-2 * GRID, 2 * GRID, shape) / GRID).astype(dtype)
    return k, v


def hadamard(head_dim):
    """The orthonormal Sylvester matrix of a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < head_dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(head_dim)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.008), (4, 0.11), (3, 0.22), (2, 0.45)])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
def test_round_trip(bits, error, group, head_dim):
    cfg = Config(head_dim=head_dim, key_bits=bits, value_bits=bits, group=group)
    k, v = tiles(cfg)
    rec = kvarn.encode(k, v, cfg)
    assert (rec.shape, rec.dtype, type(rec)) == ((3, cfg.record_bytes), np.uint8, np.ndarray)
    for decoded, given in zip(kvarn.decode(rec, cfg), (k, v), strict=True):
        assert (decoded.shape, decoded.dtype) == (given.shape, np.float32)
        assert 0 < relative(decoded, given) < error


def test_numpy_and_torch_of_every_type_give_the_same_records():
    cfg = Config("kvarn_k4v2_g64", head_dim=64)
    k, v = tiles(cfg)
    rec = kvarn.encode(k, v, cfg)
    assert rec.flags.writeable
    for dtype in (torch.float16, torch.bfloat16):
        tensors = torch.from_numpy(k).to(dtype), torch.from_numpy(v).to(dtype)
        same = kvarn.encode(*tensors, cfg)
        assert isinstance(same, torch.Tensor)
        assert same.dtype == torch.uint8
        assert np.array_equal(same.numpy(), rec)
    single = kvarn.encode(k.astype(np.float32), v.astype(np.float32), cfg)
    single_torch = kvarn.encode(torch.from_numpy(k).float(), torch.from_numpy(v).float(), cfg)
    assert np.array_equal(single_torch.numpy(), single)
    decoded = kvarn.decode(torch.from_numpy(rec), cfg)
    for tensor, array in zip(decoded, kvarn.decode(rec, cfg), strict=True):
        assert isinstance(tensor, torch.Tensor)
        assert np.array_equal(tensor.numpy(), array)


def test_float32_is_not_rounded_to_half_first():
    cfg = Config("kvarn_k8v8_g64", head_dim=64)
    k, v = tiles(cfg, dtype=np.float32)
    k *= 1e5  # beyond half
    k2, v2 = kvarn.decode(kvarn.encode(k, v, cfg), cfg)
    assert relative(k2, k) < 0.006
    assert relative(v2, v) < 0.006


def test_a_tile_does_not_depend_on_its_neighbours_or_strides():
    cfg = Config("kvarn_k3v4_g64", head_dim=32)
    k, v = tiles(cfg, 4)
    rec = kvarn.encode(k, v, cfg)
    assert np.array_equal(kvarn.encode(k[2:3], v[2:3], cfg), rec[2:3])
    assert np.array_equal(kvarn.encode(k[::-1], v[::-1], cfg), rec[::-1])
    spread = np.zeros((4, 128, 48), np.float16)
    spread[:, ::2, 8:40] = k
    assert np.array_equal(kvarn.encode(spread[:, ::2, 8:40], v, cfg), rec)
    tensor = torch.from_numpy(spread)[:, ::2, 8:40]
    assert np.array_equal(kvarn.encode(tensor, torch.from_numpy(v), cfg).numpy(), rec)
    k.setflags(write=False)
    assert np.array_equal(kvarn.encode(k, v, cfg), rec)


def test_no_tiles():
    cfg = Config("kvarn", head_dim=16)
    empty = np.zeros((0, 128, 16), np.float16)
    rec = kvarn.encode(empty, empty, cfg)
    assert rec.shape == (0, cfg.record_bytes)
    k, v = kvarn.decode(rec, cfg)
    assert k.shape == v.shape == (0, 128, 16)
    assert kvarn.to_published(rec, cfg).shape == (0, cfg.published_bytes)
    assert kvarn.encode(torch.from_numpy(empty), torch.from_numpy(empty), cfg).shape == (0, cfg.record_bytes)


def test_the_rotated_frame():
    cfg = Config("kvarn_k4v4_g64", head_dim=64)
    k, v = tiles(cfg, dtype=np.float32)
    h = hadamard(64)
    rec = kvarn.encode(k, v, cfg)
    k_rotated, v_rotated = kvarn.decode(rec, cfg, rotated=True)
    k_plain, v_plain = kvarn.decode(rec, cfg)
    assert relative(k_rotated @ h, k_plain) < 1e-6
    assert relative(v_rotated @ h, v_plain) < 1e-6
    again = kvarn.encode((k @ h).astype(np.float32), (v @ h).astype(np.float32), cfg, rotated=True)
    assert relative(kvarn.decode(again, cfg)[0], k_plain) < 2e-3


def test_non_finite_elements_are_zeros_and_counted():
    cfg = Config("kvarn_k4v4_g64", head_dim=32)
    k, v = tiles(cfg)
    clean = k.copy()
    clean[1, 5, 7] = clean[1, 60, 31] = 0
    k[1, 5, 7], k[1, 60, 31] = np.nan, -np.inf
    rec, counts = kvarn.encode(k, v, cfg, return_counts=True)
    assert counts == (2, 0)
    assert np.array_equal(rec, kvarn.encode(clean, v, cfg))


@pytest.mark.parametrize("name", ["kvarn_k4v2_g128", "kvarn_k8v8_g64", "kvarn_k2v4_g128"])
def test_published_order(name):
    cfg = Config(name, head_dim=48)
    k, v = tiles(cfg)
    rec = kvarn.encode(k, v, cfg)
    pub = kvarn.to_published(rec, cfg)
    assert (pub.shape, pub.dtype) == ((3, cfg.published_bytes), np.uint8)
    assert np.array_equal(kvarn.from_published(pub, cfg), rec)
    tensor = kvarn.from_published(kvarn.to_published(torch.from_numpy(rec), cfg), cfg)
    assert np.array_equal(tensor.numpy(), rec)


def test_published_order_is_rows_of_codes():
    cfg = Config("kvarn_k4v2_g64", head_dim=32)
    k, v = tiles(cfg, 1, dtype=np.float32)
    pub = kvarn.to_published(kvarn.encode(k, v, cfg), cfg)[0]
    codes, rest = pub[: 32 * 32].reshape(32, 32), pub[32 * 32 :]
    q = np.stack([codes & 15, codes >> 4], axis=-1).reshape(32, 64).astype(np.float64)
    s_chan, z_chan, s_tok = np.split(rest[: 2 * 128].view(np.float16).astype(np.float64), [32, 64])
    k_rotated = ((q * s_chan[:, None] + z_chan[:, None]) * s_tok).T
    assert relative(k_rotated, kvarn.decode(kvarn.encode(k, v, cfg), cfg, rotated=True)[0][0]) < 1e-6


def test_saturating_published_parameters_warn():
    cfg = Config("kvarn_k4v4_g64", head_dim=16)
    k, v = tiles(cfg, 1)
    pub = kvarn.to_published(kvarn.encode(k, v, cfg), cfg)
    s_tok = slice(16 * 32 + 4 * 16, 16 * 32 + 4 * 16 + 2 * 64)
    pub[0, s_tok] = np.full(64, np.inf, np.float16).view(np.uint8)
    with pytest.warns(RuntimeWarning, match="beyond half range"):
        kvarn.from_published(pub, cfg)


def test_save_and_load(tmp_path):
    cfg = Config("kvarn_k3v2_g64", head_dim=80, refit=False, iterations=5, sink_tokens=32, recent_tokens=9)
    k, v = tiles(cfg)
    rec = kvarn.encode(k, v, cfg)
    path = tmp_path / "tiles.kvarn"
    kvarn.save_records(path, rec, cfg)
    back, config = kvarn.load_records(path)
    assert config == cfg
    assert back.dtype == np.uint8
    assert back.flags.writeable
    assert np.array_equal(back, rec)
    assert path.stat().st_size == 72 + rec.size
    kvarn.save_records(str(path), torch.from_numpy(rec[:1].copy()), cfg)  # replaces the file
    assert np.array_equal(kvarn.load_records(str(path))[0], rec[:1])
    kvarn.save_records(path, rec[:0], cfg)
    assert kvarn.load_records(path)[0].shape == (0, cfg.record_bytes)
    assert [file.name for file in tmp_path.iterdir()] == ["tiles.kvarn"]


def test_other_threads_run_while_encoding():
    cfg = Config("kvarn_k4v2_g128", head_dim=128)
    k, v = tiles(cfg, 200)
    started, spent = threading.Event(), []

    def work():
        started.set()
        begin = time.perf_counter()
        kvarn.encode(k, v, cfg)
        spent.append(time.perf_counter() - begin)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    longest, last = 0.0, time.perf_counter()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    # Holding the interpreter would stop this thread for as long as encoding takes.
    assert longest < spent[0] / 2
