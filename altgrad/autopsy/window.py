"""Where to look: the step from which low precision hurts, the last step at which float32 still saves the run, and the
window of steps in which forks are compared.

Symptom and onset are told apart: a run that is NaN at step 431 may have been beyond help since 397.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from altgrad.autopsy.damage import Null, Settled, Share, Yardstick, floor_of, wobble
from altgrad.autopsy.fork import LOW, TWIN, Fork
from altgrad.autopsy.forks import Forks

SHORTEST = 16
"""Steps of the shortest horizon: half of them are averaged."""
CLEARLY = 2
"""Damage of so many floors is damage, whether or not a short window shows it."""
CLEAR = 5
"""Damage of so many floors is clear enough to compare forks by in a short window."""


@dataclass(frozen=True)
class Window:
    """Where forks leave from, how far they go, what they are measured against, and the null band there."""

    start: int
    horizon: int
    yardstick: Yardstick
    null: Null

    def fork(self, low: frozenset, path: str = LOW, **more) -> Fork:
        """A fork of this window, from the run's state or from its twin's of the same step."""
        return Fork(low, self.start, path, self.horizon, **more)


def onset_of(gap: Sequence[float] | np.ndarray, rise: float) -> int:
    """The change point of a run that ends damaged; where its last steps hide that, the largest jump."""
    found = change_point(gap, rise)
    return found if found is not None else _jump(np.asarray(gap, dtype=float), 0, len(gap))


def change_point(gap: Sequence[float] | np.ndarray, rise: float) -> int | None:
    """First index from which the mean gap stays above `rise` to the end, in windows of a fiftieth of the run; None: never.

    Within the first such window the point is where the least-squares step lies, so that a jump is found to the step.
    """
    values = np.asarray(gap, dtype=float)
    width = max(5, len(values) // 50)
    if len(values) < 2 * width:
        return None
    means = np.convolve(values, np.ones(width) / width, mode="valid")  # means[i] is over values[i : i + width]
    below = np.flatnonzero(means <= rise)
    first = int(below[-1]) + 1 if below.size else 0
    if first in (0, len(means)):
        return None if first else 0
    return _jump(values, max(0, first - width), min(len(values), first + 2 * width))


def _jump(values: np.ndarray, low: int, high: int) -> int:
    """Index in [low, high) at which splitting the stretch in two constant parts leaves the least squared rest."""
    part = values[low:high]
    rests = [
        np.var(part[:i]) * i + np.var(part[i:]) * (len(part) - i) if i else np.var(part) * len(part)
        for i in range(len(part) - 1)
    ]
    return low + int(np.argmin(rests))


def latest(captures: Sequence[int], step: int) -> int:
    """The last captured step at or before `step`; the first where there is none."""
    return max((c for c in captures if c <= step), default=min(captures))


def null_band(
    forks: Forks, start: int, horizon: int, ceiling: float, draws: int, late: bool = False
) -> tuple[Yardstick, Null]:
    """The band of a window: draws of the whole low run, and half as many of its twin from the same state."""
    everything = frozenset(forks.oracle.cells)
    lows = [Fork(everything, start, LOW, horizon, draw=k) for k in range(draws)]
    highs = [Fork(frozenset(), start, LOW, horizon, draw=k) for k in range(max(2, draws // 2) + 1)]
    outcomes = forks.all([*highs, *lows])
    yardstick = Yardstick(outcomes[0].losses, ceiling, late)
    gap = np.mean([yardstick.curve(o.losses) for o in outcomes[len(highs) :]], axis=0)[yardstick.first :]
    low, high = yardstick.band(outcomes[len(highs) :]), yardstick.band(outcomes[1 : len(highs)])
    return yardstick, Null(low, high, wobble(gap))


def choose(forks: Forks, onset: int, ceiling: float, draws: int, longest: int, least: int = SHORTEST) -> Window:
    """The window of the search: from the last capture before the onset, as short as shows the damage clearly.

    `onset` is the index of the first damaged loss: the state before it may be damaged already, by the update that made
    it. Early forks need only short horizons, and a state from before the onset has not adapted to the fault. The
    horizon doubles until the damage stands ten deviations of a single draw above none, or the run's end is reached; the
    window that it ends with may show no damage, which the caller reads from its null band. `least`: steps that it has
    at least, where the run has as many.
    """
    low, twin = (list(forks.oracle.history(path)) for path in (LOW, TWIN))
    steps = len(low)
    start = latest(forks.oracle.captures(LOW), onset - 1)
    most = max(min(longest, steps - start), 1)
    horizon = min(max(least, 2 * (onset - start) + SHORTEST), most)
    gap = Yardstick(tuple(twin[start:]), ceiling).curve(low[start:])
    while horizon < most and float(np.mean(gap[horizon // 2 : horizon])) < CLEAR * floor_of(
        ceiling
    ):  # the two runs tell it free
        horizon = min(2 * horizon, most)
    while True:
        _, null = null_band(forks, start, horizon, ceiling, draws=2)
        clear = null.damage > max(10 * null.noise, CLEAR * floor_of(ceiling))
        if clear or horizon >= most:
            return Window(start, horizon, *null_band(forks, start, horizon, ceiling, draws))
        horizon = min(2 * horizon, most)


def to_the_end(forks: Forks, before: int, ceiling: float, draws: int, longest: int) -> Window:
    """The window from the last capture before step `before` to the run's end, of which the last quarter counts."""
    start = latest(forks.oracle.captures(LOW), before)
    horizon = min(longest, len(forks.oracle.history(LOW)) - start)
    return Window(start, horizon, *null_band(forks, start, horizon, ceiling, draws, late=True))


