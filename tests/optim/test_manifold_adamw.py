"""ManifoldAdamW: where the spacing acts, what a grid step is, and that "none" is torch's AdamW."""

import math

import pytest
import torch
from torch.nn import Parameter

from altgrad.errors import OptionError
from altgrad.optim import ManifoldAdamW, SRAdamW, position, spacing
from altgrad.quantization import get_format, quantize
from altgrad.quantization.parameter_grid import ParameterGrid


def spread(fmt, n, dtype=torch.float64, seed=0):
    """Weights of both signs, log-uniform from the smallest step to max (at most 2^20)."""
    generator = torch.Generator().manual_seed(seed)
    low, high = math.log2(fmt.min_subnormal), min(math.log2(fmt.max), 20)
    magnitude = 2.0 ** (torch.rand(n, generator=generator, dtype=torch.float64) * (high - low) + low)
    return Parameter((magnitude * torch.randn(n, generator=generator, dtype=torch.float64).sign()).to(dtype))


def slope(fmt, precondition, eps=1e-8, steps=25, n=60_000):
    """Least-squares slope of log|update| on log S under noise gradients."""
    generator = torch.Generator().manual_seed(3)
    w = spread(fmt, n)
    optimizer = ManifoldAdamW([w], fmt, lr=1e-3, precondition=precondition, betas=(0.9, 0.95), eps=eps)
    for _ in range(steps):
        before = w.detach().clone()
        w.grad = torch.randn(n, generator=generator, dtype=torch.float64)
        optimizer.step()
    x = spacing(before, ParameterGrid(fmt)).log()
    y = (w.detach() - before).abs().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E3M4", "E2M5", "E6M1", "E7M0"])
def test_update_is_proportional_to_the_spacing_and_the_gradient_variant_is_not(name):
    fmt = get_format(name)
    found = {p: slope(fmt, p) for p in ("update", "both", "gradient")}
    found["gradient, eps 0"] = slope(fmt, "gradient", eps=0.0)
    print(f"{name}: slope of log|update| on log S: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    assert 0.98 <= found["update"] <= 1.02
    assert 0.98 <= found["both"] <= 1.02
    assert abs(found["gradient"]) < 0.3
    assert abs(found["gradient, eps 0"]) < 0.05


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_none_is_torchs_adamw_bit_for_bit(dtype, foreach):
    generator = torch.Generator().manual_seed(0)
    ours = [Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in ((33, 7), (5,), (1000,))]
    theirs = [Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    a = ManifoldAdamW(ours, None, precondition="none", fused=False, **options)
    b = torch.optim.AdamW(theirs, foreach=foreach, **options)
    for _ in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["E0M7", "E1M6"])
def test_uniform_grids_reduce_to_adam_times_a_constant(name):
    fmt = get_format(name)
    w, twin = Parameter(torch.linspace(-0.4, 0.4, 64)), Parameter(torch.linspace(-0.4, 0.4, 64))
    step = 2.0**-fmt.mantissa_bits * (2 if name == "E1M6" else 1)
    a = ManifoldAdamW([w], fmt, lr=0.5)
    b = torch.optim.AdamW([twin], lr=0.5 * step, weight_decay=0.0)
    for k in range(5):
        for p, o in ((w, a), (twin, b)):
            p.grad = torch.cos(torch.arange(64.0) * (k + 1))
            o.step()
    torch.testing.assert_close(w, twin, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 0.125, 3.0])
def test_lr_counts_grid_steps_whatever_the_size_or_scale(scale):
    fmt = get_format("E4M3")
    w = Parameter(torch.tensor([1.0, 0.011, 300.0, 2.0**-9, 0.0]) * scale)
    before = w.detach().clone()
    optimizer = ManifoldAdamW([w], fmt, lr=0.25, eps=0.0, scale=scale)
    w.grad = torch.tensor([1.0, -1e-4, 1e3, 2.0, -1.0])
    optimizer.step()
    moved = (w.detach() - before) / (torch.tensor([0.125, 2.0**-9, 32.0, 2.0**-9, 2.0**-9]) * scale)
    torch.testing.assert_close(moved, torch.tensor([-0.25, 0.25, -0.25, -0.25, 0.25]), rtol=1e-4, atol=0)


