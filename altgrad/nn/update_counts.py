"""What one optimizer step did to weights on a grid, as counts of elements.

An element is *attempted* if the optimizer changed it at all, a *flip* if its code changed, *stalled* if it was attempted
and its code stayed. +0 and -0 count as one code. A value that a fresh scale changed is a *regrid*, counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass

COUNTS = ("attempted", "flips", "stalled", "overflow", "regridded")


@dataclass(frozen=True)
class UpdateCounts:
    """Counts of one step over some weights; numbers of elements.

    elements: all. attempted, flips, stalled: see the module. overflow: attempted values beyond the format's max.
    regridded: values changed by a fresh scale: a refresh after the step, or one before it, for weights that something
        other than the optimizer had written since the last step (loading, averaging, an editor).
    """

    elements: int
    attempted: int
    flips: int
    stalled: int
    overflow: int
    regridded: int

    @property
    def stall_rate(self) -> float | None:
        """stalled / attempted; None where nothing was attempted."""
        return self.stalled / self.attempted if self.attempted else None

    @property
    def flip_rate(self) -> float:
        """flips / elements."""
        return self.flips / self.elements if self.elements else 0.0

    @property
    def overflow_rate(self) -> float:
        """overflow / elements."""
        return self.overflow / self.elements if self.elements else 0.0
