"""AdamW with the grid spacing in it, over lists of tensors, in plain torch for any device.

With theta the code position of a weight w, dw / dtheta = S(w), the grid spacing. AdamW in code space moves theta by
-lr * m / (sqrt(v) + eps), so w by S times that. Where S goes decides everything, because Adam divides by the size of
what it averages: S on the gradient alone cancels.

    precondition   moments of   update                               decay of w
    none           g            -lr * m / (sqrt(v) + eps)            lr * wd           (torch's AdamW, same operations)
    update         g            -lr * S * m / (sqrt(v) + eps)        lr * wd * 2^-M
    both           S * g        -lr * S * m / (sqrt(v) + eps * S)    lr * wd * 2^-M
    gradient       S * g        -lr * m / (sqrt(v) + eps)            lr * wd

(m and v bias-corrected.) 2^-M is the relative size of a grid step, so decay stays a relative pull per grid step of lr.
Source of AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101; operations in the order of `torch.optim.AdamW`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altgrad.optim import moments
from altgrad.optim.grid import spacing
from altgrad.optim.kernels import fused
from altgrad.randomness import step_key

PRECONDITIONS = ("none", "update", "both", "gradient")


def in_grid_steps(precondition: str) -> bool:
    """Whether lr counts grid steps rather than real distance."""
    return precondition in ("update", "both")


def adam_state(slots: list, moment_format) -> None:
    """Create the two moments of every slot that has none."""
    first, second = moments.moment_formats(moment_format)
    for slot in slots:
        moments.create(slot.state, "exp_avg", slot.weight, first)
        moments.create(slot.state, "exp_avg_sq", slot.weight, second)


def adam_attempt(
    group: dict[str, Any],
    slots: list,
    *,
    precondition: str = "none",
    bases: list[Tensor] | None = None,
    keep: bool = True,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Move every slot's weight by one AdamW step, in place.

    Args:
        group: lr, betas, eps, weight_decay, moment_format (with moment_rounding and seed where that is set).
        bases: tensors that get the whole update (decay included) added instead of the weights.
        keep: store the moments; False leaves that to the caller (`keep_moments`), who changes them first.

    Returns:
        (first moments, second moments, denominators sqrt(v) + eps), in the compute dtype: what the step was made of.
    """
    (beta1, beta2), eps, lr, decay = group["betas"], group["eps"], float(group["lr"]), group["weight_decay"]
    formats = moments.moment_formats(group["moment_format"])
    adam_state(slots, group["moment_format"])
    weights = [slot.weight for slot in slots]
    grads = [slot.grad for slot in slots]
    steps = [] if precondition == "none" else [spacing(slot.weight, slot.grid) for slot in slots]
    if precondition in ("both", "gradient"):
        grads = torch._foreach_mul(grads, steps)

    first = [moments.read(slot.state, "exp_avg", slot.weight, formats[0]) for slot in slots]
    second = [moments.read(slot.state, "exp_avg_sq", slot.weight, formats[1]) for slot in slots]
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
    if keep:
        keep_moments(group, slots, first, second)

    denominators = torch._foreach_sqrt(second)
    torch._foreach_div_(denominators, [(1 - beta2 ** slot.age("second")) ** 0.5 for slot in slots])
    torch._foreach_add_(denominators, torch._foreach_mul(steps, eps) if precondition == "both" else eps)
    if eps == 0 or precondition == "both":  # eps * S can underflow. No gradient yet: no direction, rather than 0 / 0
        for denominator in denominators:
            denominator.masked_fill_(denominator == 0, torch.inf)
    numerators = torch._foreach_mul(first, steps) if in_grid_steps(precondition) else first
    sizes = [-lr / (1 - beta1 ** slot.age("first")) for slot in slots]

    rates = [_decay_rate(slot, lr * decay, precondition) for slot in slots]
    if bases is not None:
        torch._foreach_addcdiv_(bases, numerators, denominators, sizes)
        if decay != 0:
            torch._foreach_add_(bases, torch._foreach_mul(weights, [-rate for rate in rates]))
    else:
        if decay != 0:
            torch._foreach_mul_(weights, [1 - rate for rate in rates])
        torch._foreach_addcdiv_(weights, numerators, denominators, sizes)
    return first, second, denominators


def fused_adam(
    group: dict[str, Any], slot: Any, precondition: str, landing: dict[str, Any], extra: Tensor | None = None
) -> Tensor | None:
    """The whole step of one parameter in one pass, landing included; returns the landing's counts."""
    (beta1, beta2), lr, kind = group["betas"], float(group["lr"]), landing["landing"]
    adam_state([slot], None)
    rate = _decay_rate(slot, lr * group["weight_decay"], precondition)
    seen1, seen2 = 1 - beta1 ** slot.age("first"), 1 - beta2 ** slot.age("second")
    return fused.run(
        slot,
        slot.state["exp_avg"],
        slot.state["exp_avg_sq"],
        extra,
        rule=fused.ADAM,
        spacing=precondition != "none",
        on_gradient=precondition in ("both", "gradient"),
        on_step=in_grid_steps(precondition),
        **landing,
        keep=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        root=seen2**0.5,
        eps=group["eps"],
        size=-lr / seen1,
        decayed=rate if kind == fused.KAHAN else 1 - rate,
        share=seen1 / lr * (1 - 1 / beta1) if kind == fused.ECO and lr > 0 else 0.0,
    )


def _decay_rate(slot, rate: float, precondition: str) -> float:
    return rate * 2.0**-slot.grid.format.mantissa_bits if in_grid_steps(precondition) else rate


def keep_moments(group: dict[str, Any], slots: list, first: list[Tensor], second: list[Tensor]) -> None:
    """Round the moments to their formats and store them; nothing is done for moments kept in full."""
    formats = moments.moment_formats(group["moment_format"])
    for name, fmt, values in (("exp_avg", formats[0], first), ("exp_avg_sq", formats[1], second)):
        if fmt is None:
            continue
        for slot, value in zip(slots, values):
            key = step_key(group["seed"], slot.index, slot.step, name)
            moments.write(slot.state, name, value, fmt, group["moment_rounding"], key)
