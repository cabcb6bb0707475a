import pytest
import torch
from tiny_models import CASES, FAMILIES, tiny


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models():
    """A model for every family and number of layers."""
    return {
        (family, layers): tiny(*FAMILIES[family], num_hidden_layers=layers) for family, layers, _ in CASES
    }


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    return request.param


@pytest.fixture
def preset(case):
    return case[2]


@pytest.fixture
def model(models, case):
    model = models[case[:2]]
    model.set_attn_implementation("kvarn")
    return model


@pytest.fixture(params=["kvarn", "sdpa", "eager"])
def implementation(request):
    return request.param


@pytest.fixture
def expected(model):
    """Run a function with the model's attention set to sdpa."""

    def expected(function):
        before = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        try:
            return function()
        finally:
            model.set_attn_implementation(before)

    return expected
