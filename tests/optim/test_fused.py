"""The fused CPU steps against the plain torch path, not finite values included."""

import pytest
import torch
from torch.nn import Parameter

from altgrad.errors import OptionError
from altgrad.nn import attach_optimizer, quantize_model, uniform
from altgrad.optim import OPTIMIZERS, GridOptimizer, make_optimizer
from altgrad.quantization import get_format, quantize
from altgrad.quantization.parameter_grid import ParameterGrid, declare_grid

CASES = [
    ("manifold_adamw", {"precondition": "none", "format": None, "weight_decay": 0.1}),
    ("manifold_adamw", {"precondition": "update", "weight_decay": 0.1}),
    ("manifold_adamw", {"precondition": "both", "format": "E0M7", "eps": 1e-3}),
    ("manifold_adamw", {"precondition": "gradient", "rounding": "stochastic"}),
    ("manifold_adamw", {"precondition": "both", "rounding": "stochastic", "format": "BF16"}),
    ("sr_adamw", {"rounding": "nearest_even", "scale": 0.3}),
    ("sr_adamw", {"eps": 0.0, "format": "E5M2"}),
    ("kahan_adamw", {}),
    ("eco", {"rounding": "stochastic"}),
    ("grid_optim", {"step_clip": 0.5, "weight_decay": 0.1}),
    ("grid_optim", {"format": "E7M0"}),
    ("grid_optim", {"format": "E0M7", "rounding": "nearest_even", "scale": 0.3}),
    ("grid_optim", {"rounding": None}),
    ("madam", {"rounding": "stochastic", "p_scale": 1.0}),
    ("madam", {"g_bound": 0.1}),
    ("lns_madam", {"format": "E7M0", "scale": 0.25}),
    ("lns_madam", {"format": "E7M0", "rounding": "nearest_even"}),
    ("lion", {"rounding": "stochastic", "weight_decay": 0.1}),
    ("signsgd", {"rounding": "nearest_even"}),
    ("sr_adamw", {"rounding": "nearest_even", "scale": 2.0**-5}),
    ("grid_optim", {"normalize": "rms"}),
    ("grid_optim", {"normalize": "rms", "momentum": 0.0, "rounding": None}),
    ("grid_optim", {"nesterov": True}),
]
LR = {"distance": 0.02, "grid steps": 0.3, "log factor": 0.02}


def stepped(name, options, fused, n=5000, steps=4, shape=None, grid=None):
    """Parameter, optimizer after a few steps; some gradients are zero, one weight is at zero."""
    generator = torch.Generator().manual_seed(0)
    fmt = options.get("format", "E4M3")
    w = torch.randn(n, generator=generator) * 2.0 ** torch.randint(-4, 3, (n,), generator=generator)
    w[:2] = 0.0
    w = w if fmt is None else quantize(w, fmt, options.get("scale", 1.0))
    p = Parameter(w.reshape(shape or (n,)))
    if grid is not None:
        p.data = quantize(p.data, grid.format, grid.scale)
        declare_grid(p, grid)
    optimizer = make_optimizer(
        name, [p], **{"format": "E4M3", "lr": LR[OPTIMIZERS[name].lr_unit], **options, "fused": fused}
    )
    for _ in range(steps):
        g = torch.randn(n, generator=generator)
        g[1:3] = 0.0
        p.grad = g.reshape(p.shape)
        optimizer.step()
    return p, optimizer


def assert_same(name, options, **more):
    (p, a), (q, b) = (stepped(name, options, fused, **more) for fused in (True, False))
    lands = a.grid_step_counts(p) is not None
    if lands and options.get("format") == "BF16":  # grid steps are no longer far above an ulp of the attempted weight
        assert (p != q).double().mean() < 1e-3
    elif lands:
        assert torch.equal(p, q)
        assert torch.equal(a.grid_step_counts(p), b.grid_step_counts(q))
    else:
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert a.state[p].keys() == b.state[q].keys()
    for key, value in a.state[p].items():
        other = b.state[q][key]
        # ECO's moment is a difference of terms as large as its largest element; fma or not decides their last bits.
        atol = 1e-7 + 1e-6 * float(other.abs().max())
        torch.testing.assert_close(value, other, rtol=1e-2 if key == "compensation" else 1e-5, atol=atol)
    return p, q


def test_every_optimizer_but_one_has_a_fused_step():
    own = {n for n, row in OPTIMIZERS.items() if issubclass(row.cls, GridOptimizer)}
    assert {name for name, _ in CASES} == own - NOT_FUSED
    with pytest.raises(OptionError, match="no fused step"):
        stepped("lmd", {}, True, n=10, steps=1)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_fused_equals_plain(name, options):
    assert_same(name, options)


