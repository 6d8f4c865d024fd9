"""Replay: fork a captured state, change any part of what follows, step, and leave the trainer as it was.

A replay with nothing changed repeats the run's own steps bit for bit: everything random is a function of (seed, step),
and the state is complete.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from altgrad.errors import ConfigError
from altgrad.loop.loop import buffers_kept, flat_gradient
from altgrad.randomness import seed_of

if TYPE_CHECKING:
    from altgrad.nn import Recipe

Schedule = Callable[[int], float]


class Replayable(Protocol):
    """What a replay needs of a trainer."""

    config: Any
    model: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    step: int
    ranks: Any
    formats: Any
    measuring: Any

    def capture(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def batch(self, step: int, seed: int | None = None) -> tuple[Tensor, Tensor]: ...

    def train_step(self, x: Tensor, y: Tensor, *, schedule: Schedule | None = None) -> Any: ...

    def backward(self, x: Tensor, y: Tensor) -> Tensor: ...


def replay(
    trainer: Replayable,
    state: dict[str, Any],
    steps: int,
    *,
    recipe: Recipe | None = None,
    rounding_seed: int | None = None,
    data_seed: int | None = None,
    schedule: Schedule | None = None,
) -> list[Any]:
    """Take `steps` steps from a captured state and return their records; the trainer goes on as if nothing had been.

    Args:
        trainer: of the config that the state was captured under; its monitor sees nothing of the replay.
        state: `Trainer.capture`'s result.
        steps: at least 1; may go beyond the config's `max_steps`.
        recipe: formats from here on, in place of the state's; any layer to and from unquantized, storage to and from
            float32 masters. The optimizer's state is kept.
        rounding_seed: seed of all stochastic rounding in place of the run's.
        data_seed: seed of the batches in place of the run's.
        schedule: learning rate of a step (1, 2, ...), in place of the config's.

    Raises:
        ConfigError: fewer than one step; several ranks, which would have to fork together; a recipe for a run without
            quantized layers.
    """
    if steps < 1:
        raise ConfigError(f"a replay of {steps} steps replays nothing; ask for at least 1")
    if not trainer.ranks.alone:
        raise ConfigError(f"this run is spread over {trainer.ranks.world_size} ranks; replay it on one")
    with forked(trainer, state):
        if recipe is not None:
            trainer.formats.change(recipe)
        if rounding_seed is not None:
            from altgrad.nn import set_seed

            set_seed(trainer.model, rounding_seed)
        return [
            trainer.train_step(*trainer.batch(trainer.step + 1, data_seed), schedule=schedule) for _ in range(steps)
        ]


@contextmanager
def forked(trainer: Replayable, state: dict[str, Any] | None = None):
    """Within the block the trainer stands at `state` (None: where it is) and nothing is recorded; afterwards it is back."""
    own, gradients = trainer.capture(), [p.grad for p in trainer.parameters]
    try:
        with trainer.measuring.switched_off():
            if state is not None:
                trainer.restore(state)
            yield
    finally:
        trainer.restore(own)
        for parameter, gradient in zip(trainer.parameters, gradients, strict=True):
            parameter.grad = gradient


class TrainerLoop:
    """A trainer as an `altgrad.loop.Loop`.

    Raises:
        ConfigError: it is spread over ranks.
    """

    def __init__(self, trainer: Replayable) -> None:
        if not trainer.ranks.alone:
            raise ConfigError(f"this run is spread over {trainer.ranks.world_size} ranks; look into it on one")
        self.trainer, self.model, self.optimizer = trainer, trainer.model, trainer.optimizer

    def advance(self, *, data: int = 0) -> float:
        record = self.trainer.train_step(*self._batch(data=data))
        return record.loss if record.finite else math.nan

    def gradient(self, ahead: int = 0) -> tuple[float, Tensor]:
        with buffers_kept(self.model):
            loss = self.trainer.backward(*self._batch(ahead))
        return float(loss), flat_gradient(self.model)

    def _batch(self, ahead: int = 0, data: int = 0) -> tuple[Tensor, Tensor]:
        seed = seed_of(self.trainer.config.seed, "other batches", data) if data else None
        return self.trainer.batch(self.trainer.step + 1 + ahead, seed)

    def capture(self) -> dict[str, Any]:
        return self.trainer.capture()

    def restore(self, state: dict[str, Any]) -> None:
        self.trainer.restore(state)

    def aside(self) -> AbstractContextManager[None]:
        """Within the block nothing is recorded; afterwards the trainer is where it was."""
        return forked(self.trainer)


def first_difference(a: Any, b: Any, path: str = "") -> str | None:
    """Path of the first leaf in which two captured states differ in any bit; None where they are equal."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        alike = (
            isinstance(a, torch.Tensor)
            and isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
        )
        return None if alike else path or "state"
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return None if np.array_equal(a, b) else path or "state"
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if key not in a or key not in b:
                return f"{path}.{key}".lstrip(".")
            if (found := first_difference(a[key], b[key], f"{path}.{key}".lstrip("."))) is not None:
                return found
        return None
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return path
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := first_difference(x, y, f"{path}[{i}]")) is not None), None)
    return None if a == b or (a != a and b != b) else path or "state"
