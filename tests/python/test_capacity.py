"""What `kvarn.capacity` promises, tried with real pools."""

import kvarn
import numpy as np
import pytest
from kvarn import CapacityError, Config, LayerShape, ShapeError, capacity

LAYERS = [LayerShape(2, 32), LayerShape(1, 48)]


def config(**options):
    return Config(**{"name": "kvarn_k4v2_g64", "head_dim": 32, **options})


def fill(pool, sequences, counts):
    rows = sum(counts)
    with pool.step(sequences, counts) as step:
        for layer, (kv_heads, head_dim) in enumerate(pool.layers):
            x = np.zeros((rows, kv_heads, head_dim), np.float16)
            step.append(layer, x, x)


@pytest.mark.parametrize("sinks", [0, 16, 64])
@pytest.mark.parametrize("recent", [0, 40, 64])
@pytest.mark.parametrize(("sequences", "memory"), [(1, 400_000), (3, 900_001), (2, 1_234_567)])
def test_a_pool_of_that_size_holds_that_much_and_no_more(sinks, recent, sequences, memory):
    cfg = config(sink_tokens=sinks, recent_tokens=recent)
    fits = capacity(cfg, memory, layers=LAYERS, sequences=sequences)
    assert memory - fits.page_bytes < fits.bytes <= memory

    pool = kvarn.Pool(cfg, layers=fits.layers, pages=fits.pages, slots=fits.slots)
    views = [np.from_dlpack(view) for kind in (pool.pages, pool.slots) for view in kind]
    assert sum(view.nbytes for view in views) == fits.bytes

    batch = [pool.create() for _ in range(sequences)]
    length = fits.tokens_per_sequence
    # In large pieces, and the last ones token by token: every state on the way fits.
    for count in (length // 2, length - length // 2 - 70, *[1] * 70):
        fill(pool, batch, [count] * sequences)
    assert [sequence.length for sequence in batch] == [length] * sequences
    with pytest.raises(CapacityError):
        fill(pool, batch, [1] * sequences)
    assert [sequence.length for sequence in batch] == [length] * sequences


def test_figures_of_a_llama_worked_out_by_hand():
    cfg = Config("kvarn_k4v2_g128", head_dim=128)
    fits = capacity(cfg, 10 * 2**30, layers=32, kv_heads=8, sequences=4)
    # 8,192 + 4,096 bytes of codes, 2 · 128 · 6 of parameters, for each of 32 layers and 8 heads.
    assert fits.page_bytes == 32 * 8 * (8_192 + 4_096 + 1_536)
    assert fits.bytes_per_token == 32 * 8 * 108
    assert fits.sixteen_bit_bytes_per_token == 32 * 8 * 128 * 2 * 2
    # The sinks, and a tail tile in passing beside another.
    assert (fits.slots, fits.slot_bytes) == (4 * 3, 32 * 8 * 128 * 128 * 2 * 2)
    assert fits.pages == (10 * 2**30 - 12 * fits.slot_bytes) // fits.page_bytes
    assert fits.tokens_per_sequence == (fits.pages // 4 + 2) * 128 - 1


def test_layers_of_a_model():
    transformers = pytest.importorskip("transformers", reason="makes a config of transformers")
    model = transformers.LlamaConfig(
        num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=32, hidden_size=256
    )
    for given in (model, model.to_dict()):
        layers = kvarn.cached_layers(given).full
        assert layers == (LayerShape(2, 32),) * 3
        assert capacity(config(), 10**6, layers=layers) == capacity(config(), 10**6, layers=3, kv_heads=2)


def test_held_tokens_need_slots():
    plain, held = (capacity(config(), 10**6, layers=1, kv_heads=1, hold=hold) for hold in (1, 2))
    assert held.slots == plain.slots + 2


@pytest.mark.parametrize("sequences", [1, 4])
def test_partial_results_on_cuda(sequences):
    cfg = Config("kvarn_k4v2_g128", head_dim=128)
    shape = {"layers": 32, "kv_heads": 8, "sequences": sequences}
    here, there = (capacity(cfg, 10 * 2**30, **shape, device=device) for device in ("cpu", "cuda:1"))
    assert here.workspace_bytes == 0
    # 32 MiB, as no query block of one sequence has more, and counters of parts that fit with one query head.
    parts = 2**25 // (4 * 8 * 130)
    assert there.workspace_bytes == 2**25 + 4 * 2 ** (parts * 8 - 1).bit_length()
    assert there.slots == here.slots
    assert (
        there.bytes + there.workspace_bytes
        <= 10 * 2**30
        < there.bytes + there.workspace_bytes + (there.page_bytes)
    )


def test_a_very_long_sequence_has_large_partial_results():
    cfg = Config("kvarn_k4v2_g128", head_dim=128)
    fits = capacity(cfg, 2**37, layers=1, kv_heads=8, device="cuda")
    blocks = -(-fits.tokens_per_sequence // (21 * 128))
    assert fits.workspace_bytes >= blocks * 4 * 8 * 16 * 130


@pytest.mark.parametrize(
    ("memory", "options", "error", "text"),
    [
        (1000, {}, CapacityError, "1000 bytes for 1 sequences: expected at least the 49152 of their 3 slots"),
        (-1, {}, ShapeError, "memory -1: expected 0 or more"),
        (10**6, {"sequences": 0}, ShapeError, "sequences 0: expected 1 or more"),
        (10**6, {"hold": -2}, ShapeError, "hold -2: expected 0 or more"),
        (10**6, {"kv_heads": None}, ShapeError, "kv_heads None with 2 layers"),
        (10**6, {"layers": [], "kv_heads": None}, ShapeError, "0 layers: expected 1 or more"),
        (10**6, {"dtype": "int8"}, kvarn.DTypeError, "dtype int8: expected float16"),
        (10**6, {"layers": [(1, 40)], "kv_heads": None}, kvarn.ConfigError, "head_dim 40"),
        (10**6, {"device": "cuda"}, CapacityError, "slots and the 34603008 of partial results; give more"),
        (10**6, {"device": "tpu"}, kvarn.DeviceError, "device 'tpu': expected 'cpu'"),
    ],
)
def test_bad_input(memory, options, error, text):
    with pytest.raises(error) as caught:
        capacity(config(), memory, **{"layers": 2, "kv_heads": 1, **options})
    assert text in str(caught.value)
