"""How sure a verdict is, by the calibration: the share of right cell sets among calibrated cases that looked alike.

Alike are verdicts of the same class of damage and of a structure that the calibration had: one cell, or several of which each
does the damage, or a share of it, alone, in the window that was looked at. All others have no confidence, and pages say
"not calibrated for a case like this". The rows are what
`python -m benchmarks.autopsy_calibration --fit experiments/results/autopsy-calibration-{develop,sealed}.tar.xz` prints;
docs/findings/calibration.md says how those of the first of the two held on the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from altgrad.autopsy.verdict import Verdict


@dataclass(frozen=True)
class Class:
    """Verdicts of at least `damage` floors of damage: so many of them were right. Floors are 0.01 nats of a cross entropy."""

    damage: float
    right: int
    of: int

    @property
    def chance(self) -> float:
        """Chance that another one is right: the mean of a Beta(1/2, 1/2) prior with these cases, never 0 or 1."""
        return (self.right + 0.5) / (self.of + 1)


CLASSES = (Class(2, 34, 35), Class(5, 90, 90))
"""Ascending in damage."""
STRUCTURES = ("single", "redundant", "cumulative")
"""What the calibration had cases of."""


def confidence(verdict: Verdict, floor: float, classes: Sequence[Class] = CLASSES) -> float | None:
    """Chance that the verdict's set of cells is right; None where no case of the calibration was alike.

    Args:
        floor: nats below which nothing is called damage, for this run's loss.
    """
    if verdict.structure not in STRUCTURES or verdict.damage is None or verdict.alone_over_run is not None:
        return None
    alike = [one for one in classes if verdict.damage >= one.damage * floor]
    return alike[-1].chance if alike else None


def fitted(cases: Sequence[tuple[float, bool]], limits: Sequence[float] = (2, 5)) -> tuple[Class, ...]:
    """The classes of calibrated cases: (damage in floors, whether the cells were right) of each."""
    edges = [*limits, float("inf")]
    return tuple(
        Class(low, sum(right for d, right in cases if low <= d < high), sum(low <= d < high for d, _ in cases))
        for low, high in zip(limits, edges[1:], strict=True)
    )
