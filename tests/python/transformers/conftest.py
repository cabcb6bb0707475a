import matrix
import pytest
import torch
from tiny_models import CASES, FAMILIES, tiny


def pytest_addoption(parser):
    parser.addoption(
        "--matrix",
        choices=("pairs", "full"),
        default="pairs",
        help="of models and ways to generate: a choice that holds every pair of values, or every combination",
    )


def pytest_terminal_summary(terminalreporter):
    """Print the matrix: how many combinations passed of those that ran."""
    counts = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for key, cell in getattr(report, "user_properties", ()):
                if key == "cell" and report.when == "call":
                    passed, run = counts.get(tuple(cell), (0, 0))
                    counts[tuple(cell)] = passed + (outcome == "passed"), run + 1
    if counts:
        terminalreporter.section("combinations that passed, by model and way to generate")
        terminalreporter.write_line(matrix.table(counts))


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
