"""The loop that `advise` makes of a model, its batches and its loss, and a recipe that a loop has for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.errors import ConfigError
from altgrad.loop.loop import Loop, StepLoop, buffers_kept, finite_or_nan, flat_gradient
from altgrad.nn import Recipe, quantize_model, restore_model

Batches = Sequence[tuple[Tensor, ...]] | Callable[[int], tuple[Tensor, ...]]
"""Batches in turn, over and over, or a function from the step (1, 2, ...) to its batch."""


class PlainLoop(StepLoop):
    """Forward, backward, optimizer step, over batches that are handed in.

    Args:
        model: trained in place; `advise` hands in a copy.
        batches: tuples of tensors; `loss(model, *batch)` gives what is minimized.
        optimizer: over the model's parameters, or a function from them to one; None: AdamW with lr 1e-3.
        schedule: learning rate of each step of the whole run that is planned, used from the first step on.

    Raises:
        ConfigError: no batch, or no loss function.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
        schedule: Sequence[float] = (),
    ) -> None:
        if not callable(loss):
            raise ConfigError("advise needs loss(model, *batch), a function that returns what training minimizes")
        if not callable(batches) and not len(batches):
            raise ConfigError("there is no batch to trace; hand in at least one tuple of tensors")
        self._loss, self.schedule = loss, tuple(schedule)
        self._batches = batches if callable(batches) else lambda step: batches[(step - 1) % len(batches)]
        make = (lambda ps: torch.optim.AdamW(ps, lr=1e-3)) if optimizer is None else optimizer
        stepped = make if isinstance(make, torch.optim.Optimizer) else make(model.parameters())
        super().__init__(model.train(), stepped, self._step)

    def _step(self, step: int) -> float:
        loss = self._backward(step)
        if self.schedule:
            lr = self.schedule[min(step, len(self.schedule)) - 1]
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.optimizer.step()
        return loss

    def gradient(self, ahead: int = 0) -> tuple[float, Tensor]:
        """The loop is left where it was: buffers are put back, and dropout draws the same mask for every question of a step."""
        with buffers_kept(self.model), torch.random.fork_rng():
            torch.manual_seed(self.taken + ahead)
            loss = self._backward(self.taken + 1 + ahead)
        return finite_or_nan(loss), flat_gradient(self.model)

    def _backward(self, step: int) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        batch = self._batches(step)
        loss = self._loss(self.model, *(batch if isinstance(batch, tuple | list) else (batch,)))
        loss.backward()
        return float(loss.detach())


@contextmanager
def quantized(loop: Loop, recipe: Recipe | None, seed: int = 0) -> Iterator[None]:
    """Within the block the loop's model has the recipe (None: it stays in float32); afterwards it is as it was."""
    if recipe is None or not recipe.quantizes:
        yield
        return
    quantize_model(loop.model, recipe, seed=seed)
    try:
        yield
    finally:
        restore_model(loop.model)
