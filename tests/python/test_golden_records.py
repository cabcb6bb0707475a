"""Golden records of format version 1: what they decode to, and that the encoder still makes them."""

import itertools
import sys
from pathlib import Path

import kvarn
import numpy as np
import pytest
from kvarn.reference import contract, layout, matrix

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import make_records as golden

CASES = golden.cases()
LISTED = golden.listed()
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_any_two_values_of_bits_tile_length_head_dim_and_refit_occur_together() -> None:
    have = [((c.key_bits, c.value_bits), c.group, c.head_dim, c.refit) for _, c, _ in CASES]
    values = (golden.BITS, (64, 128), golden.HEAD_DIMS, (False, True))
    for a, b in itertools.combinations(range(4), 2):
        assert {(one[a], one[b]) for one in have} == set(itertools.product(values[a], values[b]))


def test_the_list_names_every_file_and_no_other() -> None:
    assert list(LISTED) == [case.name for case in CASES]
    assert sorted(LISTED) == sorted(path.name for path in golden.FOLDER.glob("*.records"))


@each_case
def test_files_have_version_1_and_the_configuration_of_their_name(case: golden.Case) -> None:
    assert (golden.FOLDER / case.name).read_bytes()[8:12] == b"\x01\0\0\0"
    records, cfg = kvarn.load_records(golden.FOLDER / case.name)
    assert (records.shape, cfg) == ((case.tiles, case.cfg.record_bytes), case.cfg)


@each_case
def test_inputs_come_out_as_when_the_files_were_made(case: golden.Case) -> None:
    assert LISTED[case.name][:2] == tuple(map(golden.crc, golden.inputs(case)))


@each_case
def test_records_decode_to_the_same_bits(case: golden.Case) -> None:
    records, cfg = kvarn.load_records(golden.FOLDER / case.name)
    assert LISTED[case.name][2:] == tuple(map(golden.crc, kvarn.decode(records, cfg, rotated=True)))
    key, value = (matrix.decode(one) for one in layout.read(records, cfg))
    assert LISTED[case.name][2:] == (golden.crc(key.transpose(0, 2, 1)), golden.crc(value))


@each_case
def test_stored_and_new_records_are_encodings_of_the_inputs(case: golden.Case) -> None:
    records, cfg = kvarn.load_records(golden.FOLDER / case.name)
    k, v = golden.inputs(case)
    for made in (records, kvarn.encode(k, v, cfg, rotated=True)):
        for tile in range(case.tiles):
            inputs = k[tile].astype(np.float32), v[tile].astype(np.float32)
            for verdict in contract.judge(*inputs, made[tile], cfg):
                assert verdict.passed, verdict
