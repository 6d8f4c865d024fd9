"""Forks of a training loop: an oracle that makes cells low or float32, by recipe or in the optimizer's moments, and replays
from captured states.

Both trajectories, the run's own and its float32 twin's, are trained once from one initial state on the same batches, and
their states are kept in bounded rings. A fork restores one of them, puts the recipe of the question on the model, and
steps; the optimizer's state is kept whatever changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from altgrad.autopsy.changes import CHANGES, NotApplicable
from altgrad.autopsy.fork import LOW, TWIN, Fork, Outcome, Stop
from altgrad.autopsy.loop import RecipeLoop, jittered
from altgrad.autopsy.moments import MomentCell, moment_cells, put_moments
from altgrad.errors import ConfigError
from altgrad.loop.loop import slowed
from altgrad.loop.states import CaptureRing
from altgrad.nn import set_seed
from altgrad.nn.recipe.cells import Cell
from altgrad.randomness import seed_of
from altgrad.training.step.replay import first_difference

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
        ConfigError: nothing is quantized.
    """

    def __init__(
        self,
        loop: RecipeLoop,
        steps: int,
        *,
        captures: int = CAPTURES,
        limit_bytes: int = 2 * 2**30,
        seed: int = 0,
        tell: Tell | None = None,
    ) -> None:
        self.loop, self.steps, self.seed = loop, steps, seed
        self.specs = cells_of(loop)
        self.cells: tuple[Any, ...] = tuple(self.specs)
        self._everything = frozenset(self.cells)
        if not self.cells:
            raise ConfigError("nothing is quantized: there are no low-precision cells to look at")
        every = max(1, steps // captures)
        self._rings = {path: CaptureRing(every, max(1, limit_bytes // 2)) for path in (LOW, TWIN)}
        self._losses: dict[str, list[float]] = {LOW: [], TWIN: []}
        self.tell: Tell = tell or (lambda what, done, of: None)
        with loop.aside():
            initial = loop.capture()
            for path in (LOW, TWIN):
                loop.restore(initial)
                self._train(path)

    def _train(self, path: str) -> None:
        loop, ring, losses = self.loop, self._rings[path], self._losses[path]
        if path == TWIN:
            put_low(loop, {})
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

    def prior(self, start: int, cells: Sequence[Any]) -> dict[Any, float]:
        """Suspicion of some cells by one forward and backward each: how far the gradient moves when it alone is low.

            |g(cell low) - g(float32)| / |g(float32)|    over all parameters, at the run's state after step `start`

        It orders the search and decides nothing: symptoms are not damage, and what acts after the gradient, stored weights
        and moments, is not seen; it is tried first.
        """
        asked = [cell for cell in cells if isinstance(cell, Cell) and cell.role != "storage"]
        found = dict.fromkeys(cells, math.inf)
        if not asked:
            return found
        with self.loop.aside():
            exact = self._gradient(start, frozenset())
            size = float(exact.norm()) or 1.0
            for i, cell in enumerate(asked):
                moved = float((self._gradient(start, frozenset([cell])) - exact).norm()) / size
                found[cell] = moved if moved == moved else math.inf
                self.tell("one-step attribution", i + 1, len(asked))
        return found

    def moved(self, start: int, cells: frozenset) -> float:
        """How far one step from the run's state after step `start` moves when these cells alone are low, in lengths of it.

        |w(cells low) - w(float32)| / |w(float32) - w(before)|    over all parameters after that step; NaN if not finite
        """
        with self.loop.aside():
            before, exact = self._stepped(start, frozenset())
            _, low = self._stepped(start, cells)
        return float((low - exact).norm()) / max(float((exact - before).norm()), 1e-30)

    def _stepped(self, start: int, low: frozenset) -> tuple[Any, Any]:
        self.loop.restore(self._rings[LOW][start])
        before = _weights(self.loop.model)
        put_low(self.loop, {cell: self.specs[cell] for cell in low})
        self.loop.advance()
        return before, _weights(self.loop.model)

    def _gradient(self, start: int, low: frozenset) -> Any:
        self.loop.restore(self._rings[LOW][start])
        put_low(self.loop, {cell: self.specs[cell] for cell in low})
        return self.loop.gradient()[1]


def _weights(model: torch.nn.Module) -> Any:
    return torch.cat([p.detach().flatten().float() for p in model.parameters()]).clone()


def run_fork(
    loop: RecipeLoop, specs: Mapping[Any, Any], state: dict[str, Any], fork: Fork, seed: int, stop: Stop | None
) -> Outcome:
    """Replay a fork from a captured state; the loop is left where it was.

    Args:
        specs: the run's cells with what they are quantized by.
        seed: of the draws.
    """
    begun = time.monotonic()
    losses: list[float] = []
    try:
        low = specs_of(specs, fork)
        with loop.aside():
            loop.restore(jittered(state, fork.draw) if fork.draw else state)
            put_low(loop, low)
            if fork.draw:
                set_seed(loop.model, seed_of(seed, "draw", fork.draw))
            with slowed(loop.optimizer, fork.lr_factor):
                while len(losses) < fork.horizon and not (stop is not None and stop(losses)):
                    losses.append(loop.advance(data=fork.data) if fork.data else loop.advance())
    except NotApplicable as why:
        return Outcome((), refused=str(why))
    return Outcome(tuple(losses), seconds=time.monotonic() - begun)


def first_unrepeated(loop: RecipeLoop, state: dict[str, Any], steps: int) -> str | None:
    """The first tensor that differs when a loop takes the same steps from a state twice; None where it repeats itself."""
    ends = []
    for _ in range(2):
        with loop.aside():
            loop.restore(state)
            for _ in range(steps):
                loop.advance()
            ends.append(loop.capture())
    return first_difference(*ends)


def cells_of(loop: RecipeLoop) -> dict[Any, Any]:
    """Every low-precision cell of a loop with what it is quantized by: those of its recipe, and moments in a format."""
    return {**loop.recipe.cells(loop.model), **moment_cells(loop.optimizer)}


def put_low(loop: RecipeLoop, specs: Mapping[Any, Any]) -> None:
    """Make these cells low by these specs, and all others float32."""
    low = {cell: spec for cell, spec in specs.items() if isinstance(cell, Cell)}
    recipe = loop.recipe.only(low, loop.model)
    known = loop.recipe.cells(loop.model)
    for cell, spec in low.items():
        if spec != known[cell]:
            recipe = recipe.with_cell(cell.layer, cell.gemm, cell.role, spec, loop.model)
    loop.put(recipe)
    put_moments(loop.optimizer, {cell: spec for cell, spec in specs.items() if isinstance(cell, MomentCell)})


def specs_of(specs: Mapping[Any, Any], fork: Fork) -> dict[Any, Any]:
    """The low cells of a fork with what each is quantized by there.

    Raises:
        NotApplicable: the change has nothing to change on any of the cells.
    """
    low = {cell: specs[cell] for cell in specs if cell in fork.low}
    if fork.change is None:
        return low
    if fork.change == "master":
        stored = [cell for cell in fork.changed if cell.role == "storage"]
        if not stored:
            raise NotApplicable("no weight is stored in low precision there")
        return {cell: spec for cell, spec in low.items() if cell not in stored}
    changed, why = {}, "it changes nothing"
    for cell in sorted(fork.changed, key=str):
        try:
            if isinstance(cell, MomentCell) and fork.change not in OF_MOMENTS:
                raise NotApplicable("a moment has no such choice")
            changed[cell] = CHANGES[fork.change](specs[cell])
        except NotApplicable as reason:
            why = str(reason)
    if not changed:
        raise NotApplicable(why)
    return {**low, **changed}


OF_MOMENTS = ("exponent", "mantissa", "stochastic", "nearest")
"""Changes that a moment can have."""


def first_other(recorded: Sequence[float], replayed: Sequence[float]) -> int | None:
    """Index of the first replayed loss that is not the recorded one to the bit (NaN equals NaN); None: all are."""
    pairs = enumerate(zip(recorded, replayed, strict=False))
    return next((i for i, (a, b) in pairs if a != b and not (a != a and b != b)), None)
