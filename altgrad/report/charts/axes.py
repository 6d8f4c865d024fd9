"""Axes: value -> position in 0..1, and where the ticks go, on a linear or a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from altgrad.report.numbers import number


@dataclass(frozen=True)
class Axis:
    """`lo` < `hi` are the values at the axis's ends; a logarithmic axis has both above zero."""

    lo: float
    hi: float
    log: bool = False
    label: str = ""

    def at(self, values: np.ndarray | float) -> np.ndarray:
        """Position as a fraction of the axis; what the axis cannot show (NaN, <= 0 on a log axis) is NaN."""
        values = np.asarray(values, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            if not self.log:
                return (values - self.lo) / (self.hi - self.lo)
            scaled = np.where(values > 0, np.log(values), np.nan)
            return (scaled - math.log(self.lo)) / (math.log(self.hi) - math.log(self.lo))

    def ticks(self, about: int = 5) -> list[tuple[float, str]]:
        """(position, label) of about so many round values inside the axis."""
        decades = self.log and self.hi > _NARROW * self.lo
        values = _decade_ticks(self.lo, self.hi, about) if decades else _linear_ticks(self.lo, self.hi, about)
        step = min((b - a for a, b in pairwise(values)), default=1.0)
        return [
            (float(np.clip(self.at(v), 0, 1)), _tick_label(v, step, decades)) for v in values if v > 0 or not self.log
        ]


_NARROW = 6.0
"""A logarithmic axis that spans less than this factor has its ticks at equal differences."""


def axis_over(values: Iterable[np.ndarray], *, log: bool = False, label: str = "", margin: float = 0.04) -> Axis:
    """An axis that shows all finite `values` (positive ones, on a log axis) with a margin on both sides."""
    stacked = np.concatenate([np.ravel(np.asarray(v, dtype=np.float64)) for v in values] or [np.empty(0)])
    usable = stacked[np.isfinite(stacked) & ((stacked > 0) | (not log))]
    if not len(usable):
        return Axis(*((1.0, 10.0) if log else (0.0, 1.0)), log, label)
    usable = np.clip(usable, *((1 / _FAR, _FAR) if log else (-_FAR, _FAR)))
    lo, hi = float(usable.min()), float(usable.max())
    if hi - lo < 1e-12 * max(abs(lo), abs(hi)):  # no more than rounding tells them apart: as one value
        lo = hi
    if log:
        ratio = max(hi / lo, 1.02) ** (margin if hi > lo else 0.5)
        return Axis(lo / ratio, hi * ratio, True, label)
    span = (hi - lo) or abs(hi) * 0.1 or 1.0
    margin = margin if hi > lo else 0.5
    return Axis(lo - margin * span, hi + margin * span, False, label)


_FAR = 1e100
"""Axes end here: beyond, differences and ratios of their ends overflow."""


def _linear_ticks(lo: float, hi: float, about: int) -> list[float]:
    raw = (hi - lo) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _decade_ticks(lo: float, hi: float, about: int) -> list[float]:
    decades = math.log10(hi / lo)
    multiples = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    every = max(1, math.ceil(decades / about))
    low, high = math.floor(math.log10(lo)), math.ceil(math.log10(hi))
    ticks = [m * 10.0**k for k in range(low, high + 1) for m in multiples if k % every == 0]
    return [v for v in ticks if lo <= v <= hi]


def _tick_label(value: float, step: float, decades: bool) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-4:
        return number(value, 2)
    places = max(0, -math.floor(math.log10(abs(value) if decades else step) + 1e-9))
    if not decades and abs(step / 10.0**-places - round(step / 10.0**-places)) > 1e-6:
        places += 1
    return f"{value:.{places}f}".replace("-", "−")
