"""No result depends on the processor's flags, its class, its threads or who calls: the same bits, counts and sums."""

import multiprocessing
import subprocess
import sys
import threading

import numba
import numpy as np
import pytest
import torch

from altgrad.jit import threads as own_threads
from altgrad.jit.threads import threads_for
from altgrad.nn import functional, layer_recipe
from altgrad.quantization import (
    Cast,
    amax,
    compute_stiffness_field,
    compute_ulp_distance,
    decode,
    encode,
    fake_quantize,
    get_format,
    ops,
    quantize,
    quantize_with_stats,
)
from altgrad.quantization.products.multiply import Codes, multiply
from altgrad.quantization.products.units import Unit
from altgrad.quantization.quantized import Want
from altgrad.quantization.stats import EXACT_FIELDS, SUM_ERROR

FLUSHED = {
    "BF16": lambda x: quantize(x, "BF16"),
    "FP32": lambda x: quantize(x, "FP32"),
    "E4M3 under a small scale": lambda x: quantize(x, "E4M3", 2.0**-130),
    "stochastic": lambda x: quantize(x, "BF16", rounding="stochastic", key=(1, 2)),
    "upwards": lambda x: quantize(x, "E4M3", rounding="up"),
    "codes": lambda x: encode(x, "BF16"),
    "decode": lambda x: decode(torch.full(x.shape, 3, dtype=torch.int32), "BF16"),
    "MXFP8": lambda x: quantize(x, "MXFP8"),
    "statistics": lambda x: quantize_with_stats(x, "E4M3", rounding="up")[1].vector[:5],
    "amax": lambda x: amax(x),
    "amax of an axis": lambda x: amax(x, 0),
    "stiffness": lambda x: compute_stiffness_field(x[:8], "E4M3"),
    "ULP distance": lambda x: compute_ulp_distance(x[:8], 2 * x[:8]),
    "eager": lambda x: quantize(x, "BF16", kernel="eager"),
    "reference": lambda x: quantize(x, "BF16", kernel="reference"),
}


@pytest.mark.parametrize("name", FLUSHED)
def test_flushed_subnormals_change_no_bit_on_any_thread(name):
    small = name in ("eager", "reference")
    x = torch.full((1 << 10 if small else 1 << 18,), 3e-39) * torch.tensor([1.0, -1.0]).repeat(
        1 << 9 if small else 1 << 17
    )
    x = x.view(-1, 32)
    expected = FLUSHED[name](x)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.set_flush_denormal(True)
        try:
            found = FLUSHED[name](x)
            assert 5e-324 == 0.0  # the flag is left as it was found
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))


