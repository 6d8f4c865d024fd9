"""Moments kept in a format, and compensated sums: what nearest rounding would freeze."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from altgrad.errors import CodeError, FormatError, OptionError
from altgrad.optim import (
    ECO,
    OPTIMIZERS,
    KahanAdamW,
    ManifoldAdamW,
    SRAdamW,
    make_optimizer,
    moments,
    reset_moments,
    spacing,
    state_bytes,
)
from altgrad.optim.resets import KEPT_AS
from altgrad.quantization import get_format, quantize
from altgrad.quantization.parameter_grid import ParameterGrid
from tests.optim.test_battery import FORMULAS, gradients, options_of, run, start


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


def test_the_states_are_ms_amps_of_o2():
    """m in E4M3 and v in FP16 under s = 2^floor(log2(max / amax)); the update takes the moments before they are rounded."""

    def kept(x, fmt):
        s = 2.0 ** torch.floor(torch.log2(torch.tensor(get_format(fmt).max) / x.abs().max()))
        return quantize(x * s, fmt) / s, float(s)

    g = torch.Generator().manual_seed(2)
    w = Parameter(torch.randn(50, generator=g))
    optimizer = SRAdamW([w], lr=0.01, weight_decay=0.0, rounding=None, moment_format=("E4M3", "FP16"))
    weight, m, v = w.detach().clone(), torch.zeros(50), torch.zeros(50)
    for step in (1, 2, 3):
        w.grad = torch.randn(50, generator=g) * 10.0**-step
        optimizer.step()
        m, v = 0.9 * m + 0.1 * w.grad, 0.999 * v + 0.001 * w.grad**2
        update = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        weight = weight - 0.01 * update
        assert torch.allclose(w, weight, rtol=0, atol=1e-6)
        (m, _), (v, _) = kept(m, "E4M3"), kept(v, "FP16")
        for name, fmt, wanted in (("exp_avg", "E4M3", m), ("exp_avg_sq", "FP16", v)):
            held = moments.read(optimizer.state[w], name, w, get_format(fmt))
            assert torch.allclose(held, wanted, rtol=1e-6, atol=0)
    assert kept(torch.tensor([3.0]), "E4M3")[1] == 128


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


def descend(optimizer, w, steps, grad=1.0):
    for _ in range(steps):
        w.grad = torch.full_like(w, grad)
        optimizer.step()


@pytest.mark.parametrize(("cls", "steps", "goal"), [(KahanAdamW, 300, 0.7), (ECO, 400, 0.9)])
def test_steps_below_half_a_grid_step_are_not_lost(cls, steps, goal):
    """lr 1e-3 against gaps of 1/16: nearest rounding alone never moves. Kahan follows the exact path.

    ECO's momentum grows by (1 - beta1) / beta1 per stalled step, so it moves, but later: after 1/32 / (lr / 9) steps.
    """
    lost, kept = Parameter(torch.ones(8)), Parameter(torch.ones(8))
    descend(SRAdamW([lost], "E4M3", lr=1e-3, weight_decay=0.0, rounding="nearest_even"), lost, steps)
    descend(cls([kept], "E4M3", lr=1e-3, weight_decay=0.0), kept, steps)
    assert (lost == 1.0).all()
    assert torch.equal(quantize(kept.detach(), "E4M3"), kept)
    assert kept[0].item() == pytest.approx(goal, abs=0.0626)


def test_kahan_on_bfloat16_parameters_follows_float32():
    narrow, wide = Parameter(torch.ones(8, dtype=torch.bfloat16)), Parameter(torch.ones(8))
    plain = Parameter(torch.ones(8, dtype=torch.bfloat16))
    for cls, w in ((KahanAdamW, narrow), (KahanAdamW, wide), (SRAdamW, plain)):
        descend(cls([w], lr=1e-4, weight_decay=0.0), w, 400)
    assert (plain == 1.0).all()  # 1e-4 is below half of bfloat16's step: lost, every time
    assert narrow[0].item() == pytest.approx(wide[0].item(), abs=2.0**-8)
    assert wide[0].item() == pytest.approx(0.96, abs=1e-4)


def test_full_compensation_is_a_master_weight():
    """With a float32 buffer, the grid weight is always the rounding of AdamW's own path."""
    w, master = Parameter(torch.linspace(0.5, 2.0, 50)), Parameter(torch.linspace(0.5, 2.0, 50))
    w.data = quantize(w.data, "E3M4")
    master.data = w.detach().clone()
    a = KahanAdamW([w], "E3M4", lr=3e-3, weight_decay=0.0, compensation_format="FP32")
    b = torch.optim.AdamW([master], lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        g = torch.randn(50, generator=generator)
        for p, o in ((w, a), (master, b)):
            p.grad = g.clone()
            o.step()
    gap = (w.detach() - master.detach()).abs() / spacing(master.detach(), ParameterGrid(get_format("E3M4")))
    assert float(gap.max()) <= 0.51
    torch.testing.assert_close(w.detach() + a.state[w]["compensation"], master.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [KahanAdamW, ECO])
def test_saturation_does_not_wind_up(cls):
    w = Parameter(torch.full((4,), 447.0))
    optimizer = cls([w], "E4M3", lr=2.0, weight_decay=0.0)
    descend(optimizer, w, 60, grad=-1.0)
    assert (w == 448.0).all()
    assert optimizer.last_step_stats()["saturated"] == 4
    descend(optimizer, w, 200, grad=1.0)
    assert (w < 448.0).all()


def test_eco_skips_at_lr_zero_and_needs_momentum():
    w = Parameter(torch.ones(4))
    descend(ECO([w], "E4M3", lr=0.0), w, 2)
    assert torch.equal(w.detach(), torch.ones(4))
    with pytest.raises(OptionError, match="beta1"):
        ECO([w], "E4M3", betas=(0.0, 0.9))


# -- resets ---------------------------------------------------------------------------------------------------------------

# those whose rule rests on nothing but the weights and their moments (Madam's bound is set out of reach)
BY_MOMENTS_ALONE = {
    "adamw": {"lr": 0.01, "weight_decay": 0.1},
    "sgd": {"lr": 0.01},
    "sr_adamw": {"lr": 0.01, "weight_decay": 0.1, "rounding": None},
    "manifold_adamw": {"lr": 0.3, "format": "E4M3", "precondition": "both"},
    "grid_optim": {"lr": 0.2, "format": "E4M3", "rounding": None},
    "eco": {"lr": 0.01, "format": "E4M3"},
    "madam": {"lr": 0.05, "p_scale": 1e3},
    "lns_madam": {"lr": 0.25, "format": "E7M0", "rounding": None, "p_scale": 1e3},
    "lion": {"lr": 0.01, "weight_decay": 0.1},
    "signsgd": {"lr": 0.01},
}


@pytest.mark.parametrize(("name", "options"), BY_MOMENTS_ALONE.items(), ids=str)
def test_after_a_reset_the_rule_begins_anew_from_the_present_weights(name, options):
    w, grads = start(name, 60, torch.float64), gradients(60, 9, dtype=torch.float64)
    optimizer = make_optimizer(name, [w], **options)
    run(optimizer, [w], grads[:4])
    expected = FORMULAS[name][0](w.detach().numpy().copy(), grads[4:].numpy(), **options)
    reset_moments(optimizer)
    run(optimizer, [w], grads[4:])
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-11, atol=1e-14)


