"""The gates of an autopsy: whether it is a matter of precision at all.

If the float32 twin fails by itself, precision is not the cause; half the learning rate and other batches then say what
else it may be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from altgrad.autopsy.fork import TWIN, Fork
from altgrad.autopsy.forks import Forks


def first_loss_ceiling(low: Sequence[float], twin: Sequence[float]) -> float:
    firsts = [losses[0] for losses in (low, twin) if losses and math.isfinite(losses[0])]
    return max(firsts) if firsts else math.log(256)


def _smooth(losses: Sequence[float], top: float) -> np.ndarray:
    values = np.array([loss if math.isfinite(loss) else top for loss in losses]).clip(max=2 * top)
    width = max(1, min(10, len(values) // 4))
    return np.convolve(values, np.ones(width) / width, mode="valid")


def own_damage(losses: Sequence[float], top: float) -> float:
    """How far a trajectory ends above its best."""
    smooth = _smooth(losses, top)
    return float(smooth[-1] - smooth.min())


def unwell(losses: Sequence[float], top: float) -> str | None:
    """What is wrong with a trajectory by itself; None if it learned and kept what it learned."""
    if any(not math.isfinite(loss) for loss in losses):
        return f"its loss is not finite at step {next(i for i, x in enumerate(losses) if not math.isfinite(x)) + 1}"
    smooth = _smooth(losses, top)
    gained = smooth[0] - smooth.min()
    if gained < 0.02 * smooth[0]:
        return f"it never learned: its smoothed loss fell by {gained:.3f} nats"
    lost = smooth[-1] - smooth.min()
    if lost > 0.25 * gained and lost > 0.05:
        return f"it lost {lost:.2f} of the {gained:.2f} nats that it had learned"
    return None


def not_precision(forks: Forks, wrong: str, ceiling: float, longest: int) -> dict[str, Any]:
    """What else it is: half the learning rate and other batches, from the start of the twin."""
    cured = []
    horizon = min(len(forks.oracle.history(TWIN)), longest)
    slower, other = Fork(frozenset(), 0, TWIN, horizon, lr_factor=0.5), Fork(frozenset(), 0, TWIN, horizon, data=1)
    for name, fork in (("half the learning rate", slower), ("other batches", other)):
        outcome = forks(fork)
        if outcome.refused is None and unwell(outcome.losses, ceiling) is None:
            cured.append(name)
    remedy = (
        f"; {' or '.join(cured)} cures it" if cured else "; neither half the learning rate nor other batches cure it"
    )
    return {
        "sentence": f"Not precision: the float32 twin fails as well ({wrong}){remedy}.",
        "level": "cause" if cured else "phenomenon",
        "mechanism": {"half the learning rate": "learning rate", "other batches": "batches"}[cured[0]]
        if len(cured) == 1
        else None,
        "gates": (f"float32 twin fails: {wrong}",),
    }
