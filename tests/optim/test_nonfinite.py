"""An optimizer that lands on the grid by itself makes no finite number of an inf or NaN: a crash must stay visible."""

import pytest
import torch
from torch.nn import Parameter

from altgrad.nn import attach_optimizer, quantize_model, uniform
from altgrad.optim import OPTIMIZERS, GridOptimizer, make_optimizer
from altgrad.quantization import get_format, quantize
from altgrad.quantization.parameter_grid import ParameterGrid, declare_grid
from tests.optim.test_fused import LR

NAMES = sorted(name for name, row in OPTIMIZERS.items() if issubclass(row.cls, GridOptimizer))
FOLLOWS_SIGNS = ("lion", "signsgd")  # their rule has a step of one size, whatever the gradient's


def stepped(name, fused, weight=None, gradient=None, **options):
    """Weights after one step in which element 3 has that weight and that gradient."""
    fmt = "E7M0" if name == "lns_madam" else options.pop("fmt", "E4M3")
    w = quantize(torch.linspace(0.5, 4.0, 64), fmt)
    p, g = Parameter(w), torch.full((64,), 0.25)
    if weight is not None:
        p.data[3] = weight
    if gradient is not None:
        g[3] = gradient
    declare_grid(p, ParameterGrid(get_format(fmt), 1.0))
    p.grad = g
    rounding = options.pop("rounding", "stochastic")
    make_optimizer(name, [p], lr=LR[OPTIMIZERS[name].lr_unit], rounding=rounding, fused=fused, **options).step()
    return p.detach()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest_even"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_an_inf_weight_stays_nonfinite(name, fused, rounding):
    for weight in (float("inf"), float("-inf"), float("nan")):
        after = stepped(name, fused, weight=weight, rounding=rounding)
        assert not after[3].isfinite(), weight
        assert after.isfinite().sum() == 63 or name == "madam", weight  # Madam's bound is an average of the weights


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FOLLOWS_SIGNS])
def test_an_inf_gradient_leaves_a_nonfinite_weight(name, fused):
    for gradient in (float("inf"), float("-inf"), float("nan")):
        after = stepped(name, fused, gradient=gradient)
        assert not after[3].isfinite(), gradient
        assert after.isfinite().sum() == 63, gradient


def test_codes_that_are_rounded_without_bias_keep_an_inf():
    assert not stepped("grid_optim", False, gradient=float("inf"), unbiased="code")[3].isfinite()


@pytest.mark.parametrize("fused", [True, False])
def test_a_finite_target_beyond_max_becomes_max(fused):
    assert stepped("grid_optim", fused, gradient=-1e9)[3] == 448


@pytest.mark.parametrize("name", ["grid_optim", "manifold_adamw", "sr_adamw"])
def test_grid_storage_keeps_what_the_optimizer_could_not_land(name):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))
    quantize_model(model, uniform("E4M3", storage="grid"))
    optimizer = make_optimizer(name, model.parameters(), lr=0.1, rounding="stochastic")
    attach_optimizer(model, optimizer)
    weight = model[0].weight
    weight.grad = torch.ones_like(weight)
    weight.grad[1, 2] = torch.inf
    optimizer.step()
    assert (~weight.isfinite()).nonzero().tolist() == [[1, 2]]
    assert not model(torch.ones(1, 8)).isfinite().all()
