"""Settings that every test runs under: one torch thread unless the test asks for more; a route of the GEMM on demand."""

import pytest
import torch


def pytest_addoption(parser):
    """`--gemm-route`: take this route wherever its products are exact, whatever the shape and the CPU."""
    parser.addoption("--gemm-route", default=None, help="float32, bf16, ...: force a route of the matrix products")


@pytest.fixture(autouse=True)
def forced_route(request, monkeypatch):
    """The route that the command line asks for, in every layer; tests of the rule itself keep the rule."""
    name = request.config.getoption("--gemm-route")
    if name is None:
        return
    from altgrad.nn.layer import gemm, state
    from altgrad.quantization.products.units import Unit

    forced = gemm.Route(name)

    def route(needed, shape, device_type, *, dtype=torch.float32, codes=True, **_):
        units = {None: (), Unit.INT8: (Unit.INT8, Unit.BF16)}.get(needed.unit, (needed.unit,))
        exact = needed.values is forced if forced.unit is None else codes and forced.unit in units
        return forced if dtype == torch.float32 and exact else gemm.Route.FLOAT32

    monkeypatch.setattr(state, "choose_route", route)


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread, so that tests in parallel processes do not fight; a test may set more and it is undone."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
