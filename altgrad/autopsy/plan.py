"""What an autopsy will cost, before it starts and while it runs: forks by stage, and seconds from a measured pace."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altgrad.autopsy.loop import RecipeLoop
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


def measure(loop: RecipeLoop, steps: int = 4) -> Pace:
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
    """What an autopsy of a run will cost, before it starts and as far as it can be guessed before the damage is known.

    expected: forks by stage of a typical autopsy. known: forks that an interrupted one has run. budget: forks that may still
    be run. kinds: roles of GEMMs, over which the cells are spread. jobs: forks side by side.
    """

    run_dir: Path
    steps: int
    cells: int
    kinds: int
    expected: Mapping[str, int]
    known: int
    budget: int
    pace: Pace
    jobs: int = 1
    longest: int = Settings.longest

    @property
    def forks(self) -> int:
        """Forks of a typical autopsy that are still to be run."""
        return min(max(0, sum(self.expected.values()) - self.known), self.budget)

    @property
    def seconds(self) -> float:
        """A typical autopsy, which names one cell or two: its forks leave from before the onset and are as short as can be.

        The bounds look further, at how long float32 takes to save the run, and the proof to the run's end.
        """
        whole, saved = min(self.steps, self.longest), min(max(SHORTEST, self.steps // 4), self.longest)
        of_stage = {"bounds": (saved + SHORTEST) / 2, "proof": whole, "mechanism": 0.6 * SHORTEST}  # not all apply
        total = sum(self.expected.values())
        steps = sum(n * of_stage.get(stage, SHORTEST) for stage, n in self.expected.items()) / total
        asked = 2 * self.cells / self.kinds  # the prior is asked of the cells of the roles that matter
        return self._before(asked) + self._forks(self.forks, steps)

    @property
    def most_seconds(self) -> float:
        """An autopsy that spends its budget on damage that takes long to show."""
        return self._before(self.cells) + self._forks(self.budget, min(max(SHORTEST, self.steps // 5), self.longest))

    def _before(self, asked: float) -> float:
        return self.steps * (self.pace.low + self.pace.twin) + asked * (self.pace.low + self.pace.turn)

    def _forks(self, forks: int, steps: float) -> float:
        return forks * (self.pace.turn + steps * self.pace.fork_step) / self.jobs

    def __str__(self) -> str:
        return (
            f"{self.steps} steps twice (the run again, {1e3 * self.pace.low:.0f} ms a step, and its float32 twin, "
            f"{1e3 * self.pace.twin:.0f} ms), then forks over {self.cells} cells, most of them of {SHORTEST} steps where the "
            f"damage is quick: typically {self.forks} in {duration(self.seconds)} in all, at most {self.budget} in "
            f"{duration(self.most_seconds)}"
        )
