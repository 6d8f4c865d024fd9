"""Threads and processes: any thread may call the kernel, and a forked child still can."""

import multiprocessing
import threading

import numba
import pytest
import torch

from altgrad.jit.threads import threads_for
from altgrad.quantization import fake_quantize, quantize

LARGE = 300_000


def _tensor() -> torch.Tensor:
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(0))


def test_threads_follow_torchs_setting():
    assert threads_for(LARGE) == 1
    torch.set_num_threads(2)
    assert threads_for(LARGE) == min(2, numba.config.NUMBA_NUM_THREADS)
    assert threads_for(1000) == 1


def test_callers_numba_setting_is_left_as_found():
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
