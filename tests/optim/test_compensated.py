"""Kahan and ECO: what rounding took away comes back; what saturates does not pile up."""

import pytest
import torch
from torch.nn import Parameter

from altgrad.errors import OptionError
from altgrad.optim import ECO, KahanAdamW, SRAdamW, spacing
from altgrad.quantization import get_format, quantize
from altgrad.quantization.parameter_grid import ParameterGrid


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
