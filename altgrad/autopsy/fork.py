"""What an autopsy asks and what it is told: a fork of a training run, its outcome, and who can run forks.

A run's low precision is cut into cells: one for each (layer, GEMM, operand), each norm's weight, each stored weight, and each
moment of the optimizer that is kept in a format. A fork takes a captured state, makes some cells low and all others
float32, trains on for some steps and reports the losses. Every stage of an autopsy is a pure function of such outcomes,
so that the search is tested on planted causes without training.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from altgrad.records.schema import as_number


class Place(Protocol):
    """A cell as the search sees it: hashable, ordered by its text."""

    @property
    def layer(self) -> str: ...

    @property
    def role(self) -> str: ...


LOW, TWIN = "low", "twin"
"""The two trajectories that captured states lie on: the run's own, and that of its float32 twin."""


@dataclass(frozen=True)
class Fork:
    """One question.

    low: cells in low precision; all others are float32.
    start, path: the captured state, by its step and its trajectory (`LOW` or `TWIN`).
    horizon: steps to train.
    draw: 0 repeats the run's own random bits; k > 0 draws others (other rounding seeds; where nothing is rounded
        stochastically, one unit in the last place on some weights).
    data: 0 keeps the run's batches; k > 0 takes others.
    change, changed: name of an intervention, and the cells whose formats it alters.
    lr_factor: multiplies the learning rate.
    """

    low: frozenset
    start: int = 0
    path: str = LOW
    horizon: int = 40
    draw: int = 0
    data: int = 0
    change: str | None = None
    changed: frozenset = frozenset()
    lr_factor: float = 1.0

    @property
    def key(self) -> str:
        """Hash of the question, the same in every process: what a log finds its answer by."""
        facts = {
            **{
                name: getattr(self, name)
                for name in ("start", "path", "horizon", "draw", "data", "change", "lr_factor")
            },
            "low": sorted(map(str, self.low)),
            "changed": sorted(map(str, self.changed)),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


Stop = Callable[[Sequence[float]], bool]
"""Whether the losses of a fork so far decide the question that it was run for."""


@dataclass(frozen=True)
class Outcome:
    """What a fork did: its training loss at each step (NaN where it was not finite), or why it could not run.

    A fork that was stopped early, because its question was decided, has fewer losses than its horizon has steps.
    """

    losses: tuple[float, ...]
    refused: str | None = None
    seconds: float = 0.0

    def answers(self, fork: Fork, stop: Stop | None) -> bool:
        """Whether this is an answer to the fork, which `stop` may end early."""
        decided = stop is not None and stop(self.losses)
        return decided or self.refused is not None or len(self.losses) >= fork.horizon

    @property
    def died_at(self) -> int | None:
        """Index of the first step whose loss was not finite; None if all were."""
        return next((i for i, loss in enumerate(self.losses) if not math.isfinite(loss)), None)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it: a loss that is not finite is null."""
        losses = [loss if math.isfinite(loss) else None for loss in self.losses]
        return {"losses": losses, "refused": self.refused, "seconds": round(self.seconds, 3)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Outcome:
        """Back from `as_dict`."""
        losses, refused, seconds = data["losses"], data.get("refused"), as_number(data.get("seconds", 0.0))
        numbers = [None] if not isinstance(losses, list) else [math.nan if v is None else as_number(v) for v in losses]
        if None in numbers or seconds is None or not isinstance(refused, str | None):
            raise ValueError("these are no losses, reason and seconds of a fork")
        return cls(tuple(numbers), refused, seconds)  # pyright: ignore[reportArgumentType]


class Oracle(Protocol):
    """Who can run forks: a rebuilt run, a recorder in a person's loop, or a planted cause in a test."""

    @property
    def cells(self) -> Sequence[Any]:
        """Every low-precision cell of the run, in the model's order."""
        ...

    def captures(self, path: str) -> Sequence[int]:
        """Steps of the states that forks can leave from, ascending; 0 is the initial state."""
        ...

    def history(self, path: str) -> Sequence[float]:
        """Training loss of steps 1, 2, ... of a trajectory, as far as it went."""
        ...

    def recorded(self, fork: Fork) -> Outcome | None:
        """The outcome of a fork that one of the two trajectories already took; None where neither did."""
        ...

    def run(self, fork: Fork, stop: Stop | None = None) -> Outcome:
        """Run one fork, until `stop` says that its losses so far decide; the oracle is left as it was."""
        ...
