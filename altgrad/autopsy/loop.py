"""The small protocol that an autopsy replays a training loop through, and the loop of AltGrad's own trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from altgrad.errors import ConfigError
from altgrad.nn import Recipe
from altgrad.randomness import seed_of
from altgrad.training.step.replay import forked
from altgrad.training.step.stepping import lr_at
from altgrad.training.trainer import Trainer


class Loop(Protocol):
    """A training loop that can be put back to a state and stepped from there, bit for bit."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def recipe(self) -> Recipe:
        """The run's own recipe."""
        ...

    def capture(self) -> dict[str, Any]:
        """The complete state; "model" holds the parameters by name, "optimizer" the optimizer's state."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a captured state."""
        ...

    def put(self, recipe: Recipe) -> None:
        """Use another recipe from here on, keeping the optimizer's state."""
        ...

    def reseed(self, seed: int) -> None:
        """Draw the random bits of rounding from another seed from here on."""
        ...

    def advance(self, *, data: int = 0, lr_factor: float = 1.0) -> float:
        """Take the next step on its batch (`data` > 0: another one) and return its training loss; NaN if not finite."""
        ...

    def gradient(self) -> Tensor:
        """All gradients of the next step's batch in one vector, without taking the step."""
        ...

    def aside(self) -> Any:
        """A context within which nothing is recorded, and after which the loop is where it was."""
        ...


class TrainerLoop:
    """The loop of an `altgrad.training.Trainer`.

    Raises:
        ConfigError: the run is in float32, or is spread over ranks.
    """

    def __init__(self, trainer: Trainer) -> None:
        if not trainer.ranks.alone:
            raise ConfigError(f"this run is spread over {trainer.ranks.world_size} ranks; autopsy it on one")
        if trainer.formats.recipe is None:
            raise ConfigError("this run is in float32: there are no low-precision cells to look at")
        self.trainer, self.recipe = trainer, trainer.formats.recipe
        self.model, self.optimizer = trainer.model, trainer.optimizer

    def capture(self) -> dict[str, Any]:
        return self.trainer.capture()

    def restore(self, state: dict[str, Any]) -> None:
        self.trainer.restore(state)

    def put(self, recipe: Recipe) -> None:
        self.trainer.formats.change(recipe)

    def reseed(self, seed: int) -> None:
        from altgrad.nn import set_seed

        set_seed(self.model, seed)

    def advance(self, *, data: int = 0, lr_factor: float = 1.0) -> float:
        trainer = self.trainer
        config = trainer.config
        record = trainer.train_step(
            *trainer.batch(trainer.step + 1, seed_of(config.seed, "other batches", data) if data else None),
            schedule=lambda step: lr_factor * lr_at(step, config.max_steps, config.optimizer),
        )
        return record.loss if record.finite else math.nan

    def gradient(self) -> Tensor:
        trainer = self.trainer
        trainer.backward(*trainer.batch(trainer.step + 1))
        return torch.cat([p.grad.flatten().float() for p in trainer.parameters if p.grad is not None])

    def aside(self) -> Any:
        return forked(self.trainer)


def jittered(state: Mapping[str, Any], draw: int) -> dict[str, Any]:
    """A state whose float32 tensors have one element in eight moved by one unit in the last place.

    Which elements is a function of (name, draw). It is what separates two draws of a run that rounds nothing
    stochastically: a change below every format's resolution, which only chance can enlarge.
    """
    return {
        key: _moved(value, f"{key}", draw) if key in ("model", "optimizer") else value for key, value in state.items()
    }


def _moved(node: Any, name: str, draw: int) -> Any:
    if isinstance(node, dict):
        return {key: _moved(value, f"{name}.{key}", draw) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_moved(value, f"{name}[{i}]", draw) for i, value in enumerate(node))
    if not isinstance(node, Tensor) or node.dtype != torch.float32 or node.numel() < 2:
        return node
    generator = torch.Generator().manual_seed(seed_of("jitter", name, draw) % 2**62)
    chosen = torch.rand(node.shape, generator=generator).to(node.device) < 0.125
    return torch.where(chosen, torch.nextafter(node, torch.full_like(node, math.inf)), node)