def test_zero_can_be_crossed():
    w = Parameter(torch.tensor([2.0**-9]))
    optimizer = ManifoldAdamW([w], "E4M3", lr=0.75, eps=0.0)
    for _ in range(3):
        w.grad = torch.ones(1)
        optimizer.step()
    assert w.item() == pytest.approx(-1.25 * 2.0**-9, rel=1e-5)


@pytest.mark.parametrize(("precondition", "factor"), [("update", 1 / 8), ("both", 1 / 8), ("gradient", 1), ("none", 1)])
def test_decay_is_relative_to_a_grid_step(precondition, factor):
    w = Parameter(torch.tensor([1.75, 0.01]))
    before = w.detach().clone()
    optimizer = ManifoldAdamW([w], "E4M3", lr=0.5, weight_decay=0.1, precondition=precondition)
    w.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(w.detach(), before * (1 - 0.5 * 0.1 * factor))


def test_movement_counts_signed_grid_steps():
    w = Parameter(quantize(torch.randn(100), "E4M3"))
    start = w.detach().clone()
    optimizer = ManifoldAdamW([w], "E4M3", lr=0.4, eps=0.0, rounding="stochastic", track_movement=True)
    assert optimizer.movement(w) is None
    sign = torch.where(torch.arange(100) % 2 == 0, 1.0, -1.0)
    for _ in range(5):
        w.grad = sign.clone()
        optimizer.step()
    moved = optimizer.movement(w)
    torch.testing.assert_close(moved.attempted, -2.0 * sign.double(), rtol=1e-5, atol=0)
    grid = ParameterGrid(get_format("E4M3"))
    assert torch.equal(moved.realised, position(w.detach(), grid) - position(start, grid))
    assert torch.equal(moved.realised, moved.realised.round())
    assert abs(float((moved.realised * sign).mean()) + 2.0) < 0.5


def test_amax_scale_is_taken_once_and_kept():
    w = Parameter(torch.tensor([100.0, 1.0]))
    optimizer = ManifoldAdamW([w], "E4M3", lr=0.5, scale="amax", rounding="stochastic")
    w.grad = torch.ones(2)
    optimizer.step()
    assert float(optimizer.state[w]["grid_scale"]) == 0.25
    w.data *= 100
    optimizer.step()
    assert float(optimizer.state[w]["grid_scale"]) == 0.25


def test_sr_adamw_moves_on_average_by_the_step_that_nearest_swallows():
    moved = {}
    for rounding in ("stochastic", "nearest_even"):
        w = Parameter(torch.ones(20000))
        optimizer = SRAdamW([w], "E4M3", lr=1e-3, weight_decay=0.0, rounding=rounding)
        for _ in range(10):
            w.grad = torch.ones(20000)
            optimizer.step()
        assert torch.equal(quantize(w.detach(), "E4M3"), w)
        moved[rounding] = float((w.detach() - 1).mean())
    assert moved["nearest_even"] == 0.0
    assert moved["stochastic"] == pytest.approx(-0.01, rel=0.1)
    assert optimizer.last_step_stats()["stall_rate"] == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"eps": -1e-9},
        {"weight_decay": -0.1},
        {"precondition": "S"},
        {"rounding": "up"},
        {"scale": 0.0},
        {"scale": "max"},
        {"moment_rounding": "up"},
        {"moment_format": 3},
        {"off_grid_lr": -1.0},
        {"off_grid_lr": 1e-3, "lr": 0.0},
    ],
    ids=str,
)
def test_bad_options_are_refused_and_leave_no_group(options):
    w = Parameter(torch.ones(2))
    with pytest.raises(OptionError):
        ManifoldAdamW([w], **{"format": "E4M3", **options})


def test_a_parameter_without_a_grid_needs_a_rule():
    w = Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    with pytest.raises(OptionError, match="off_grid_lr"):
        ManifoldAdamW([w], None).step()
