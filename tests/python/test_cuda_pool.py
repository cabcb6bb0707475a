"""What of CUDA pools shows without a GPU: what is for them only, and memory that they cannot use."""

import kvarn
import numpy as np
import pytest
import torch

CFG = kvarn.Config("kvarn_k4v2_g64", head_dim=64)


def make(**options):
    return kvarn.Pool(CFG, layers=1, kv_heads=2, pages=4, slots=4, **options)


def test_the_cpu_has_no_graphs_and_takes_no_memory():
    pool = make()
    sequence = pool.create()
    tensors = (torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.float16))
    for name, call in {
        "memory": lambda: make(memory=tensors),
        "check": lambda: make(check=True),
        "static arrays": lambda: pool.static_arrays([1], tokens=10),
        "replay": lambda: pool.step([sequence], [1]).replay(None),
    }.items():
        with pytest.raises(kvarn.DeviceError, match=rf"^{name} (with device 'cpu'|on the CPU): expected"):
            call()
    with pytest.raises(kvarn.DeviceError, match=r"^static arrays with a CPU pool: expected None"):
        pool.step([sequence], [1], arrays=object())
    assert pool.stats().open_steps == 0


@pytest.mark.parametrize(
    ("memory", "error", "text"),
    [
        ((torch.zeros(8),), kvarn.DTypeError, "memory of 1 parts: expected (pages, slots)"),
        ([torch.zeros(8)] * 2, kvarn.DTypeError, "memory of type list: expected (pages, slots)"),
        (
            (torch.zeros(8), torch.zeros(8)),
            kvarn.DeviceError,
            "memory for pages: device cpu: expected cuda:1; move the tensor there",
        ),
        (
            (np.zeros(8), np.zeros(8)),
            kvarn.DeviceError,
            "memory for pages: expected a torch tensor on cuda:1",
        ),
        (
            (torch.zeros(8, requires_grad=True), torch.zeros(8)),
            kvarn.TensorError,
            "memory for pages requires grad",
        ),
        ((None, None), kvarn.DTypeError, "memory for pages of type NoneType"),
    ],
)
def test_memory_that_a_device_cannot_use_is_refused_before_the_driver_is_asked(memory, error, text):
    with pytest.raises(error) as caught:
        make(device=torch.device("cuda:1"), memory=memory)
    assert str(caught.value).startswith(text)
