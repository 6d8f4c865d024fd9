"""Log-normal multiplicative dynamics: weights as differences of two positive halves that move by factors.

Source: Nishida et al. 2025, arXiv:2506.17768, in what its abstract and public summaries and reviews say: each weight is the
difference of two positive numbers (the EG+- trick), each log-normal around its median, so noise is a factor; the gradient of a
half is scaled by it; the step has the size of a sign; regularization is a factor as well; one average is kept. The
algorithm's listing and its constants were not at hand. Where they were needed the choice is AltGrad's, and said so
below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from altgrad.errors import OptionError
from altgrad.optim import moments
from altgrad.optim.base import GridOptimizer, Slot, check_range
from altgrad.optim.manifold_adamw import check_adam
from altgrad.quantization.checks import as_key
from altgrad.randomness import random_bits, step_key

HALVES = ("plus", "minus")
OF_ZEROS = 0.02  # the rms that stands for that of a parameter of zeros: as GPT-2's weights start


class LMD(GridOptimizer):
    """w = m+ e+ - m- e-, with log e ~ N(0, noise^2) drawn anew at each step, and for each half, of the sign s = +1 or -1:

        u = beta1 v + (1 - beta1) s m e g,    v' = beta2 v + (1 - beta2) s m e g
        m' = m exp(-lr (sign(u) + weight_decay log(m / c)))

    Args:
        lr: logarithm of a half's factor per step; a weight near zero moves by 2 lr c.
        betas: of the direction and of the average, as in Lion, whose 0.99 remembers too long: the pull on a half falls
            with it (AltGrad's choice).
        weight_decay: pulls the medians to c, and so the weight to zero: the gradient of the divergence from a log-normal prior
            around c, without its constant (AltGrad's choice).
        noise: standard deviation of log e. 0, the default, draws nothing; the paper's value was not at hand. With noise the
            parameter holds the draw that the next gradient is of: `eval()` puts the mean weights in its place, `train()` the draw
            back (the trainer does so around an evaluation). Not on a grid, nor where FSDP2 spreads parameters.
        spread: c over the root mean square of the first weights; m+ m- starts at c^2 (AltGrad's choice).
        options: those of every grid optimizer (`GridOptimizer`). The medians are kept in full: on a grid they act as masters.

    A parameter of zeros starts as if its rms were 0.02. What others write into a parameter later is overwritten by its next step.
    """

    def __init__(
        self,
        params: Iterable,
        format: str | None = None,
        lr: float = 1e-2,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        noise: float = 0.0,
        spread: float = 0.5,
        **options: Any,
    ) -> None:
        self._drawn: dict[Tensor, Tensor] = {}
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "noise": noise, "spread": spread}
        super().__init__(params, {"format": format, **defaults, **options})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._drawn = {}

    def _check(self, group: dict[str, Any]) -> None:
        check_adam(group)
        check_range(group, "noise", 0, math.inf)
        check_range(group, "spread", 0, math.inf)
        if not group["spread"] > 0:
            raise OptionError("spread 0: a weight at zero would never move; use 0.5")

    def _fuses(self, group: dict[str, Any], slot: Slot) -> bool:
        return False

    @torch.no_grad()
    def eval(self) -> None:
        """Put mean weights in the place of drawn ones until `train`; nothing happens without noise, or when called again."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if group["noise"] and "plus" in state and parameter not in self._drawn:
                    self._drawn[parameter] = parameter.detach().clone()
                    parameter.copy_((state["plus"] - state["minus"]) * math.exp(group["noise"] ** 2 / 2))

    @torch.no_grad()
    def train(self) -> None:
        """Put drawn weights back."""
        for parameter, drawn in self._drawn.items():
            parameter.copy_(drawn)
        self._drawn = {}

    def step(self, closure: Any = None) -> Any:
        """As of every grid optimizer; drawn weights are put back first."""
        self.train()
        return super().step(closure)

    def _attempt(self, group: dict[str, Any], slots: list[Slot]) -> None:
        for slot in slots:
            if group["noise"] and (slot.grid is not None or hasattr(slot.weight, "device_mesh")):
                why = "is spread over processes" if slot.grid is None else "has a grid"
                raise OptionError(
                    f"noise {group['noise']}: parameter {slot.index} {why}, where none is drawn; use noise 0"
                )
        for slot in slots:
            self._move(group, slot)

    def _move(self, group: dict[str, Any], slot: Slot) -> None:
        state, noise, moved = slot.state, group["noise"], None
        if "plus" not in state:
            _split(state, slot.weight, group["spread"])
        halves: list[Tensor] = []
        for sign, half in zip((1.0, -1.0), HALVES, strict=True):
            median = state[half]
            value = (
                median * _factors(group, slot, half, slot.step) if noise and slot.step > int(state["drawn"]) else median
            )
            direction = self._direction(group, slot, half, slot.grad * value * sign).sign_()
            if group["weight_decay"]:
                direction += group["weight_decay"] * torch.log(median / state["center"])
            now = median * torch.exp(direction.mul_(-float(group["lr"])))
            moved = now != median if moved is None else moved | (now != median)
            median.copy_(now)
            halves.append(now * _factors(group, slot, half, slot.step + 1) if noise else now)
        drawn = halves[0] - halves[1]
        slot.weight.copy_(drawn if noise else torch.where(moved & ~slot.weight.isinf(), drawn, slot.weight))

    def _direction(self, group: dict[str, Any], slot: Slot, half: str, pull: Tensor) -> Tensor:
        (beta1, beta2), name = group["betas"], f"exp_avg_{half}"
        fmt = moments.moment_formats(group["moment_format"])[0]
        moments.create(slot.state, name, slot.weight, fmt)
        average = moments.read(slot.state, name, slot.weight, fmt)
        direction = torch.lerp(average, pull, 1 - beta1)
        average.lerp_(pull, 1 - beta2)
        key = step_key(group["seed"], slot.index, slot.step, name)
        moments.write(slot.state, name, average, fmt, group["moment_rounding"], key)
        return direction


def _split(state: dict[str, Any], weight: Tensor, spread: float) -> None:
    """Medians whose difference is the weight and whose product is the center's square."""
    size = torch.where(weight.isfinite(), weight, 0.0).double().square().mean().sqrt()
    center = (spread * torch.where(size > 0, size, OF_ZEROS)).to(weight.dtype)
    larger = (torch.sqrt(weight.square() + 4 * center.square()) + weight.abs()) / 2
    smaller = center.square() / larger
    state["plus"], state["minus"] = (torch.where(w >= 0, larger, smaller) for w in (weight, -weight))
    state["center"] = center
    state["drawn"] = state["step"].clone()  # the step whose weights were not drawn


def _factors(group: dict[str, Any], slot: Slot, half: str, step: int) -> Tensor:
    """Log-normal numbers of median 1 that a step's weights are drawn with, by Box and Muller's transform of counted bits."""
    key, n = as_key(step_key(group["seed"], slot.index, step, half)), slot.weight.numel()
    assert key is not None
    uniform = (random_bits(key, 2 * n, 32).double() + 0.5) / 2.0**32
    normal = torch.sqrt(-2 * torch.log(uniform[:n])) * torch.cos(2 * math.pi * uniform[n:])
    return torch.exp(group["noise"] * normal).to(slot.weight).view_as(slot.weight)
