"""Update rules by name, the parameters that decay, and the learning rate as a function of the step.

To add an optimizer, add a row to `OPTIMIZERS`: how to build it, and which of the config's settings it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from altgrad.errors import ConfigError
from altgrad.training.config import OptimizerSection


@dataclass(frozen=True)
class OptimizerRow:
    """How one optimizer is made.

    Args:
        build: called with parameter groups and keyword arguments.
        settings: names of `OptimizerSection` that it takes, besides lr and weight_decay.
        defaults: arguments that `optimizer.options` may replace.
    """

    build: Callable[..., torch.optim.Optimizer]
    settings: tuple[str, ...] = ()
    defaults: Mapping[str, Any] | None = None


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw": OptimizerRow(torch.optim.AdamW, ("betas", "eps")),
    "adam": OptimizerRow(torch.optim.Adam, ("betas", "eps")),
    "sgd": OptimizerRow(torch.optim.SGD, ("momentum",)),
    "rmsprop": OptimizerRow(torch.optim.RMSprop, ("momentum", "eps")),
}


def build_optimizer(model: nn.Module, config: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the model's trainable parameters.

    Matrices decay; biases and norm weights (fewer than two dimensions) do not.

    Raises:
        ConfigError: no such optimizer, or it refuses an option.
    """
    row = OPTIMIZERS.get(config.name)
    if row is None:
        near = get_close_matches(config.name, OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(OPTIMIZERS)}"
        raise ConfigError(f"optimizer.name {config.name!r} is unknown; {hint}")
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    arguments = {name: getattr(config, name) for name in row.settings}
    arguments |= {"lr": config.lr, **(row.defaults or {}), **config.options}
    try:
        return row.build([group for group in groups if group["params"]], **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer {config.name!r} refuses its options: {error}") from None


def lr_at(step: int, max_steps: int, config: OptimizerSection) -> float:
    """Learning rate of step 1 .. max_steps: linear warmup, then a cosine from lr to min_lr_ratio * lr, or constant."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
