"""Moments set back to zero: what an average that was kept in few bits, or was thrown off by one gradient, begins anew with.

An average stored in a format stalls: near its resting value each change is below half a grid step. Begun anew it moves again, and
Adam's bias correction makes its first values those of the gradients. Source of resets at a period for quantized states:
arXiv:2603.16731 (about 1,000 steps for BF16, 300 for FP8, 200 for FP4, in its models).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.errors import OptionError
from altgrad.optim.base import GridOptimizer

KEPT_AS = {
    "first": ("exp_avg", "exp_avg_plus", "exp_avg_minus", "momentum", "momentum_buffer"),
    "second": ("exp_avg_sq", "max_exp_avg_sq"),
}
"""Moment -> names that optimizers keep it under: averages of gradients, and of their squares."""
MOMENTS = ("both", *KEPT_AS)


def chosen_moments(moments: str) -> tuple[str, ...]:
    """The moments that "first", "second" or "both" names.

    Raises:
        OptionError: another word.
    """
    if moments not in MOMENTS:
        raise OptionError(f"moments {moments!r} are not one of {', '.join(MOMENTS)}")
    return tuple(KEPT_AS) if moments == "both" else (moments,)


def one_count_for_both(name: str, moment: str) -> OptionError:
    """The error for a reset of one moment of torch's Adams, whose bias corrections share a count of steps."""
    return OptionError(
        f"{name} counts both of its moments by one step, so its {moment} cannot begin anew alone: reset both, or take sr_adamw with "
        "rounding null, which is AdamW with a count for each"
    )


@torch.no_grad()
def reset_moments(optimizer: Optimizer, moments: str = "both") -> None:
    """Set moments of every parameter to zero and let bias corrections count from here; all else of the state stays.

    Call it between steps. Works for AltGrad's optimizers and for torch's that keep moments under the names of
    `KEPT_AS`; a parameter that was not stepped yet has none. What Kahan's buffer holds stays, what ECO put into its
    momentum is lost.

    Args:
        moments: "both" (or the one that there is), "first" or "second".

    Raises:
        OptionError: another word; one of two moments of an optimizer, such as torch's AdamW, that counts both by one step; or no
            parameter that was stepped has such a moment.
    """
    chosen, own, found = chosen_moments(moments), isinstance(optimizer, GridOptimizer), not optimizer.state
    for state in optimizer.state.values():
        held = {moment: [state[n] for n in KEPT_AS[moment] if isinstance(state.get(n), Tensor)] for moment in KEPT_AS}
        if not own and "step" in state and held["first"] and held["second"] and len(chosen) == 1:
            raise one_count_for_both(type(optimizer).__name__, moments)
        for moment in chosen:
            found = found or bool(held[moment])
            for tensor in held[moment]:
                tensor.zero_()
            if own and held[moment]:
                state[f"{moment}_began"] = state["step"].clone()
            elif held[moment] and isinstance(state.get("step"), Tensor):
                state["step"].zero_()
    if not found:
        known = ", ".join(name for names in KEPT_AS.values() for name in names)
        raise OptionError(
            f"{type(optimizer).__name__} keeps no {'moment' if moments == 'both' else moments + ' moment'} that could begin anew under "
            f"a name known here ({known})"
        )
