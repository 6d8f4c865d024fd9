"""Forks of a training loop: an oracle that makes cells low or float32 by recipe and replays from captured states.

Both trajectories, the run's own and its float32 twin's, are trained once from one initial state on the same batches, and
their states are kept in bounded rings. A fork restores one of them, puts the recipe of the question on the model, and
steps; the optimizer's state is kept whatever changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from altgrad.autopsy.changes import CHANGES, NotApplicable
from altgrad.autopsy.fork import LOW, TWIN, Fork, Outcome, Stop
from altgrad.autopsy.loop import Loop, jittered
from altgrad.errors import ConfigError
from altgrad.nn import Recipe
from altgrad.nn.recipe.cells import Cell
from altgrad.randomness import seed_of
from altgrad.training.step.state_tree import CaptureRing

Tell = Callable[[str, int, int], None]
"""Called with (what is done, done, of how many)."""


CAPTURES = 40
"""States that are kept of each trajectory where nothing is said."""


class LoopOracle:
    """The oracle of a loop that stands at an initial state.

    Args:
        loop: of a quantized run; left where it is.
        steps: steps of the run that are looked at, from that state on.
        captures: states kept of each trajectory; all of them together stay under `limit_bytes`.
        seed: of the draws.
        tell: progress of the two trajectories and of the prior.

    Raises:
        ConfigError: the recipe quantizes nothing.
    """

    def __init__(
        self,
        loop: Loop,
        steps: int,
        *,
        captures: int = CAPTURES,
        limit_bytes: int = 2 * 2**30,
        seed: int = 0,
        tell: Tell | None = None,
    ) -> None:
        self.loop, self.steps, self.seed = loop, steps, seed
        self.specs = loop.recipe.cells(loop.model)
        self.cells: tuple[Cell, ...] = tuple(self.specs)
        self._everything = frozenset(self.cells)
        if not self.cells:
            raise ConfigError("the recipe quantizes nothing: there are no low-precision cells to look at")
        every = max(1, steps // captures)
        self._rings = {path: CaptureRing(every, max(1, limit_bytes // 2)) for path in (LOW, TWIN)}
        self._losses: dict[str, list[float]] = {LOW: [], TWIN: []}
        self.tell: Tell = tell or (lambda what, done, of: None)
        with loop.aside():
            initial = loop.capture()
            for path, recipe in ((LOW, None), (TWIN, self._only(frozenset()))):
                loop.restore(initial)
                self._train(path, recipe)

    def _train(self, path: str, recipe: Recipe | None) -> None:
        loop, ring, losses = self.loop, self._rings[path], self._losses[path]
        if recipe is not None:
            loop.put(recipe)
        ring.keep(0, loop.capture())
        for step in range(1, self.steps + 1):
            losses.append(loop.advance())
            if ring.due(step):
                ring.keep(step, loop.capture())
            self.tell("the run again" if path == LOW else "its float32 twin", step, self.steps)

    # -- what stages ask ----------------------------------------------------------------------------------------------

    def captures(self, path: str) -> list[int]:
        """Steps of the states kept."""
        return self._rings[path].steps

    def history(self, path: str) -> list[float]:
        """Losses of steps 1, 2, ... of the trajectory."""
        return self._losses[path]

    def recorded(self, fork: Fork) -> Outcome | None:
        """What a trajectory already showed: the whole run low from its own state, or the twin from its own."""
        plain = (fork.draw, fork.data, fork.change, fork.lr_factor) == (0, 0, None, 1.0)
        end = fork.start + fork.horizon
        if not plain or end > self.steps:
            return None
        if fork.low == self._everything and (fork.path == LOW or fork.start == 0):
            return Outcome(tuple(self._losses[LOW][fork.start : end]))
        if not fork.low and (fork.path == TWIN or fork.start == 0):
            return Outcome(tuple(self._losses[TWIN][fork.start : end]))
        return None

    def run(self, fork: Fork, stop: Stop | None = None) -> Outcome:
        """Replay one fork; the loop is left where it was."""
        return run_fork(self.loop, self.specs, self.state(fork), fork, self.seed, stop)

    def state(self, fork: Fork) -> dict[str, Any]:
        """The captured state that a fork leaves from."""
        return self._rings[fork.path][fork.start]

    def _only(self, low: frozenset) -> Recipe:
        return self.loop.recipe.only(low, self.loop.model)

    def prior(self, start: int) -> dict[Cell, float]:
        """Suspicion of each cell by one forward and backward: how far the gradient moves when it alone is low.

            |g(cell low) - g(float32)| / |g(float32)|    over all parameters

        It orders the search and decides nothing: symptoms are not damage, and storage, which acts after the gradient,
        is not seen; a stored weight is tried first.
        """
        exact = self._gradient(start, frozenset())
        size, found = float(exact.norm()) or 1.0, {}
        for i, cell in enumerate(self.cells):
            moved = math.inf
            if cell.role != "storage":
                moved = float((self._gradient(start, frozenset([cell])) - exact).norm()) / size
            found[cell] = moved if moved == moved else math.inf
            self.tell("one-step attribution", i + 1, len(self.cells))
        return found

    def _gradient(self, start: int, low: frozenset) -> Any:
        loop = self.loop
        with loop.aside():
            loop.restore(self._rings[LOW][start])
            loop.put(self._only(low))
            return loop.gradient()


def run_fork(
    loop: Loop, specs: Mapping[Any, Any], state: dict[str, Any], fork: Fork, seed: int, stop: Stop | None
) -> Outcome:
    """Replay a fork from a captured state; the loop is left where it was.

    Args:
        specs: the run's cells with what they are quantized by.
        seed: of the draws.
    """
    begun = time.monotonic()
    losses: list[float] = []
    try:
        recipe = recipe_of(loop, specs, fork)
        with loop.aside():
            loop.restore(jittered(state, fork.draw) if fork.draw else state)
            loop.put(recipe)
            if fork.draw:
                loop.reseed(seed_of(seed, "draw", fork.draw))
            while len(losses) < fork.horizon and not (stop is not None and stop(losses)):
                losses.append(loop.advance(data=fork.data, lr_factor=fork.lr_factor))
    except NotApplicable as why:
        return Outcome((), refused=str(why))
    return Outcome(tuple(losses), seconds=time.monotonic() - begun)


def recipe_of(loop: Loop, specs: Mapping[Any, Any], fork: Fork) -> Recipe:
    """The recipe that a fork trains under.

    Raises:
        NotApplicable: the change has nothing to change on any of the cells.
    """
    plain = loop.recipe.only(fork.low, loop.model)
    if fork.change is None:
        return plain
    if fork.change == "master":
        stored = frozenset(cell for cell in fork.changed if cell.role == "storage")
        if not stored:
            raise NotApplicable("no weight is stored in low precision there")
        return loop.recipe.only(fork.low - stored, loop.model)
    recipe, why = plain, "it changes nothing"
    for cell in sorted(fork.changed, key=str):
        try:
            spec = CHANGES[fork.change](specs[cell])
            recipe = recipe.with_cell(cell.layer, cell.gemm, cell.role, spec, loop.model)
        except NotApplicable as reason:
            why = str(reason)
    if recipe == plain:
        raise NotApplicable(why)
    return recipe


def first_other(recorded: Sequence[float], replayed: Sequence[float]) -> int | None:
    """Index of the first replayed loss that is not the recorded one to the bit (NaN equals NaN); None: all are."""
    pairs = enumerate(zip(recorded, replayed, strict=False))
    return next((i for i, (a, b) in pairs if a != b and not (a != a and b != b)), None)
