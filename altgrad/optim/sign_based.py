"""Sign-like baselines: updates of one size for every weight, so in grid steps they are large for small weights.

The sign of NaN is 0, as in torch: a weight whose average is NaN stands still. Check gradients before such a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from altgrad.optim import moments
from altgrad.optim.base import GridOptimizer, Slot, check_range
from altgrad.optim.kernels import fused
from altgrad.optim.manifold_adamw import check_adam
from altgrad.randomness import step_key


class _SignBased(GridOptimizer):
    """One moment, a sign, decoupled decay."""

    def _fuse(self, group: dict[str, Any], slot: Slot, rule: int, keep: float, rest2: float) -> Tensor | None:
        moments.create(slot.state, "exp_avg", slot.weight, None)
        lr = float(group["lr"])
        decayed = 1 - lr * group["weight_decay"]
        average = slot.state["exp_avg"]
        landing = self._fused_landing(group, slot)
        return fused.run(slot, average, rule=rule, **landing, keep=keep, rest2=rest2, size=-lr, decayed=decayed)

    @staticmethod
    def _averages(group: dict[str, Any], slots: list[Slot]) -> list[Tensor]:
        fmt = moments.moment_formats(group["moment_format"])[0]
        for slot in slots:
            moments.create(slot.state, "exp_avg", slot.weight, fmt)
        return [moments.read(slot.state, "exp_avg", slot.weight, fmt) for slot in slots]

    @staticmethod
    def _keep(group: dict[str, Any], slots: list[Slot], averages: list[Tensor]) -> None:
        fmt = moments.moment_formats(group["moment_format"])[0]
        for slot, value in zip(slots, averages):
            key = step_key(group["seed"], slot.index, slot.step, "exp_avg")
            moments.write(slot.state, "exp_avg", value, fmt, group["moment_rounding"], key)

    @staticmethod
    def _descend(group: dict[str, Any], slots: list[Slot], directions: list[Tensor]) -> None:
        weights, lr = [slot.weight for slot in slots], float(group["lr"])
        if group["weight_decay"] != 0:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, torch._foreach_sign(directions), alpha=-lr)


class Lion(_SignBased):
    """w' = w - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * w), then m' = beta2 * m + (1 - beta2) * g.

    lr is a real distance, about a third to a tenth of AdamW's. Source: Chen et al. 2023, arXiv:2302.06675.
    """

    def __init__(
        self,
        params: Iterable,
        format: str | None = None,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"format": format, "lr": lr, "betas": betas, "weight_decay": weight_decay, **options})

    def _check(self, group: dict[str, Any]) -> None:
        check_adam(group)

    def _fused(self, group: dict[str, Any], slot: Slot) -> Tensor | None:
        return self._fuse(group, slot, fused.LION, 1 - group["betas"][0], 1 - group["betas"][1])

    def _attempt(self, group: dict[str, Any], slots: list[Slot]) -> None:
        (beta1, beta2), grads = group["betas"], [slot.grad for slot in slots]
        averages = self._averages(group, slots)
        directions = torch._foreach_lerp(averages, grads, 1 - beta1)
        torch._foreach_lerp_(averages, grads, 1 - beta2)
        self._keep(group, slots, averages)
        self._descend(group, slots, directions)


class SignSGD(_SignBased):
    """w' = w - lr * (sign(m) + weight_decay * w), m = momentum * m + (1 - momentum) * g (Signum; signSGD at momentum 0).

    lr is a real distance. Source: Bernstein et al. 2018, arXiv:1802.04434.
    """

    def __init__(
        self,
        params: Iterable,
        format: str | None = None,
        lr: float = 1e-4,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            params, {"format": format, "lr": lr, "momentum": momentum, "weight_decay": weight_decay, **options}
        )

    def _check(self, group: dict[str, Any]) -> None:
        check_range(group, "momentum", 0, 1)
        check_range(group, "weight_decay", 0)

    def _fuses(self, group: dict[str, Any], slot: Slot) -> bool:
        return group["momentum"] > 0

    def _fused(self, group: dict[str, Any], slot: Slot) -> Tensor | None:
        return self._fuse(group, slot, fused.SIGN, 1 - group["momentum"], 0.0)

    def _attempt(self, group: dict[str, Any], slots: list[Slot]) -> None:
        grads = [slot.grad for slot in slots]
        if group["momentum"] == 0:
            return self._descend(group, slots, grads)
        averages = self._averages(group, slots)
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        self._keep(group, slots, averages)
        return self._descend(group, slots, averages)
