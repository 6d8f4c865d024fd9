"""What an autopsy needs of a training loop beside `altgrad.loop`'s protocol, and the loop of AltGrad's own trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from altgrad.errors import ConfigError
from altgrad.loop.loop import Loop
from altgrad.nn import Recipe
from altgrad.randomness import seed_of
from altgrad.training.step.replay import TrainerLoop
from altgrad.training.trainer import Trainer


class RecipeLoop(Loop, Protocol):
    """A loop of a quantized model whose recipe can be changed between steps."""

    @property
    def recipe(self) -> Recipe:
        """The run's own recipe."""
        ...

    def put(self, recipe: Recipe) -> None:
        """Use another recipe from here on, keeping the optimizer's state."""
        ...

    def advance(self, *, data: int = 0) -> float:
        """The next step, on another batch than the run's where `data` is above 0."""
        ...

    def aside(self) -> AbstractContextManager[Any]:
        """A context within which nothing is recorded, and after which the loop is where it was."""
        ...


class RunLoop(TrainerLoop):
    """The loop of a quantized run of an `altgrad.training.Trainer`.

    Raises:
        ConfigError: the run is in float32, or is spread over ranks.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        if trainer.formats.recipe is None:
            raise ConfigError("this run is in float32: there are no low-precision cells to look at")
        self.recipe: Recipe = trainer.formats.recipe

    def put(self, recipe: Recipe) -> None:
        self.trainer.formats.change(recipe)


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
