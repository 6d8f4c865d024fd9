"""How the monitor hangs on other people's objects: the steps of an optimizer, and the names of a wrapped model."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class StepWatcher(Protocol):
    """Who is told of an optimizer's steps."""

    def before_update(self, *, closure: bool) -> None:
        """An optimizer is about to step; `closure` says that it will evaluate one."""

    def after_update(self) -> None:
        """The optimizer has stepped, grid storage included."""


def watch_steps(watcher: StepWatcher, optimizer: Optimizer) -> list[Any]:
    """Call the watcher before and after every step of the optimizer; the handles of the hooks.

    The hook behind the step is one for all optimizers, since these run after an optimizer's own: grid storage has then
    rounded, whoever was attached first. Neither hook keeps the watcher alive; the last goes with it.
    """
    me, watched = weakref.ref(watcher), weakref.ref(optimizer)

    def before(_: Optimizer, args: tuple, kwargs: dict) -> None:
        if (alive := me()) is not None:
            alive.before_update(closure=bool(args) or kwargs.get("closure") is not None)

    def after(stepped: Optimizer, *_: Any) -> None:
        if stepped is watched() and (alive := me()) is not None:
            alive.after_update()

    handles = [optimizer.register_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    weakref.finalize(watcher, handles[1].remove)
    return handles


def plain_name(name: str) -> str:
    """A layer's name without what DistributedDataParallel and torch.compile put into it; the model itself is "model"."""
    return name.replace("_orig_mod.", "").removeprefix("module.") or "model"


def layer_name(parameter: str) -> str:
    """The layer that a parameter's statistics are filed under: its module's name for a weight, else its own."""
    return plain_name("" if parameter == "weight" else parameter.removesuffix(".weight"))
