"""What advice and autopsies need of a training loop, and that loop for anybody's own step function.

    loop = StepLoop(model, optimizer, step_fn, also=[scheduler, scaler])
    advice = advise_loop(loop, schedule=lrs)      # of a float32 model
    recorder = Recorder(loop)                     # of a quantized one

A loop of another kind is a class with the members of `Loop`; both take it as it is.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from altgrad.errors import ConfigError, RecipeError
from altgrad.loop.states import copy_tree, load_model_state, load_optimizer_state, model_state, optimizer_state
from altgrad.nn.model.state import load_quant_state, quant_state
from altgrad.nn.session import sessions_of


class Loop(Protocol):
    """A training loop that can be put back to a state and stepped from there, bit for bit."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def advance(self) -> float:
        """Take the next step on its batch and return its training loss; NaN if not finite.

        A keyword `data: int = 0`, where it has one, names other batches than the run's.
        """
        ...

    def gradient(self, ahead: int = 0) -> tuple[float, Tensor]:
        """Loss and all gradients of the batch of the next step, or of the step `ahead` of it; none is taken.

        Gradients are one float32 vector, in the order of the model's parameters, and stay in their `grad` besides.
        """
        ...

    def capture(self) -> dict[str, Any]:
        """The complete state; "model" holds the parameters by name, "optimizer" the optimizer's state."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a captured state, which can be used again."""
        ...