def test_one_moment_begins_anew_and_the_other_goes_on():
    """AdamW by hand, with a count for each: fused and plain."""
    grads, (beta1, beta2), lr = gradients(50, 8, dtype=torch.float64), (0.9, 0.99), 0.01
    for which in ("first", "second"):
        m, v, w, since = np.zeros(50), np.zeros(50), np.linspace(-1, 1, 50), {"first": 0, "second": 0}
        for t, g in enumerate(grads.numpy()):
            if t == 5:
                m, v = (m * 0, v) if which == "first" else (m, v * 0)
                since[which] = 5
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            hats = m / (1 - beta1 ** (t + 1 - since["first"])), v / (1 - beta2 ** (t + 1 - since["second"]))
            w = w - lr * hats[0] / (np.sqrt(hats[1]) + 1e-8)
        for dtype, fused in ((torch.float64, None), (torch.float32, True), (torch.float32, False)):
            p = Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64).to(dtype))
            more = {"betas": (beta1, beta2), "weight_decay": 0.0, "rounding": None, "fused": fused}
            optimizer = make_optimizer("sr_adamw", [p], lr=lr, **more)
            run(optimizer, [p], grads[:5])
            reset_moments(optimizer, which)
            resumed = make_optimizer("sr_adamw", [p], lr=lr, **more)
            resumed.load_state_dict(optimizer.state_dict())  # the counts are part of the state
            run(resumed, [p], grads[5:])
            np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-11 if dtype == torch.float64 else 2e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_say_which_moments_there_are(name):
    w, row = start(name), OPTIMIZERS[name]
    optimizer = make_optimizer(name, [w], **options_of(name))
    run(optimizer, [w], gradients(200, 3))
    state = optimizer.state[w]
    assert {moment for moment, names in KEPT_AS.items() if any(n in state for n in names)} == set(row.moments)
    row.check_reset("both", optimizer)
    reset_moments(optimizer)
    assert all(not state[n].any() for names in KEPT_AS.values() for n in names if n in state)
    if len(row.moments) == 1:
        other = "second" if row.moments == ("first",) else "first"
        with pytest.raises(OptionError, match=f"{name} keeps no {other} moment"):
            row.check_reset(other, optimizer)
        with pytest.raises(OptionError, match=f"keeps no {other} moment that could begin anew under a name known here"):
            reset_moments(optimizer, other)
    elif name == "adamw":
        for refused in (lambda: row.check_reset("second", optimizer), lambda: reset_moments(optimizer, "first")):
            with pytest.raises(OptionError, match="take sr_adamw"):
                refused()
    with pytest.raises(OptionError, match="'third' are not one of both, first, second"):
        reset_moments(optimizer, "third")


def test_stalled_moments_move_again_after_a_reset():
    """BF16 under nearest rounding holds v far above the truth for good; begun anew every 200 steps it is nearer."""
    held = {}
    for every in (0, 200):
        w = Parameter(torch.zeros(500))
        optimizer = make_optimizer(
            "sr_adamw", [w], lr=1e-3, betas=(0.9, 0.999), rounding=None, moment_format=(None, "BF16")
        )
        for step, grad in enumerate(gradients(500, 800)):
            if every and step and step % every == 0:
                reset_moments(optimizer, "second")
            w.grad = grad
            optimizer.step()
        seen = every if every else 800
        held[every] = float(optimizer.state[w]["exp_avg_sq"].float().mean()) / (1 - 0.999**seen)
    assert abs(held[200] - 1) < abs(held[0] - 1) / 2
