"""Moments kept in a format: storage, rounding, and the average that nearest rounding freezes."""

import pytest
import torch
from torch.nn import Parameter

from altgrad.errors import CodeError, FormatError
from altgrad.optim import ManifoldAdamW, make_optimizer, moments, state_bytes
from altgrad.quantization import get_format, quantize


def averaged(fmt, rounding, beta, steps, n=4000, start=1.0, goal=2.0):
    """n exponential averages of a constant `goal` from `start`, kept in a format; their mean after `steps`."""
    fmt, state = get_format(fmt), {}
    like = torch.zeros(n)
    moments.create(state, "v", like, fmt)
    moments.write(state, "v", torch.full((n,), start), fmt, "nearest_even", None)
    for step in range(steps):
        value = moments.read(state, "v", like, fmt)
        moments.write(state, "v", value.lerp(torch.tensor(goal), 1 - beta), fmt, rounding, (0, step))
    return moments.read(state, "v", like, fmt)


@pytest.mark.parametrize(("fmt", "beta"), [("BF16", 0.999), ("E4M3", 0.96), ("E5M2", 0.9), ("E3M4", 0.98)])
def test_a_slow_average_freezes_under_nearest_and_moves_under_stochastic(fmt, beta):
    """(1 - beta) * distance is below half a grid step: nearest never moves, stochastic follows the true average."""
    steps = 20
    nearest = averaged(fmt, "nearest_even", beta, steps)
    assert (nearest == 1.0).all()
    stochastic = averaged(fmt, "stochastic", beta, steps)
    truth = 2.0 - beta**steps
    assert float(stochastic.mean()) == pytest.approx(truth, abs=0.1 * (truth - 1))


def test_adamw_with_bf16_second_moment_freezes_at_beta2_0999():
    """The same effect through the optimizer: v starts to lag for good once it is near its first values."""
    held = {}
    for rounding in ("nearest_even", "stochastic"):
        w = Parameter(torch.zeros(2000))
        optimizer = make_optimizer(
            "sr_adamw", [w], lr=1e-3, rounding=None, moment_format=(None, "BF16"), moment_rounding=rounding
        )
        w.grad = torch.ones(2000)
        optimizer.step()
        for _ in range(600):
            optimizer.step()
        held[rounding] = float(optimizer.state[w]["exp_avg_sq"].float().mean())
    truth = 1 - 0.999**601
    assert held["stochastic"] == pytest.approx(truth, rel=0.02)
    assert held["nearest_even"] < 0.75 * truth


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        ("E4M3", torch.uint8),
        ("E2M1", torch.uint8),
        ("BF16", torch.bfloat16),
        ("FP16", torch.float16),
        ("TF32", torch.float32),
    ],
)
def test_storage_and_values(fmt, dtype):
    state, like = {}, torch.zeros(300)
    value = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 1e-3
    fmt = get_format(fmt)
    moments.create(state, "m", like, fmt)
    moments.write(state, "m", value, fmt, "nearest_even", None)
    assert state["m"].dtype == dtype
    scale = state["m_scale"] if moments.has_scale(fmt) else 1.0
    assert torch.equal(moments.read(state, "m", like, fmt), quantize(value, fmt, scale))


def test_state_bytes_are_really_saved():
    sizes = {}
    for fmt in (None, "BF16", "E4M3", ("E4M3", None)):
        w = Parameter(torch.ones(1000))
        w.grad = torch.ones(1000)
        optimizer = ManifoldAdamW([w], moment_format=fmt)
        optimizer.step()
        sizes[fmt] = state_bytes(optimizer)
    assert sizes == {None: 8000, "BF16": 4000, "E4M3": 2000, ("E4M3", None): 5000}


def test_a_nan_moment_without_a_code_is_an_error():
    w = Parameter(torch.ones(4))
    w.grad = torch.full((4,), float("nan"))
    with pytest.raises(CodeError):
        ManifoldAdamW([w], moment_format="E3M4").step()


def test_block_formats_are_refused():
    with pytest.raises(FormatError, match="signed scalar"):
        ManifoldAdamW([Parameter(torch.ones(2))], moment_format="MXFP8")
