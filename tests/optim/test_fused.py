"""The fused CPU steps against the plain torch path: same state, same landing, an ulp of the attempted weight."""

import pytest
import torch
from torch.nn import Parameter

from altgrad.errors import OptionError
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


def test_every_optimizer_has_a_fused_step():
    assert {name for name, _ in CASES} == {n for n, row in OPTIMIZERS.items() if issubclass(row.cls, GridOptimizer)}


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
