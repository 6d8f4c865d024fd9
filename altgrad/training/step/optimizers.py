"""The optimizer that a config names, the parameters that decay, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from altgrad.errors import AltGradError, ConfigError
from altgrad.optim import find_optimizer, make_optimizer
from altgrad.training.config.experiment import OptimizerSection


def build_optimizer(model: nn.Module, config: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer of `altgrad.optim` that `config` names, over the model's trainable parameters.

    Matrices decay; biases and norm weights (fewer than two dimensions) do not. Settings that an optimizer does not have
    are not passed to it; `config.options` must all be its own.

    Raises:
        ConfigError: no such optimizer, or it refuses an option.
    """
    try:
        row = find_optimizer(config.name)
        settings: dict[str, Any] = {n: getattr(config, n) for n in ("lr", "weight_decay", "betas", "eps", "momentum")}
        settings = {name: value for name, value in settings.items() if value is not None and name in row.options}
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if p.dim() >= 2]}, {"params": [p for p in trained if p.dim() < 2]}]
        if "weight_decay" in row.options:
            groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
        return make_optimizer(config.name, [g for g in groups if g["params"]], **{**settings, **config.options})
    except (AltGradError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.name {config.name!r}: {error}") from None


def lr_at(step: int, max_steps: int, config: OptimizerSection) -> float:
    """Learning rate of step 1 .. max_steps: linear warmup, then a cosine from lr to min_lr_ratio * lr, or constant."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