@pytest.mark.parametrize(("name", "options"), [CASES[1], CASES[6], CASES[9], CASES[16]], ids=str)
def test_fused_equals_plain_with_a_scale_per_channel(name, options):
    """60 elements per scale: rows end within tiles."""
    scale = 2.0 ** torch.randint(-3, 3, (50, 1), generator=torch.Generator().manual_seed(2)).float()
    grid = ParameterGrid(get_format(options.get("format", "E4M3")), scale)
    assert_same(name, options, n=3000, shape=(50, 60), grid=grid)


@pytest.mark.parametrize(("name", "options"), [CASES[3], CASES[9], CASES[15]], ids=str)
def test_threads_do_not_change_results(name, options):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        p, optimizer = stepped(name, options, True, n=150_000, steps=2)
        results.append((p.detach(), optimizer.grid_step_counts(p)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_view_is_stepped_in_place_and_its_version_moves():
    base = torch.ones(10)
    p = Parameter(base[2:8])
    version = p._version
    p.grad = torch.ones(6)
    make_optimizer("manifold_adamw", [p], format="E4M3", lr=0.5, fused=True).step()
    assert p._version > version
    assert base.tolist()[:2] + base.tolist()[8:] == [1.0] * 4
    assert (base[2:8] == 0.9375).all()


@pytest.mark.parametrize("name", ["manifold_adamw", "grid_optim", "madam", "lns_madam", "eco", "lion"])
def test_nan_reaches_the_weight(name):
    for fused in (True, False):
        fmt = "E7M0" if name == "lns_madam" else "E4M3"
        p = Parameter(torch.ones(40))
        optimizer = make_optimizer(name, [p], format=fmt, rounding="stochastic", lr=0.1, fused=fused)
        p.grad = torch.ones(40)
        optimizer.step()
        p.data[3] = float("nan")
        if name != "lion":  # the sign of NaN is 0, in torch as here
            p.grad[7] = float("nan")
        optimizer.step()
        assert p[3].isnan()
        assert p.isnan().sum() == (1 if name == "lion" else 2)


@pytest.mark.parametrize(
    ("options", "make", "reason"),
    [
        ({}, lambda: torch.ones(4, dtype=torch.float64), "float64"),
        ({}, lambda: torch.ones(4, 4).t()[:, :2], "not contiguous"),
        ({"moment_format": "BF16"}, lambda: torch.ones(4), "moments have a format"),
        ({"format": get_format("E4M3").without_subnormals()}, lambda: torch.ones(4), "gap around zero"),
        ({"track_movement": True}, lambda: torch.ones(4), "no fused step"),
    ],
    ids=["float64", "strided", "moments", "gap", "movement"],
)
def test_fused_true_says_why_not(options, make, reason):
    p = Parameter(make())
    p.grad = torch.ones_like(p)
    with pytest.raises(OptionError, match=reason):
        make_optimizer("manifold_adamw", [p], **{"format": "E4M3", **options}, fused=True).step()
    make_optimizer("manifold_adamw", [p], **{"format": "E4M3", **options}).step()


NAMES = sorted(name for name, row in OPTIMIZERS.items() if issubclass(row.cls, GridOptimizer))
NOT_FUSED = {"lmd"}
FOLLOWS_SIGNS = ("lion", "lmd", "signsgd")  # their rule has a step of one size, whatever the gradient's


def stepped_element(name, fused, weight=None, gradient=None, **options):
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
    fused = fused and name not in NOT_FUSED
    make_optimizer(name, [p], lr=LR[OPTIMIZERS[name].lr_unit], rounding=rounding, fused=fused, **options).step()
    return p.detach()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest_even"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_an_inf_weight_stays_nonfinite(name, fused, rounding):
    for weight in (float("inf"), float("-inf"), float("nan")):
        after = stepped_element(name, fused, weight=weight, rounding=rounding)
        assert not after[3].isfinite(), weight
        assert after.isfinite().sum() == 63 or name == "madam", weight  # Madam's bound is an average of the weights


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FOLLOWS_SIGNS])
def test_an_inf_gradient_leaves_a_nonfinite_weight(name, fused):
    for gradient in (float("inf"), float("-inf"), float("nan")):
        after = stepped_element(name, fused, gradient=gradient)
        assert not after[3].isfinite(), gradient
        assert after.isfinite().sum() == 63, gradient


def test_codes_that_are_rounded_without_bias_keep_an_inf():
    assert not stepped_element("grid_optim", False, gradient=float("inf"), unbiased="code")[3].isfinite()


@pytest.mark.parametrize("fused", [True, False])
def test_a_finite_target_beyond_max_becomes_max(fused):
    assert stepped_element("grid_optim", fused, gradient=-1e9)[3] == 448


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
