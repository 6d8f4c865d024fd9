"""Settings that every test runs under: one torch thread unless the test asks for more; routes of the GEMM on demand."""

import pytest
import torch


def pytest_addoption(parser):
    """`--gemm-routes`: take each of these routes in turn wherever its products are exact, whatever the shape and the CPU."""
    parser.addoption("--gemm-routes", default="", help="float32,bf16,...: routes of the matrix products to force")


def pytest_generate_tests(metafunc):
    """One case of each test for every route."""
    if names := metafunc.config.getoption("--gemm-routes"):
        metafunc.parametrize(
            "forced_route", ["float32", *(n for n in names.split(",") if n != "float32")], indirect=True
        )


ASKED: dict[str, list[tuple]] = {}  # test -> what its layers asked of the rule


@pytest.fixture(autouse=True)
def forced_route(request, monkeypatch):
    """The route that the command line asks for, in every layer; tests of the rule itself keep the rule.

    A test is run once by float32, and by another route if some product that it asked for may take that one.
    """
    if not (name := getattr(request, "param", None)):
        return
    from altgrad.nn.layer import gemm, state
    from altgrad.quantization.products.units import Unit

    forced, test = gemm.Route(name), request.node.nodeid.replace(name, "")

    def may(needed, dtype, codes):
        units = {None: (), Unit.INT8: tuple(Unit), Unit.BF16: (Unit.BF16, Unit.AMX_BF16, Unit.FLOAT32)}[needed.unit]
        exact = needed.values is forced if forced.unit is None else codes and forced.unit in units
        return dtype == torch.float32 and exact

    def noted(needed, dtype, codes):
        ASKED.setdefault(test, []).append((needed, dtype, codes))
        return may(needed, dtype, codes)

    noted._dynamo_marked_constant = True  # the compiler asks while it traces

    def route(needed, shape, device_type, *, dtype=torch.float32, codes=True):
        return forced if noted(needed, dtype, codes) else gemm.Route.FLOAT32

    if forced is not gemm.Route.FLOAT32 and not any(may(*asked) for asked in ASKED.get(test, ())):
        pytest.skip(f"multiplies nothing that {name} may multiply")
    monkeypatch.setattr(state, "choose_route", route)


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread, so that tests in parallel processes do not fight; a test may set more and it is undone."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
