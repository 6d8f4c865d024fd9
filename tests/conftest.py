"""Settings that every test runs under: one torch thread unless the test asks for more."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread, so that tests in parallel processes do not fight; a test may set more and it is undone."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
