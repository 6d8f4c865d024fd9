"""Random keys of an optimizer step: a pure function of (seed, parameter index, step, purpose), never a global generator.

The counter-based generator of `altgrad.quantization` turns a key and an element index into bits, so a step can be
replayed, resumed, or run on another device, and draws the same bits.
"""

from __future__ import annotations

from altgrad.randomness.counter import MASK64, splitmix64

PURPOSES = ("weight", "exp_avg", "exp_avg_sq", "momentum")  # the order is part of the streams: append only


def step_key(seed: int, parameter: int, step: int, purpose: str) -> tuple[int, int]:
    """(seed, stream) for one tensor of one parameter at one step.

    Args:
        parameter: the parameter's number in the optimizer's state_dict (counted over all groups).
        step: 1 for the parameter's first step.
        purpose: which tensor is rounded, one of `PURPOSES`.
    """
    stream = splitmix64(PURPOSES.index(purpose) << 32 ^ (parameter & MASK64))
    return seed, splitmix64(stream ^ (step & MASK64))
