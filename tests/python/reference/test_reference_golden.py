import numpy as np
import pytest
from kvarn.reference import contract, decode, encode, from_published, layout, published_bytes, to_published

FILES = ["k4v2_g128_d128", "k4v2_g64_d128", "k4v4_g128_d64"]


@pytest.mark.parametrize("name", FILES)
def test_golden_records_pass_the_contract(name, golden):
    cfg, data = golden(name)
    assert published_bytes(cfg) == data["record"].shape[1]
    records = from_published(data["record"], cfg)
    k, v = data["k_rotated"].astype(np.float32), data["v_rotated"].astype(np.float32)
    verdicts = []
    for tile, record in enumerate(records):
        for side, verdict in zip("KV", contract.judge(k[tile], v[tile], record, cfg), strict=True):
            print(
                f"{name} tile {tile} {side}: iterate {verdict.iterate} (kept {verdict.kept}, admissible "
                f"{verdict.admissible}), {verdict.ulps} ulps, {verdict.codes} codes differ"
            )
            assert verdict.passed, (tile, side, verdict)
            verdicts.append(verdict)
    rate = contract.mismatch_rate(verdicts)
    print(f"{name}: {rate:.1e} of the codes differ")
    assert rate <= contract.MISMATCH_RATE


@pytest.mark.parametrize("name", FILES)
def test_golden_records_decode_to_the_published_values(name, golden):
    cfg, data = golden(name)
    k, v = decode(from_published(data["record"], cfg), cfg, rotated=True)
    for got, want in ((k, data["k_dequant_rotated"]), (v, data["v_dequant_rotated"])):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)
        print(f"{name}: largest difference of the decoded values {np.abs(got - want).max()}")


@pytest.mark.parametrize("name", FILES)
def test_unrotated_input_gives_the_same_quality(name, golden):
    # The golden rotation went through a half-precision GEMM, so bytes differ; the error must not.
    cfg, data = golden(name)
    errors = []
    for rotated, k, v in ((False, data["k"], data["v"]), (True, data["k_rotated"], data["v_rotated"])):
        k2, v2 = decode(encode(k, v, cfg, rotated), cfg, rotated)
        pairs = (k2, k.astype(np.float64)), (v2, v.astype(np.float64))
        errors.append([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])
    np.testing.assert_allclose(errors[0], errors[1], rtol=0.01)


@pytest.mark.parametrize("name", FILES)
def test_published_order_round_trips(name, golden):
    cfg, data = golden(name)
    records = from_published(data["record"], cfg)
    folded = to_published(records, cfg)
    np.testing.assert_array_equal(from_published(folded, cfg), records)
    end = layout.offsets_of(cfg).key_channel_scale
    np.testing.assert_array_equal(folded[:, :end], data["record"][:, :end])


@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 8), (8, 2), (4, 4)])
@pytest.mark.parametrize(("group", "head_dim"), [(64, 48), (128, 96)])
@pytest.mark.parametrize("refit", [False, True])
def test_own_records_survive_the_published_order(key_bits, value_bits, group, head_dim, refit, settings, rng):
    cfg = settings(key_bits=key_bits, value_bits=value_bits, group=group, head_dim=head_dim, refit=refit)
    k, v = rng.standard_normal((2, 3, group, head_dim)).astype(np.float32) * 7
    record = encode(k, v, cfg)
    published = to_published(record, cfg)
    assert published.shape == (3, published_bytes(cfg))
    np.testing.assert_array_equal(from_published(published, cfg), record)


def test_published_code_order_by_hand(settings):
    cfg = settings()
    published = np.zeros((1, published_bytes(cfg)), np.uint8)
    published[0, 1] = 0x53  # K channel 0: token 2 has code 3, token 3 code 5
    at = layout.offsets_of(cfg)
    published[0, at.value_codes + 32] = 0xE4  # V token 1: channels 0 … 3 have codes 0, 1, 2, 3
    key, value = layout.read(from_published(published, cfg), cfg)
    assert key.codes[0, 0, :5].tolist() == [0, 0, 3, 5, 0]
    assert value.codes[0, 1, :5].tolist() == [0, 1, 2, 3, 0]
    assert (np.count_nonzero(key.codes), np.count_nonzero(value.codes)) == (2, 3)


def test_three_bits_have_no_published_order(settings):
    cfg = settings(key_bits=3, value_bits=4)
    record = np.zeros((1, cfg.record_bytes), np.uint8)
    with pytest.raises(ValueError, match="key_bits 3: published order has only 2, 4 and 8 bits"):
        to_published(record, cfg)
    with pytest.raises(ValueError, match="value_bits 3"):
        from_published(record, settings(value_bits=3))
