import pytest
import torch
from tiny_models import FAMILIES, tiny


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models():
    return {name: tiny(*classes) for name, classes in FAMILIES.items()}


@pytest.fixture(params=list(FAMILIES))
def model(request, models):
    model = models[request.param]
    model.set_attn_implementation("kvarn")
    return model


@pytest.fixture(params=["kvarn", "sdpa", "eager"])
def implementation(request):
    return request.param


@pytest.fixture
def expected_of():
    """Return a runner of functions with a model's attention set to sdpa."""

    def of(model):
        def expected(function):
            before = model.config._attn_implementation
            model.set_attn_implementation("sdpa")
            try:
                return function()
            finally:
                model.set_attn_implementation(before)

        return expected

    return of


@pytest.fixture
def expected(model, expected_of):
    return expected_of(model)
