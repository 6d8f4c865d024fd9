"""Oracles with a planted cause: losses follow a formula of the low cells, with noise of batches and of draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from altgrad.autopsy.fork import LOW, Fork, Outcome, Stop
from altgrad.autopsy.forks import Forks
from altgrad.autopsy.investigate import investigate

ROLES = (("forward", "input"), ("forward", "weight"), ("input_grad", "grad_output"), ("weight_grad", "input"))


class Cell(NamedTuple):
    layer: str
    gemm: str
    role: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.gemm}.{self.role}"


CELLS = tuple(Cell(f"layer{i}", gemm, role) for i in range(7) for gemm, role in ROLES)


def cell(layer: int, gemm: str, role: str) -> Cell:
    return Cell(f"layer{layer}", gemm, role)


@dataclass
class Planted:
    """A run of `steps` steps whose low cells do `damage(low, change, changed)` nats from step `onset` on.

    noise: standard deviation of a draw's own offset. adapted: states after `no_return` are not saved by float32.
    """

    damage: Callable[[frozenset, str | None, frozenset], float]
    steps: int = 200
    onset: int = 0
    noise: float = 0.01
    no_return: int | None = None
    dead: float = math.inf
    lr_kills: bool = False
    slower_learns: float = 0.0  # nats that any slower learning rate ends below
    ignores_stop: bool = False
    later: Callable[[frozenset], float] = lambda low: 0.0  # further nats, growing over the run
    cells: tuple = CELLS
    asked: list = field(default_factory=list)
    steps_taken: int = 0

    def captures(self, path: str) -> list[int]:
        return [0, *range(5, self.steps, 10)]

    def history(self, path: str) -> list[float]:
        low = frozenset(self.cells) if path == LOW else frozenset()
        return list(self._losses(Fork(low, 0, path, self.steps), 0, self.steps))

    def recorded(self, fork: Fork) -> Outcome | None:
        return None

    def run(self, fork: Fork, stop: Stop | None = None) -> Outcome:
        self.asked.append(fork)
        losses = self._losses(fork, fork.start, fork.horizon)
        rule = None if self.ignores_stop else stop
        taken = next((i for i in range(len(losses)) if rule is not None and rule(losses[:i])), len(losses))
        self.steps_taken += taken
        return Outcome(losses[:taken], seconds=0.01)

    def _losses(self, fork: Fork, start: int, horizon: int) -> tuple[float, ...]:
        own = Random(f"{sorted(map(str, fork.low))}|{fork.draw}|{fork.change}").gauss(0, self.noise)
        if not fork.low and fork.draw == 0:
            own = 0.0
        size = self.damage(fork.low, fork.change, fork.changed)
        losses = []
        for step in range(start, start + horizon):
            batch = Random(f"{step}|{fork.data}").gauss(0, 0.1)
            base = 2 + 3.5 * math.exp(-step / 40) + batch
            if self.lr_kills and fork.lr_factor == 1.0:
                base = min(5.5, 2 + 3.5 * math.exp(-min(step, 40) / 40) + 0.05 * max(0, step - 40)) + batch
            if fork.lr_factor < 1.0:
                base -= self.slower_learns
            stuck = self.no_return is not None and fork.path == LOW and start > self.no_return
            here = size if not stuck else max(size, self.damage(frozenset(self.cells), None, frozenset()))
            after = max(0, step - self.onset)
            loss = base + here * (1 - math.exp(-after / 5)) + (own if after > 0 else 0.0)
            loss += self.later(fork.low) * (step - self.onset) / self.steps if after > 0 else 0.0
            losses.append(math.nan if here >= self.dead and after > 5 else loss)
        return tuple(losses)


def any_of(*causes: Cell, size: float = 1.0):
    """Each cause does the whole damage alone."""
    return lambda low, change, changed: size if low & frozenset(causes) else 0.0


def all_of(*causes: Cell, size: float = 1.0):
    """Only all causes together do damage."""
    return lambda low, change, changed: size if frozenset(causes) <= low else 0.0


def sum_of(sizes: dict):
    """Each cause adds its own damage."""
    return lambda low, change, changed: sum(size for one, size in sizes.items() if one in low)


def cured_by(damage, *names: str):
    """The damage is gone where all causes are changed by one of the interventions named."""
    return lambda low, change, changed: 0.0 if change in names else damage(low - frozenset(), None, frozenset())


def page_data(oracle: Planted, **more) -> dict:
    """What a page shows of the verdict on a planted run."""
    verdict = investigate(Forks(oracle, budget=300), symptom=120)
    places = {str(c): [c.layer, c.gemm, c.role] for c in CELLS}
    losses = {path: oracle.history(name) for path, name in (("run", "low"), ("twin", "twin"))}
    return {**verdict.as_dict(), "places": places, "losses": losses, **more}
