"""The small protocol through which a training loop is traced, asked for one gradient, and forked."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from altgrad.errors import ConfigError
from altgrad.nn import Recipe, quantize_model, restore_model

Batches = Sequence[tuple[Tensor, ...]] | Callable[[int], tuple[Tensor, ...]]
"""Batches in turn, over and over, or a function from the step (1, 2, ...) to its batch."""


class Loop(Protocol):
    """A float32 training loop that can be put back to a state and stepped from there."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def schedule(self) -> Sequence[float]:
        """Learning rate of each step of the whole run that is planned; empty where it is not known."""
        ...

    def advance(self) -> float:
        """Take the next step and return its training loss; NaN if not finite."""
        ...

    def gradient(self, ahead: int = 0) -> tuple[float, Tensor]:
        """Loss and all gradients of the batch of the next step, or of the step `ahead` of it; none is taken.

        Gradients are one vector, in the order of the model's parameters, and stay in their `grad` besides.
        """
        ...

    def capture(self) -> Any:
        """The complete state."""
        ...

    def restore(self, state: Any) -> None:
        """Go back to a captured state."""
        ...


class PlainLoop:
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
        self.model, self._loss, self.schedule = model.train(), loss, tuple(schedule)
        self._batches = batches if callable(batches) else lambda step: batches[(step - 1) % len(batches)]
        make = (lambda ps: torch.optim.AdamW(ps, lr=1e-3)) if optimizer is None else optimizer
        self.optimizer = make if isinstance(make, torch.optim.Optimizer) else make(model.parameters())
        self.step = 0

    def advance(self) -> float:
        loss = self._backward(self.step + 1)
        if self.schedule:
            lr = self.schedule[min(self.step, len(self.schedule) - 1)]
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.optimizer.step()
        self.step += 1
        return loss

    def gradient(self, ahead: int = 0) -> tuple[float, Tensor]:
        """The loop is left where it was: buffers are put back, and dropout draws the same mask for every question of a step."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.random.fork_rng():
            torch.manual_seed(self.step + ahead)
            loss = self._backward(self.step + 1 + ahead)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        return loss, flat_gradient(self.model)

    def _backward(self, step: int) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        batch = self._batches(step)
        loss = self._loss(self.model, *(batch if isinstance(batch, tuple | list) else (batch,)))
        loss.backward()
        value = float(loss.detach())
        return value if math.isfinite(value) else math.nan

    def capture(self) -> Any:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        return copy.deepcopy(state)

    def restore(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.step = state["step"]


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients that there are in one vector, float32."""
    return torch.cat([p.grad.detach().flatten().float() for p in model.parameters() if p.grad is not None])


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
