"""kvarn.Config: names, values, sizes, copies; every bad value is named."""

import copy
import pickle

import kvarn
import pytest
from kvarn import Config, ConfigError, FormatError


def test_name_and_bits_make_the_same_configuration():
    by_name = Config("kvarn_k4v2_g128", head_dim=128)
    by_bits = Config(head_dim=128, key_bits=4, value_bits=2, group=128)
    assert (
        by_name == by_bits == Config("kvarn", head_dim=128) == Config(head_dim=128, key_bits=4, value_bits=2)
    )
    assert hash(by_name) == hash(by_bits)
    assert by_name != Config("kvarn_k4v2_g128", head_dim=64)
    assert by_name != "kvarn_k4v2_g128"


def test_defaults():
    cfg = Config("kvarn_k8v4_g64", head_dim=96)
    assert (cfg.name, cfg.head_dim, cfg.key_bits, cfg.value_bits, cfg.group) == (
        "kvarn_k8v4_g64",
        96,
        8,
        4,
        64,
    )
    assert (cfg.refit, cfg.iterations, cfg.sink_tokens, cfg.recent_tokens) == (True, 8, 64, 0)


@pytest.mark.parametrize(
    ("name", "head_dim", "record_bytes"),
    [
        ("kvarn_k4v4_g128", 128, 17_920),
        ("kvarn_k4v2_g128", 128, 13_824),
        ("kvarn_k3v3_g128", 128, 13_824),
        ("kvarn_k2v2_g128", 128, 9_728),
        ("kvarn_k3v3_g128", 96, 10_624),
    ],
)
def test_sizes(name, head_dim, record_bytes):
    cfg = Config(name, head_dim=head_dim)
    assert cfg.record_bytes == record_bytes
    assert cfg.bits_per_element == record_bytes * 8 / (2 * 128 * head_dim)


def test_published_bytes():
    assert Config("kvarn_k4v2_g128", head_dim=128).published_bytes == 128 * 128 * 6 // 8 + 12 * 128
    with pytest.raises(FormatError, match="3-bit keys"):
        _ = Config("kvarn_k3v2_g128", head_dim=128).published_bytes


EVERYTHING = Config(
    "kvarn_k2v8_g64", head_dim=48, refit=False, iterations=3, sink_tokens=16, recent_tokens=100
)


@pytest.mark.parametrize("cfg", [EVERYTHING, Config("kvarn", head_dim=128)])
def test_repr_pickle_and_copies_are_equal(cfg):
    assert eval(repr(cfg), {"Config": Config}) == cfg
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(cfg, protocol)) == cfg
    assert copy.copy(cfg) == copy.deepcopy(cfg) == cfg.replace() == cfg


def test_replace():
    cfg = Config("kvarn", head_dim=128)
    assert cfg.replace(key_bits=8, refit=False) == Config("kvarn_k8v2_g128", head_dim=128, refit=False)
    assert cfg.replace(name="kvarn_k3v3_g64", head_dim=64) == Config("kvarn_k3v3_g64", head_dim=64)
    assert cfg.replace(group=64).sink_tokens == 64  # they cover a whole group, and go on doing so
    assert EVERYTHING.replace(group=128).sink_tokens == 16
    assert EVERYTHING.replace(sink_tokens=None).sink_tokens == 64
    with pytest.raises(ConfigError, match="head_dim 100"):
        cfg.replace(head_dim=100)
    with pytest.raises(TypeError, match="colour"):
        cfg.replace(colour="blue")


def test_immutable():
    cfg = Config("kvarn", head_dim=128)
    with pytest.raises(AttributeError):
        cfg.head_dim = 64


def test_presets_are_names():
    assert "kvarn_k4v2_g128" in kvarn.presets()
    assert [Config(name, head_dim=64).name for name in kvarn.presets()] == kvarn.presets()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "kvarn_k5v2_g128"}, 'config name "kvarn_k5v2_g128": expected'),
        ({"name": "fp8"}, 'config name "fp8": expected'),
        ({"name": ""}, 'config name "": expected'),
        ({"head_dim": 100}, "head_dim 100: expected a multiple of 16 from 16 to 256"),
        ({"head_dim": 0}, "head_dim 0: expected"),
        ({"head_dim": 272}, "head_dim 272: expected"),
        ({"head_dim": -16}, "head_dim -16: expected"),
        ({"sink_tokens": 8}, "sink_tokens 8: expected 0 or a multiple of 16"),
        ({"sink_tokens": 144}, "sink_tokens 144: expected"),
        ({"sink_tokens": -16}, "sink_tokens -16: expected"),
        ({"recent_tokens": 513}, "recent_tokens 513: expected 0 to 512"),
        ({"recent_tokens": -1}, "recent_tokens -1: expected"),
        ({"iterations": 65}, "iterations 65: expected 0 to 64"),
        ({"iterations": -1}, "iterations -1: expected"),
        ({"key_bits": 4}, "expected a name alone, or both bit widths"),
        ({"group": 64}, "expected a name alone, or both bit widths"),
        ({"name": None}, "expected a name alone, or both bit widths"),
        ({"name": None, "key_bits": 4}, "expected a name alone, or both bit widths"),
        ({"name": None, "key_bits": 5, "value_bits": 4}, "key_bits 5: expected 2, 3, 4 or 8"),
        ({"name": None, "key_bits": 4, "value_bits": 0}, "value_bits 0: expected 2, 3, 4 or 8"),
        ({"name": None, "key_bits": -4, "value_bits": 4}, "key_bits -4: expected"),
        ({"name": None, "key_bits": 4, "value_bits": 4, "group": 32}, "group 32: expected 64 or 128"),
    ],
)
def test_bad_values_are_named(changes, text):
    with pytest.raises(ConfigError) as error:
        Config(**{"name": "kvarn", "head_dim": 128, **changes})
    assert text in str(error.value)
    assert isinstance(error.value, kvarn.KvarnError)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("changes", [{"head_dim": "128"}, {"head_dim": 128.0}, {"refit": "yes"}, {"name": 4}])
def test_values_of_the_wrong_kind_are_type_errors(changes):
    with pytest.raises(TypeError):
        Config(**{"name": "kvarn", "head_dim": 128, **changes})