def bisect(points: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """The last of the ascending `points` at which `holds` is true, taking it to be true and then false; None: nowhere."""
    low, high = -1, len(points)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(points[middle]):
            low = middle
        else:
            high = middle
    return points[low] if low >= 0 else None


def recovery(steps: int, window: Window, longest: int) -> int:
    """Steps that float32 is given to save a run: a model that has adapted to its fault is worse off at first without it."""
    return min(max(window.horizon, steps // 4), longest)


def no_return(forks: Forks, ceiling: float, window: Window, horizon: int) -> int | None:
    """The last captured state of the run that `horizon` steps of float32 still save: half of the gap to the twin is closed.

    The gap is the run's own over the same steps. None: float32 saves the run from every state that leaves it as many steps.
    """
    low, twin = (list(forks.oracle.history(path)) for path in (LOW, TWIN))
    harm = max(window.null.damage / 4, floor_of(ceiling))

    def saved(step: int) -> bool:
        yardstick = Yardstick(tuple(twin[step : step + horizon]), ceiling)
        without = yardstick.over(low[step : step + horizon], horizon // 2)
        if without < harm:
            return True  # there is nothing to save it from yet
        rule = Settled(yardstick, without / 2, window.null.step_noise)
        return yardstick.damage(forks(Fork(frozenset(), step, LOW, horizon), rule)) < without / 2

    points = [c for c in forks.oracle.captures(LOW) if c + horizon <= min(len(low), len(twin))]
    last = bisect(points, saved)
    return None if not points or last == points[-1] else last


def first_damaged(forks: Forks, ceiling: float, window: Window, points: Sequence[int]) -> int | None:
    """The first of the twin's captured states, ascending, from which low precision is damaged within the horizon."""
    everything = frozenset(forks.oracle.cells)
    twin = list(forks.oracle.history(TWIN))
    reachable = [p for p in points if p + window.horizon <= len(twin)]
    limit = max(window.null.damage / 4, floor_of(ceiling))

    def unharmed(step: int) -> bool:
        yardstick = Yardstick(tuple(twin[step : step + window.horizon]), ceiling)
        return yardstick.damage(forks(Fork(everything, step, TWIN, window.horizon))) < limit

    last = bisect(reachable, unharmed)
    later = [p for p in reachable if last is None or p > last]
    return later[0] if later else None


BEYOND_CHANCE = 10.0
"""Deviations of a draw from which the gap at a run's end is asked for a share; below, the share would be chance."""


def over_the_run(forks: Forks, window: Window, cells: frozenset, ceiling: float, longest: int) -> Share | None:
    """The share of the run's gap that rescuing these cells closes from the window's start to the run's end.

    A short window shows what does damage first, which need not be what does it in the end. None: the window reaches the
    end (or `longest` steps), or the gap there is no damage, or less than `BEYOND_CHANCE` deviations of a draw.
    """
    low = list(forks.oracle.history(LOW))
    steps = min(len(low) - window.start, longest)
    if steps <= window.horizon:
        return None
    everything = frozenset(forks.oracle.cells)
    twin, rescued = forks.all(
        [Fork(frozenset(), window.start, LOW, steps), Fork(everything - cells, window.start, LOW, steps)]
    )
    yardstick = Yardstick(twin.losses, ceiling)
    gap = yardstick.over(low[window.start : window.start + steps], steps // 2)
    if gap < max(CLEARLY * yardstick.floor, BEYOND_CHANCE * window.null.noise):
        return None
    value, error = 1 - yardstick.damage(rescued) / gap, 1.96 * window.null.noise / gap
    return Share(value, value - error, value + error, 1)


JUMP, FAR = 2.5, 6.0
"""Factors by which the cells' effect on one step must rise from three captured states to the next three, so that they
begin there: to above all earlier states, and where an earlier state had more, as the first steps of healthy cells
do."""


def acts_from(moved: Callable[[int], float], points: Sequence[int], onset: int) -> int:
    """The first step at which the cells found were at work, which may be long before their damage shows in the loss.

    Their effect on a single step, `moved`, is asked at the captured states up to a few after the onset; a begin is where the
    median of three states rises the most, and by more than `JUMP` to above all before it, or by `FAR`. Without such a
    jump they were at work from step 1 on, whether or not their effect grew: effects that drift with training double in
    as many states at the most.

    Args:
        moved: captured step -> how far one step of training from there moves when the cells alone are low, in lengths
            of the step; not finite where that step is not.
        points: captured steps, ascending.
    """
    asked = [p for p in points if p <= onset] + [p for p in points if p > onset][:3]
    sizes = np.array([moved(p) for p in asked])
    finite = sizes[np.isfinite(sizes)]
    top = 1e3 * max(1.0, float(finite.max(initial=0.0)))
    values = np.log(np.clip(np.where(np.isfinite(sizes), sizes, top), 1e-6, None))
    before = [float(np.median(values[max(0, i - 3) : i])) for i in range(1, len(values))]
    after = [float(np.median(values[i : i + 3])) for i in range(1, len(values))]
    rises = [b - a for a, b in zip(before, after, strict=True)]
    if not rises:
        return 1
    split = 1 + int(np.argmax(np.array(rises) > max(rises) - 1e-9))
    above = after[split - 1] > max(before[:split])
    if max(rises) < math.log(JUMP if above else FAR):
        return 1
    steepest = max(range(max(1, split - 1), min(len(values), split + 2)), key=lambda i: values[i] - values[i - 1])
    return asked[steepest - 1] + 1