@pytest.mark.parametrize("fmt", ["E4M3", "E0M7", "MXFP8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_the_same_by_every_route(fmt, dtype):
    """Counts to the bit; the two sums to their stated bound, whatever is computed beside them and on however many threads."""
    x = (torch.randn(300, 1024, generator=torch.Generator().manual_seed(3)) * 30).to(dtype)
    wide, values = x.double(), quantize(x, fmt).double()
    sums = [float(((wide - values) ** 2).sum()), float((wide**2).sum())]
    vectors = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        vectors.append(quantize_with_stats(x, fmt)[1].vector)
        vectors.append(ops.quantize_and_encode_with_stats(x, fmt)[2].vector)
        vectors.append(ops.encode_with_stats(x, fmt)[1].vector)
    count = len(EXACT_FIELDS)
    for vector in vectors:
        assert torch.equal(vector[:count], vectors[0][:count])
        np.testing.assert_allclose(vector[count:].numpy(), sums, rtol=SUM_ERROR)
    for one, two in zip(vectors[:3], vectors[3:], strict=True):
        assert torch.equal(one, two)


LARGE = 300_000


def _tensor() -> torch.Tensor:
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(0))


def test_threads_follow_torchs_setting():
    assert threads_for(LARGE) == 1
    torch.set_num_threads(2)
    assert threads_for(LARGE) == 2
    assert threads_for(1000) == 1


@pytest.mark.skipif(
    sys.platform != "linux", reason="torch has GNU OpenMP on Linux alone; elsewhere Numba's threads work"
)
def test_loops_run_on_torchs_own_threads():
    script = """
import os, torch
torch.set_num_threads(2)
from altgrad.quantization import quantize
x = torch.randn(300_000)
quantize(x[:1000], "E4M3", 0.1)
(x + x).exp()
before = len(os.listdir("/proc/self/task"))
quantize(x, "E4M3", 0.1)
assert len(os.listdir("/proc/self/task")) == before, "a second pool of threads"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def _forget_threads() -> None:
    own_threads._on_threads.cache_clear()
    own_threads._torchs_crew.cache_clear()


@pytest.fixture
def numbas_threads(monkeypatch):
    """Loops run as where torch has no GNU OpenMP."""
    monkeypatch.setattr(own_threads, "_torchs_openmp", lambda: None)
    _forget_threads()
    assert own_threads.crew_of(2) is None
    yield
    monkeypatch.undo()
    _forget_threads()


def _found() -> list[torch.Tensor]:
    """Results of each kind of loop, large enough for two threads, and of a layer."""
    fmt, x = get_format("E4M3"), torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    codes = Codes(Cast(fmt)(x, 0.1, want=Want.CODES).codes, fmt)
    layer = x.clone().requires_grad_()
    y = functional.linear(layer, x, recipe=layer_recipe("E4M3"))
    y.sum().backward()
    product = multiply(codes, codes.t(), Unit.BF16)
    return [quantize(_tensor(), "E4M3", 0.1), quantize(_tensor(), "MXFP8"), product, y.detach(), layer.grad]


def test_both_kinds_of_threads_give_the_same_bits(numbas_threads, monkeypatch):
    torch.set_num_threads(2)
    found = _found()
    monkeypatch.undo()
    _forget_threads()
    assert own_threads.crew_of(2) is not None or not sys.platform.startswith("linux")
    ours = _found()
    torch.set_num_threads(1)
    for one, other, alone in zip(found, ours, _found(), strict=True):
        assert torch.equal(one, alone)
        assert torch.equal(other, alone)


def test_callers_numba_setting_is_left_as_found(numbas_threads):
    torch.set_num_threads(2)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        quantize(_tensor(), "E4M3")
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


def test_many_threads_at_once():
    torch.set_num_threads(2)
    x = _tensor()
    expected = quantize(x, "E4M3", 0.1)
    wrong = []

    def work():
        torch.set_num_threads(2)
        for _ in range(20):
            if not torch.equal(quantize(x, "E4M3", 0.1), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_from_autograds_thread():
    torch.set_num_threads(2)

    class QuantizedBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return quantize(grad, "E5M2")

    x = _tensor().requires_grad_()
    (QuantizedBackward.apply(fake_quantize(x, "E4M3")) * 0.3).sum().backward()
    assert torch.equal(x.grad, quantize(torch.full((LARGE,), 0.3), "E5M2"))


class _Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return quantize(_tensor() * (index + 1), "E4M3").sum()


def _child(queue, x):
    torch.set_num_threads(2)
    q = quantize(x, "E4M3", 0.1)
    torch.set_num_threads(1)  # torch's own parallel loops hang in a forked child
    queue.put(float(q.double().sum()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork():
    torch.set_num_threads(2)
    x = _tensor()
    expected = float(quantize(x, "E4M3", 0.1).double().sum())  # starts the parent's threads
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, x))
    child.start()
    assert queue.get(timeout=60) == pytest.approx(expected, rel=1e-12)
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_data_loader_workers():
    torch.set_num_threads(2)
    expected = [_Dataset()[i] for i in range(4)]
    found = list(torch.utils.data.DataLoader(_Dataset(), num_workers=2, multiprocessing_context="fork"))
    assert [float(f) for f in found] == [float(e) for e in expected]
