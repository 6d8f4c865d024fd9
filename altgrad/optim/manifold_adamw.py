"""ManifoldAdamW: AdamW whose learning rate is counted in grid steps, and its relatives that land on the grid.

The grid is a chart of the real line: the code position theta, in which neighbours are one apart everywhere. Small
weights have small steps, large weights large ones. An update of one grid step is 2^-M of a weight whatever its size
(until the subnormal range, where steps stop shrinking and zero can be crossed).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.errors import OptionError
from altgrad.optim.adam_math import PRECONDITIONS, adam_attempt, fused_adam, in_grid_steps
from altgrad.optim.base import GridOptimizer, Slot, check_range
from altgrad.optim.grid import position, spacing


class Movement(NamedTuple):
    """Signed movement of each weight in grid steps since tracking began, float64 of the weight's shape.

    attempted: sum over steps of attempted update / spacing there. realised: code position now minus that of the first
    weight, both on the present grid.
    """

    attempted: Tensor
    realised: Tensor


class ManifoldAdamW(GridOptimizer):
    """AdamW in code space: w moves by -lr * S(w) * m / (sqrt(v) + eps), with S the exact grid spacing at w.

    Args:
        params: parameters or groups, as for any torch optimizer.
        format: grid of parameters that no storage declared one for; None: such parameters need `off_grid_lr`.
        lr: in grid steps under "update" and "both": Adam's direction has size about 1, so lr = 0.5 moves a weight half a
            grid step. Storage that rounds to nearest then swallows every smaller step: store stochastically. A real
            distance, as in AdamW, under "none" and "gradient".
        betas, eps: as in AdamW. eps = 0 gives no update, rather than NaN, where no gradient was seen.
        weight_decay: decoupled; w loses lr * weight_decay * 2^-M of itself per step under "update" and "both",
            lr * weight_decay under "none" and "gradient".
        precondition: where the spacing S goes: "update" (onto the step), "both" (S * g into the moments, S onto the
            step, eps * S in the denominator), "gradient" (S * g into the moments only: Adam's normalisation cancels it;
            kept as the ablation), "none" (torch's AdamW).
        track_movement: keep the cumulative signed movement of each weight (`movement`); two more tensors per weight.
        options: those of every grid optimizer (`GridOptimizer`): scale, rounding, off_grid_lr, moment_format, ...

    On uniform grids (E0M7, E1M6) S is one constant, so "update" is AdamW at learning rate lr * S.
    """

    def __init__(
        self,
        params: Iterable,
        format: str | None = "E4M3",
        lr: float = 0.1,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        precondition: str = "update",
        track_movement: bool = False,
        **options: Any,
    ) -> None:
        defaults = {
            "format": format,
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition": precondition,
            "track_movement": track_movement,
            **options,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_adam(group)
        if group["precondition"] not in PRECONDITIONS:
            raise OptionError(f"precondition {group['precondition']!r} is not one of {', '.join(PRECONDITIONS)}")

    def _steps_along_grid(self, group: dict[str, Any]) -> bool:
        return in_grid_steps(group["precondition"]) or group["precondition"] == "gradient"

    def _fuses(self, group: dict[str, Any], slot: Slot) -> bool:
        return not group["track_movement"]

    def _fused(self, group: dict[str, Any], slot: Slot) -> Tensor | None:
        return fused_adam(group, slot, group["precondition"], self._fused_landing(group, slot))

    def _attempt(self, group: dict[str, Any], slots: list[Slot]) -> None:
        tracked = group["track_movement"]
        before = [slot.weight.clone() for slot in slots] if tracked else []
        adam_attempt(group, slots, precondition=group["precondition"])
        for slot, old in zip(slots, before):
            self._track(slot, old)

    @staticmethod
    def _track(slot: Slot, before: Tensor) -> None:
        if slot.grid is None:
            return
        if "movement" not in slot.state:
            slot.state["movement"] = torch.zeros_like(before)
            slot.state["movement_start"] = before.clone()
        slot.state["movement"] += (slot.weight - before) / spacing(before, slot.grid)

    def movement(self, parameter: Tensor) -> Movement | None:
        """Movement of a parameter's weights in grid steps; None without `track_movement` or before the first step."""
        state = self.state.get(parameter, {})
        if "movement" not in state:
            return None
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        grid = self._grid(group, parameter, state)
        if grid is None:
            return None
        start = position(state["movement_start"], grid)
        return Movement(state["movement"].double(), position(parameter.detach(), grid) - start)


class SRAdamW(ManifoldAdamW):
    """AdamW whose result is rounded stochastically to the grid: the plainest way to train without master weights.

    The rounding is unbiased, so steps far below a grid step still move weights on average. `lr` is a real distance.
    Source: Gupta et al. 2015, arXiv:1502.02551 (stochastic rounding of updates); Zamirai et al. 2020, arXiv:2010.06192
    (with AdamW in bfloat16).
    """

    def __init__(
        self,
        params: Iterable,
        format: str | None = None,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        rounding: str | None = "stochastic",
        **options: Any,
    ) -> None:
        options = {"precondition": "none", **options}
        super().__init__(
            params, format, lr, betas=betas, eps=eps, weight_decay=weight_decay, rounding=rounding, **options
        )


def check_adam(group: dict[str, Any]) -> None:
    """Refuse betas, eps (where there is one) or weight_decay out of range.

    Raises:
        OptionError: with value and range.
    """
    for beta in group["betas"]:
        if not 0 <= beta < 1:
            raise OptionError(f"betas {group['betas']} must both be in [0, 1)")
    for option in ("eps", "weight_decay"):
        if option in group:
            check_range(group, option, 0)
