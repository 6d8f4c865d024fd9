"""AdamW on a grid without master weights, with the rounding error remembered: in a buffer (Kahan) or in the momentum (ECO).

Both round to nearest by default, lose a step below half a grid step, and get it back later, because what was lost is
added to what comes next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from altgrad.errors import OptionError
from altgrad.optim import moments
from altgrad.optim.adam_math import adam_attempt, fused_adam, keep_moments
from altgrad.optim.base import GridOptimizer, Slot, portable_format
from altgrad.optim.kernels import fused
from altgrad.optim.manifold_adamw import check_adam


class _AdamWOnGrid(GridOptimizer):
    """AdamW that always lands on the grid itself, because it needs the rounding error."""

    rounds_itself = True

    def __init__(
        self,
        params: Iterable,
        format: str | None = None,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        rounding: str | None = "nearest_even",
        **options: Any,
    ) -> None:
        defaults = {
            "format": format,
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rounding": rounding,
            **options,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_adam(group)

    def _land_in_range(
        self, group: dict[str, Any], slot: Slot, before: Tensor, attempted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(landed, attempted within range): where a weight may be, and the aim without what lies beyond max.

        What saturates is dropped, not remembered: an error that can never be worked off would grow without end.
        Parameters without a grid land on the values of their own dtype.
        """
        if slot.grid is None:
            return attempted.to(slot.parameter.dtype).to(attempted.dtype), attempted
        landed = self._rounded(group, slot, attempted)
        self._count(slot, before, attempted, landed)
        limit = slot.grid.format.max * slot.grid.scale
        return landed, torch.maximum(torch.minimum(attempted, torch.as_tensor(limit)), torch.as_tensor(-limit))


class KahanAdamW(_AdamWOnGrid):
    """AdamW with Kahan-compensated weights: c holds what rounding took away, w' = round(w + (u + c)).

    Args:
        compensation_format: format of the buffer c (one per weight); BF16 as usual. "FP32" makes w + c nearly a
            float32 master weight.
        others: as in AdamW and `GridOptimizer`; lr is a real distance.

    Parameters without a grid are compensated for the rounding to their own dtype (bfloat16, float16; float32, too).
    Source: Zamirai et al. 2020, arXiv:2010.06192, algorithm 5; as in the optimi package.
    """

    def __init__(
        self,
        params: Iterable,
        format: str | None = None,
        lr: float = 1e-3,
        *,
        compensation_format: str = "BF16",
        **options: Any,
    ) -> None:
        super().__init__(params, format, lr, compensation_format=compensation_format, **options)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        group["compensation_format"] = portable_format(group["compensation_format"])

    def _fuses(self, group: dict[str, Any], slot: Slot) -> bool:
        return slot.grid is not None and group["compensation_format"] == "BF16"

    def _fused(self, group: dict[str, Any], slot: Slot) -> Tensor | None:
        moments.create(slot.state, "compensation", slot.weight, moments.moment_format("BF16"))
        landing = {**self._fused_landing(group, slot), "landing": fused.KAHAN}
        return fused_adam(group, slot, "none", landing, slot.state["compensation"])

    def _plain(self, group: dict[str, Any], slots: list[Slot]) -> None:
        fmt = moments.moment_format(group["compensation_format"])
        updates = [torch.zeros_like(slot.weight) for slot in slots]
        adam_attempt(group, slots, bases=updates)
        for slot, update in zip(slots, updates):
            moments.create(slot.state, "compensation", slot.weight, fmt)
            total = moments.read(slot.state, "compensation", slot.weight, fmt) + update
            landed, aimed = self._land_in_range(group, slot, slot.weight, slot.weight + total)
            # w + total may round, and saturate: what landed short of the aim is total - (landed - w) while in range
            within = aimed == slot.weight + total
            lost = torch.where(within, total - (landed - slot.weight), aimed - landed)
            if fmt is None:
                slot.state["compensation"].copy_(lost)
            else:
                moments.write(slot.state, "compensation", lost, fmt, "nearest_even", None)
            slot.weight.copy_(landed)


class ECO(_AdamWOnGrid):
    """AdamW that feeds the quantization error of the weights into its momentum: no buffer at all beyond AdamW's.

    With e = attempted - landed, the first moment gets (1 - beta1^t) / lr * (1 - 1 / beta1) * (sqrt(v) + eps) * e added
    (v bias-corrected), so that the following steps give e back: e (1 - beta1) (1 + beta1 + beta1^2 + ...) = e at a
    steady v and lr. Deterministic with rounding="nearest_even", and with "stochastic" the paper's better variant.
    Source: Nikdan et al. 2026, arXiv:2601.22101, algorithm for Adam.
    """

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not group["betas"][0] > 0:
            raise OptionError(f"betas {group['betas']}: ECO keeps the error in the momentum, so beta1 must be above 0")

    def _fused(self, group: dict[str, Any], slot: Slot) -> Tensor | None:
        landing = self._fused_landing(group, slot)
        if slot.grid is not None:
            landing["landing"] = fused.ECO
        return fused_adam(group, slot, "none", landing)

    def _plain(self, group: dict[str, Any], slots: list[Slot]) -> None:
        beta1, lr = group["betas"][0], float(group["lr"])
        before = [slot.weight.clone() for slot in slots]
        first, second, denominators = adam_attempt(group, slots, keep=False)
        for slot, old, average, denominator in zip(slots, before, first, denominators):
            landed, aimed = self._land_in_range(group, slot, old, slot.weight)
            if lr > 0:
                share = (1 - beta1 ** slot.age("first")) / lr * (1 - 1 / beta1)
                finite = torch.where(torch.isinf(denominator), 0.0, denominator)
                average.addcmul_(finite, aimed - landed, value=share)
            slot.weight.copy_(landed)
        keep_moments(group, slots, first, second)