class Stateful(Protocol):
    """A scheduler, a gradient scaler, a data loader: whatever else a step changes."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class StepLoop:
    """The loop of a function that takes one whole training step.

    Args:
        model: quantized or not.
        optimizer: the one that `step_fn` steps.
        step_fn: takes step 1, 2, ... on the batch of that step and returns its loss (a number or a tensor of one element).
            What it draws must be a function of the step, or come from the generators of torch, numpy or Python. An argument
            `data`, where it has one, names other batches: 0 are the run's.
        also: schedulers, scalers and the like that a step changes.
        taken: steps taken before, of a run that was resumed: the next one is `step_fn(taken + 1)`.

    Raises:
        ConfigError: `step_fn` is no function; `taken` is negative; something of `also` has no state to keep.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step_fn: Callable[..., Any],
        *,
        also: Sequence[Stateful] = (),
        taken: int = 0,
    ) -> None:
        if not callable(step_fn):
            raise ConfigError(f"step_fn is a {type(step_fn).__name__}; give a function that takes step 1, 2, ...")
        if taken < 0:
            raise ConfigError(f"taken={taken} steps before this one; give 0 or more")
        for one in also:
            if not (hasattr(one, "state_dict") and hasattr(one, "load_state_dict")):
                raise ConfigError(
                    f"also holds a {type(one).__name__}, which has no state_dict and load_state_dict; leave it out if a step "
                    "does not change it, else give it both"
                )
        self.model, self.optimizer, self.step_fn, self.also = model, optimizer, step_fn, tuple(also)
        self.taken = taken
        self.takes_data = takes_data(step_fn)
        self._own: list[Tensor | None] | None = None  # gradients before `gradient` left others

    def advance(self, *, data: int = 0) -> float:
        """Raises ConfigError on other batches where `step_fn` has no argument `data`."""
        if data and not self.takes_data:
            raise ConfigError("step_fn has no argument `data` that names other batches")
        self._forget()
        self.taken += 1
        given = self.step_fn(self.taken, data=data) if self.takes_data else self.step_fn(self.taken)
        return finite_or_nan(given)

    def gradient(self, ahead: int = 0) -> tuple[float, Tensor]:
        """The gradients as the optimizer would find them (unscaled, clipped), whatever `step_fn` does to them afterwards."""
        self._forget()
        found: list[Tensor | None] = []
        parameters = list(self.model.parameters())
        own = [p.grad for p in parameters]

        def keep(*_: Any) -> None:
            found[:] = [None if p.grad is None else p.grad.detach().clone() for p in parameters]

        hook = self.optimizer.register_step_pre_hook(keep)
        try:
            with aside(self):
                self.model.zero_grad(set_to_none=True)
                self.taken += ahead
                loss = self.advance()
                if not found:  # a scaler that met an inf leaves the step out
                    keep()
        finally:
            hook.remove()
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        self._own = own
        return loss, flat_gradient(self.model)

    def _forget(self) -> None:
        """The gradients of the next step begin from what they were before somebody asked for them."""
        if self._own is not None:
            for parameter, gradient in zip(self.model.parameters(), self._own, strict=True):
                parameter.grad = gradient
        self._own = None

    def capture(self) -> dict[str, Any]:
        """Parameters, optimizer, quantization, everything in `also`, and the generators of torch, numpy and Python."""
        return {
            "step": self.taken,
            "model": model_state(self.model),
            "optimizer": optimizer_state(self.optimizer),
            "buffers": {name: buffer.clone() for name, buffer in unsaved_buffers(self.model)},
            "formats": copy_tree(quant_state(self.model)) if was_quantized(self.model) else {},
            "also": [copy_tree(one.state_dict()) for one in self.also],
            "generators": _generators(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Gradients are none afterwards, as between whole steps."""
        if state["formats"]:
            load_quant_state(self.model, state["formats"])
        load_model_state(self.model, state["model"])
        for name, buffer in unsaved_buffers(self.model):
            buffer.copy_(state["buffers"][name])
        load_optimizer_state(self.optimizer, state["optimizer"])
        for one, kept in zip(self.also, state["also"], strict=True):
            one.load_state_dict(copy_tree(kept))
        _set_generators(state["generators"])
        self.taken = state["step"]


def was_quantized(model: nn.Module) -> bool:
    """Whether a recipe was put on the model, even one that leaves all of it in float32 now."""
    try:
        return bool(sessions_of(model))
    except RecipeError:
        return False


def unsaved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that are in no state_dict, by name."""
    saved = model.state_dict()
    return [(name, buffer.detach()) for name, buffer in model.named_buffers() if name not in saved]


def takes_data(step: Callable[..., Any]) -> bool:
    """Whether a function that steps has an argument `data`, which names other batches."""
    return "data" in inspect.signature(step).parameters


def finite_or_nan(loss: Any) -> float:
    """A loss as a number; NaN if it is not finite."""
    value = float(loss.detach() if isinstance(loss, Tensor) else loss)
    return value if math.isfinite(value) else math.nan


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients that there are in one vector, float32.

    Raises:
        ConfigError: there is none.
    """
    found = [p.grad.detach().flatten().float() for p in model.parameters() if p.grad is not None]
    if not found:
        raise ConfigError(
            f"no parameter of {type(model).__name__} has a gradient after a step: either none is trained, or the step was "
            "taken on another model"
        )
    return torch.cat(found)


@contextmanager
def generators_kept() -> Iterator[None]:
    """After the block the generators of torch, numpy and Python stand where they stood."""
    kept = _generators()
    try:
        yield
    finally:
        _set_generators(kept)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """After the block buffers, such as a BatchNorm's averages, are what they were."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])


@contextmanager
def aside(loop: Loop) -> Iterator[None]:
    """Within the block the loop may go anywhere; afterwards it is back where it was."""
    own, gradients = loop.capture(), [p.grad for p in loop.model.parameters()]
    try:
        yield
    finally:
        loop.restore(own)
        for parameter, gradient in zip(loop.model.parameters(), gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def slowed(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Within the block every step of the optimizer is taken at `factor` times its learning rate, whoever sets that."""
    if factor == 1.0:
        yield
        return
    kept: list[Any] = []

    def before(stepped: torch.optim.Optimizer, *_: Any) -> None:
        kept[:] = [group["lr"] for group in stepped.param_groups]
        for group in stepped.param_groups:
            group["lr"] = group["lr"] * factor

    def after(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for group, lr in zip(stepped.param_groups, kept, strict=True):
            group["lr"] = lr

    hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _generators() -> dict[str, Any]:
    """States of the generators of torch, of each CUDA device in use, of numpy and of Python, as plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "python": random.getstate(),
    }


def _set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
