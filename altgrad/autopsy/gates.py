"""The gates of an autopsy: whether it is a matter of precision at all.

If the float32 twin fails by itself, precision is not the cause; slower learning rates and other batches then say what else
it may be. If it does not fail but does no better than the run, slower rates say whether both learn too fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from altgrad.autopsy.damage import floor_of
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
        return f"it never learned: its smoothed loss fell by {gained:.3g}"
    lost = smooth[-1] - smooth.min()
    if lost > 0.25 * gained and lost > 5 * floor_of(top):
        return f"it lost {lost:.3g} of the {gained:.3g} nats that it had learned"
    return None


SLOWER = (0.5, 0.125)
"""Factors of the learning rate that are tried on the twin."""
BETTER = 0.1
"""Share of what the twin learned that a slower one must learn besides, so that the rate counts as too high."""


def not_precision(forks: Forks, wrong: str, ceiling: float, longest: int) -> dict[str, Any]:
    """What else it is, when the twin fails by itself: a slower learning rate and other batches, from its start.

    A cure keeps its health and ends where the twin was at its best: learning nothing that could be lost is none.
    """
    cured = []
    twin = list(forks.oracle.history(TWIN))
    horizon = min(len(twin), longest)
    tried = {
        f"{factor:g} times the learning rate": Fork(frozenset(), 0, TWIN, horizon, lr_factor=factor)
        for factor in SLOWER
    }
    tried["other batches"] = Fork(frozenset(), 0, TWIN, horizon, data=1)
    for name, outcome in zip(tried, forks.all(list(tried.values())), strict=True):
        if outcome.refused is None and _cured(outcome.losses, twin, ceiling):
            cured.append(name)
    slower = [name for name in cured if name != "other batches"][:1]
    cured = [*slower, *(name for name in cured if name == "other batches")]
    remedy = (
        f"; {' or '.join(cured)} cures it" if cured else "; neither a slower learning rate nor other batches cure it"
    )
    kind = None if len(cured) != 1 else "learning rate" if slower else "batches"
    return {
        "sentence": f"Not precision: the float32 twin fails as well ({wrong}){remedy}.",
        "level": "cause" if cured else "phenomenon",
        "mechanism": kind,
        "gates": (f"float32 twin fails: {wrong}",),
    }


def _cured(losses: Sequence[float], twin: Sequence[float], ceiling: float) -> bool:
    if unwell(losses, ceiling) is not None:
        return False
    smooth = _smooth(twin, ceiling)
    best, gained = float(smooth.min()), float(smooth[0] - smooth.min())
    return float(_smooth(losses, ceiling)[-1]) < best + BETTER * gained


def too_fast(forks: Forks, ceiling: float, longest: int) -> dict[str, Any] | None:
    """Whether a twin that did as well as the run learns clearly more at a slower learning rate; None: it does not.

    Clearly: the mean loss of the last quarter falls by a tenth of what the twin had learned, and by ten times the floor
    of damage.
    """
    twin = list(forks.oracle.history(TWIN))
    horizon = min(len(twin), longest)
    last = max(1, horizon // 4)
    smooth = _smooth(twin[:horizon], ceiling)
    learned = max(0.0, float(smooth[0] - smooth.min()))
    own = float(np.mean(smooth[-last:]))
    for factor, outcome in zip(
        SLOWER,
        forks.all([Fork(frozenset(), 0, TWIN, horizon, lr_factor=factor) for factor in SLOWER]),
        strict=True,
    ):
        gained = own - float(np.mean(_smooth(outcome.losses, ceiling)[-last:]))
        if gained > max(BETTER * learned, 10 * floor_of(ceiling)):
            return {
                "sentence": f"Not precision: float32 does as badly, and at {factor:g} times the learning rate it ends "
                f"{gained:.3g} nats lower.",
                "level": "cause",
                "mechanism": "learning rate",
                "gates": (f"float32 does no better; {factor:g} times the learning rate gains {gained:.3g} nats",),
            }
    return None
