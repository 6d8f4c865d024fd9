"""What an autopsy will cost, before it starts and while it runs: forks by stage, and seconds from a measured pace."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altgrad.autopsy.loop import Loop
from altgrad.autopsy.oracle import cells_of, put_low
from altgrad.autopsy.search import Settings
from altgrad.autopsy.window import SHORTEST
from altgrad.report.numbers import duration


@dataclass(frozen=True)
class Pace:
    """Seconds, measured: a step of the low run, of its float32 twin, and going to a state with another recipe."""

    low: float
    twin: float
    turn: float

    @property
    def fork_step(self) -> float:
        """A step of a fork, which has some cells low."""
        return (self.low + self.twin) / 2


def measure(loop: Loop, steps: int = 4) -> Pace:
    """The pace of a loop, which is left where it was. First steps, which compile kernels, are not counted."""

    def pace(low: Mapping[Any, Any]) -> tuple[float, float]:
        turn = _timed(lambda: (loop.restore(state), put_low(loop, low)))
        loop.advance()
        return turn, min(_timed(loop.advance) for _ in range(steps - 1))

    with loop.aside():
        capture = _timed(loop.capture)
        state = loop.capture()
        turn, low = pace(cells_of(loop))
        _, twin = pace({})
    return Pace(low, twin, turn + 2 * capture)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Plan:
    """What an autopsy of a run will cost, before it starts.

    forks: expected of a typical one; budget: at most, less those known from an interrupted one. jobs: side by side.
    """

    run_dir: Path
    steps: int
    cells: int
    forks: int
    budget: int
    pace: Pace
    jobs: int = 1
    longest: int = Settings.longest

    @property
    def horizon(self) -> int:
        """Steps of a fork, as far as they can be guessed before the damage is known."""
        return min(max(SHORTEST, self.steps // 5), self.longest)

    def seconds(self, forks: int) -> float:
        """The whole, with so many forks."""
        pace = self.pace
        trajectories = self.steps * (pace.low + pace.twin)
        prior = self.cells * (pace.low + pace.turn)  # at most: it is asked of the cells of the roles that matter
        return trajectories + prior + forks * (pace.turn + self.horizon * pace.fork_step) / self.jobs

    def __str__(self) -> str:
        typical, most = (duration(self.seconds(min(n, self.budget))) for n in (self.forks, self.budget))
        return (
            f"{self.steps} steps twice (the run again, {1e3 * self.pace.low:.0f} ms a step, and its float32 twin, "
            f"{1e3 * self.pace.twin:.0f} ms), then forks of about {self.horizon} steps over {self.cells} cells: "
            f"typically {min(self.forks, self.budget)} in {typical}, at most {self.budget} in {most}"
        )
