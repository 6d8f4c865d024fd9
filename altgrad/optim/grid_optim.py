"""GridOptim: momentum SGD in grid steps, the steps of the weight's own grid, rounded without bias to actual neighbours.

A step asks for r grid steps, the distance d = r * S(w). The target w + d lies between two neighbours on the grid, a below
and b above, and becomes b with probability (w + d - a) / (b - a): E[w'] = w + d, also at the edge of a binade, where
at |w| = 2^k the gap below is only S / 2. Rounding *codes* instead makes E[code'] = code + r, which is biased in value
wherever the two gaps differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from altgrad.errors import OptionError
from altgrad.optim import moments
from altgrad.optim.base import GridOptimizer, Slot, check_range
from altgrad.optim.grid import position, spacing, value_at
from altgrad.optim.kernels import fused
from altgrad.quantization.checks import as_key
from altgrad.randomness import random_bits as draw_bits
from altgrad.randomness import step_key


class GridOptim(GridOptimizer):
    """Momentum SGD in grid steps: buf = momentum * buf + g, r = -lr * buf, w' = round(w + r * S(w)).

    Args:
        params: parameters or groups, as for any torch optimizer.
        format: grid of parameters that no storage declared one for; None: such parameters need `off_grid_lr`.
        lr: grid steps per unit of momentum (of its root mean square under normalize="rms").
        momentum, nesterov: as in `torch.optim.SGD`.
        weight_decay: decoupled; w loses lr * weight_decay * 2^-M of itself per step.
        step_clip: largest |r|; None does not clip. `rung_clip` is its former name.
        normalize: None, or "rms": divide the momentum by its root mean square over the tensor, so that lr is the
            typical number of grid steps per step whatever the gradient's size.
        master: keep a float32 master weight; the step is added to it and the parameter is its rounding.
        unbiased: "value" (E[w'] = w + d) or "code" (E[code'] = code + r).
        rounding: "stochastic", "nearest_even", or None (the parameter takes the target; storage rounds it).
        options: those of every grid optimizer (`GridOptimizer`).

    The rounding is exact to 2^-32 of a gap, barring saturation at max and clipping; the target is formed in float64.
    In formats without small steps (E7M0: the gap next to 2^k is 2^k) weights rarely cross zero: see the sign flips in
    `grid_step_counts`, which with `last_step_stats` tells attempted updates and flips of each step.
    """

    needs_grid = True
    random_bits = 32

    def __init__(
        self,
        params: Iterable,
        format: str | None = "E4M3",
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        step_clip: float | None = None,
        normalize: str | None = None,
        master: bool = False,
        unbiased: str = "value",
        rounding: str | None = "stochastic",
        rung_clip: float | None = None,
        **options: Any,
    ) -> None:
        defaults = {
            "format": format,
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "step_clip": rung_clip if step_clip is None else step_clip,
            "normalize": normalize,
            "master": master,
            "unbiased": unbiased,
            "rounding": rounding,
            **options,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_range(group, "momentum", 0, 1)
        check_range(group, "weight_decay", 0)
        if group["step_clip"] is not None and not group["step_clip"] > 0:
            raise OptionError(f"step_clip {group['step_clip']!r} must be above 0, or None")
        if group["normalize"] not in (None, "rms"):
            raise OptionError(f'normalize {group["normalize"]!r} is not one of None, "rms"')
        if group["unbiased"] not in ("value", "code"):
            raise OptionError(f'unbiased {group["unbiased"]!r} is not one of "value", "code"')
        if group["unbiased"] == "code" and (group["master"] or group["rounding"] is None):
            raise OptionError('unbiased="code" rounds codes: it needs a rounding, and no master')

    def _fuses(self, group: dict[str, Any], slot: Slot) -> bool:
        both = group["nesterov"] and group["normalize"] is not None
        return group["unbiased"] == "value" and not group["master"] and not both and not self._exceeds(slot)

    @staticmethod
    def _exceeds(slot: Slot) -> bool:
        """Whether grid steps with 32 bits after the point outgrow float64's whole numbers."""
        return slot.grid is None or slot.grid.format.mantissa_bits > 18

    def _plain(self, group: dict[str, Any], slots: list[Slot]) -> None:
        for slot, pull in zip(slots, self._pulls(group, slots)):
            self._move(group, slot, pull)

    def _fused(self, group: dict[str, Any], slot: Slot) -> Tensor | None:
        assert slot.grid is not None
        lr, momentum = float(group["lr"]), group["momentum"]
        along, pull, rms = slot.grad, fused.READY, 1.0
        if momentum > 0:
            moments.create(slot.state, "momentum", slot.weight, None)
            along, pull = slot.state["momentum"], fused.NESTEROV if group["nesterov"] else fused.MOMENTUM
        if group["normalize"] == "rms":
            if momentum > 0:
                fused.run(slot, along, rule=fused.GATHER, keep=momentum)
            pull, rms = fused.READY, float(self._sizes([along])[0])
        return fused.run(
            slot,
            along,
            rule=fused.GRID_STEPS,
            spacing=True,
            pull=pull,
            **self._fused_landing(group, slot),
            keep=momentum,
            rms=rms,
            size=-lr,
            decayed=lr * group["weight_decay"] * 2.0**-slot.grid.format.mantissa_bits,
            clip=float("inf") if group["step_clip"] is None else group["step_clip"],
        )

    @staticmethod
    def _sizes(pulls: list[Tensor]) -> list[Tensor]:
        """The root mean square of each tensor, 1 for tensors of zeros."""
        sizes = [norm / pull.numel() ** 0.5 for norm, pull in zip(torch._foreach_norm(pulls), pulls)]
        return [torch.where(size > 0, size, 1.0) for size in sizes]

    @staticmethod
    def _pulls(group: dict[str, Any], slots: list[Slot]) -> list[Tensor]:
        """The (normalised) momentum of every slot; buffers are updated."""
        fmt = moments.moment_formats(group["moment_format"])[0]
        grads = [slot.grad for slot in slots]
        if group["momentum"] == 0:
            pulls = grads
        else:
            for slot in slots:
                moments.create(slot.state, "momentum", slot.weight, fmt)
            buffers = [moments.read(slot.state, "momentum", slot.weight, fmt) for slot in slots]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            for slot, buffer in zip(slots, buffers):
                key = step_key(group["seed"], slot.index, slot.step, "momentum")
                moments.write(slot.state, "momentum", buffer, fmt, group["moment_rounding"], key)
            pulls = torch._foreach_add(grads, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers
        if group["normalize"] == "rms":
            pulls = torch._foreach_div(pulls, GridOptim._sizes(pulls))
        return pulls

    @staticmethod
    def _base(group: dict[str, Any], slot: Slot) -> Tensor:
        """What the step is added to: the master, or the weight."""
        if not group["master"]:
            return slot.weight
        if "master" not in slot.state:
            slot.state["master"] = slot.weight.clone()
        return slot.state["master"]

    def _move(self, group: dict[str, Any], slot: Slot, pull: Tensor) -> None:
        assert slot.grid is not None
        base = self._base(group, slot)
        grid_steps = pull * -float(group["lr"])
        if group["step_clip"] is not None:
            slot.clipped = (grid_steps.abs() > group["step_clip"]).sum()
            grid_steps = grid_steps.clamp(-group["step_clip"], group["step_clip"])
        decay = float(group["lr"]) * group["weight_decay"] * 2.0**-slot.grid.format.mantissa_bits
        if group["unbiased"] == "code":
            attempted, landed = self._round_codes(group, slot, grid_steps, decay)
        else:
            step = grid_steps * spacing(base, slot.grid)
            if decay:
                step = step - base * decay
            if group["master"]:
                attempted = base.add_(step)
            else:
                attempted = base.double() + step.double()
            landed = attempted if group["rounding"] is None else self._rounded(group, slot, attempted)
        if group["rounding"] is not None:
            self._count(slot, slot.weight, attempted, landed.to(slot.weight.dtype))
        slot.weight.copy_(landed)

    def _round_codes(
        self, group: dict[str, Any], slot: Slot, grid_steps: Tensor, decay: float
    ) -> tuple[Tensor, Tensor]:
        """(target, landed) with the code rounded: floor of code + r, one more with probability of the rest."""
        assert slot.grid is not None
        start = position(slot.weight, slot.grid)
        target = start + grid_steps.double()
        if decay:
            target = target - decay * slot.weight.double() / spacing(slot.weight, slot.grid).double()
        if group["rounding"] == "stochastic":
            key = as_key(step_key(group["seed"], slot.index, slot.step, "weight"))
            assert key is not None
            below = target.floor()
            drawn = draw_bits(key, target.numel(), self.random_bits).view(target.shape).to(target.device)
            up = ((target - below) * 2.0**self.random_bits).floor() + drawn >= 2.0**self.random_bits
            index = below + up
        else:
            index = target.round()
        attempted = slot.weight.double() + (target - start) * spacing(slot.weight, slot.grid).double()
        return attempted, torch.where(torch.isfinite(target), value_at(index, slot.grid), target)
