"""Multiplicative optimizers: Madam, and its form for logarithmic grids such as E7M0.

Weights move by factors, in proportion to their own size, so on a logarithmic grid every step is a number of codes.
Neither changes a weight's sign, and a weight at zero stays at zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from altgrad.errors import FormatError
from altgrad.optim import moments
from altgrad.optim.base import GridOptimizer, Slot, check_range
from altgrad.optim.kernels import fused
from altgrad.quantization.checks import as_key
from altgrad.randomness import random_bits as draw_bits
from altgrad.randomness import step_key


def _normalised(group: dict[str, Any], slots: list[Slot]) -> list[Tensor]:
    """g / sqrt(v), v the bias-corrected average of g^2, clamped to +-g_bound; 0 where no gradient was seen."""
    fmt, beta = moments.moment_formats(group["moment_format"])[1], group["beta"]
    for slot in slots:
        moments.create(slot.state, "exp_avg_sq", slot.weight, fmt)
    grads = [slot.grad for slot in slots]
    second = [moments.read(slot.state, "exp_avg_sq", slot.weight, fmt) for slot in slots]
    torch._foreach_mul_(second, beta)
    torch._foreach_addcmul_(second, grads, grads, value=1 - beta)
    for slot, value in zip(slots, second):
        key = step_key(group["seed"], slot.index, slot.step, "exp_avg_sq")
        moments.write(slot.state, "exp_avg_sq", value, fmt, group["moment_rounding"], key)
    sizes = torch._foreach_div(second, [1 - beta ** slot.age("second") for slot in slots])
    torch._foreach_sqrt_(sizes)
    for size in sizes:
        size.masked_fill_(size == 0, torch.inf)
    pulls = torch._foreach_div(grads, sizes)
    torch._foreach_clamp_min_(pulls, -group["g_bound"])
    torch._foreach_clamp_max_(pulls, group["g_bound"])
    return pulls


def _bound(group: dict[str, Any], slot: Slot) -> Tensor:
    """Largest magnitude that a weight of this parameter may take: p_scale * rms of the first weights."""
    if "bound" not in slot.state:
        slot.state["bound"] = group["p_scale"] * slot.weight.square().mean().sqrt()
    return slot.state["bound"]


class Madam(GridOptimizer):
    """w' = w * exp(-lr * sign(w) * g / sqrt(v)), |w'| at most p_scale * rms(first w).

    Args:
        lr: logarithm of the typical factor per step.
        beta: decay of v, the average of g^2. p_scale, g_bound: bounds on weights and on normalised gradients.
        options: those of every grid optimizer (`GridOptimizer`); off_grid_lr trains parameters without a grid (such as
            zero-initialised biases, which Madam cannot move) with AdamW.

    Source: Bernstein et al. 2020, arXiv:2006.14560.
    """

    def __init__(
        self,
        params: Iterable,
        format: str | None = None,
        lr: float = 1e-2,
        *,
        beta: float = 0.999,
        p_scale: float = 3.0,
        g_bound: float = 10.0,
        **options: Any,
    ) -> None:
        super().__init__(
            params, {"format": format, "lr": lr, "beta": beta, "p_scale": p_scale, "g_bound": g_bound, **options}
        )

    def _check(self, group: dict[str, Any]) -> None:
        check_range(group, "beta", 0, 1)
        check_range(group, "p_scale", 0)
        check_range(group, "g_bound", 0)

    def _fused(self, group: dict[str, Any], slot: Slot) -> Tensor | None:
        return self._fuse(group, slot, fused.MADAM)

    def _fuse(self, group: dict[str, Any], slot: Slot, rule: int) -> Tensor | None:
        moments.create(slot.state, "exp_avg_sq", slot.weight, None)
        beta, bound = group["beta"], _bound(group, slot)
        return fused.run(
            slot,
            slot.state["exp_avg_sq"],
            rule=rule,
            **self._fused_landing(group, slot),
            beta2=beta,
            rest2=1 - beta,
            root=1 - beta ** slot.age("second"),
            size=-float(group["lr"]),
            clip=group["g_bound"],
            bound=float(bound),
        )

    def _attempt(self, group: dict[str, Any], slots: list[Slot]) -> None:
        bounds = [_bound(group, slot) for slot in slots]
        for slot, pull, bound in zip(slots, _normalised(group, slots), bounds):
            factor = torch.exp(pull.mul_(torch.sign(slot.weight)).mul_(-float(group["lr"])))
            moved = slot.weight * factor
            torch.minimum(torch.maximum(moved, -bound, out=moved), bound, out=moved)
            slot.weight.copy_(torch.where(slot.weight.isinf(), slot.weight, moved))


class LNSMadam(Madam):
    """Madam in a logarithmic number system: log2|w|' = log2|w| - lr * sign(w) * g / sqrt(v), rounded to whole exponents.

    Args:
        format: a format of powers of two (no mantissa bits, such as E7M0): its grid steps are the exponents.
        lr: in exponents (grid steps) per step.
        rounding: of the exponent: "stochastic" (unbiased in the exponent), "nearest_even", or None (the weight takes the
            unrounded power; storage rounds it, by value).
        others: as in `Madam`.

    Exponents stay within the format's smallest and largest; signs and zeros stay.
    Source: Zhao et al. 2022, LNS-Madam, arXiv:2106.13914 (base factor 1; there the exponent is rounded to nearest).
    """

    needs_grid = True

    def __init__(
        self,
        params: Iterable,
        format: str | None = "E7M0",
        lr: float = 2.0**-7,
        *,
        rounding: str | None = "stochastic",
        **options: Any,
    ) -> None:
        super().__init__(params, format, lr, rounding=rounding, **options)

    def _step_group(self, group: dict[str, Any], slots: list[Slot]) -> None:
        for slot in slots:
            fmt = slot.grid.format if slot.grid is not None else None
            if fmt is None or fmt.mantissa_bits or fmt.bias is None:
                raise FormatError(f"LNSMadam steps along powers of two; parameter {slot.index} is on {fmt}: use E7M0")
        super()._step_group(group, slots)

    def _fuses(self, group: dict[str, Any], slot: Slot) -> bool:
        return group["rounding"] is not None

    def _fused(self, group: dict[str, Any], slot: Slot) -> Tensor | None:
        return self._fuse(group, slot, fused.LNS)

    def _plain(self, group: dict[str, Any], slots: list[Slot]) -> None:
        bounds = [_bound(group, slot) for slot in slots]
        for slot, pull, bound in zip(slots, _normalised(group, slots), bounds):
            self._move(group, slot, pull, bound)

    def _move(self, group: dict[str, Any], slot: Slot, pull: Tensor, bound: Tensor) -> None:
        assert slot.grid is not None
        fmt, scale, before = slot.grid.format, slot.grid.scale, slot.weight.clone()
        start = torch.log2((before.double() / scale).abs())
        aim = start - float(group["lr"]) * pull.double() * torch.sign(before)
        aim = torch.where(aim > start, torch.minimum(aim, torch.log2(bound.double() / scale)).maximum(start), aim)
        exponent = self._rounded_exponent(group, slot, aim)
        exponent = exponent.clamp(float(fmt.emin), float(fmt.emax))
        target = torch.copysign(torch.exp2(exponent) * scale, before.double())
        landed = torch.where((before == 0) | before.isinf(), before.double(), target).to(before.dtype)
        if group["rounding"] is not None:
            attempted = torch.copysign(torch.exp2(aim) * scale, before.double())
            self._count(slot, before, torch.where(aim == start, before.double(), attempted), landed)
        slot.weight.copy_(landed)

    @staticmethod
    def _rounded_exponent(group: dict[str, Any], slot: Slot, aim: Tensor) -> Tensor:
        if group["rounding"] is None:
            return aim
        if group["rounding"] == "nearest_even":
            return aim.round()
        key = as_key(step_key(group["seed"], slot.index, slot.step, "weight"))
        assert key is not None
        below = aim.floor()
        drawn = draw_bits(key, aim.numel(), 32).view(aim.shape).to(aim.device)
        return below + (((aim - below) * 2.0**32).floor() + drawn >= 2.0**32)
