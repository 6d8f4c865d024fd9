"""Small pieces of a training step: its optimizer and learning rate, seeded execution, gradient norms, one host copy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.errors import AltGradError, ConfigError
from altgrad.nn.spread import local
from altgrad.optim import find_optimizer, make_optimizer
from altgrad.training.config.experiment import OptimizerSection


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: torch cannot use it here, or there is no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is none; use cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results only with this
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"device {name} is not there: torch sees {count} CUDA devices; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device mps is not there; use --device cpu")
    return device


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Within the block torch's generators start from `seed`, for models that draw (dropout); outside nothing changes."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within the block CUDA repeats its results bit for bit; CPU kernels do so by themselves."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def gradients(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients that there are; of those that are spread over ranks, this rank's part."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of all gradients together, 0-dim float32, on the device; inf also where the squares overflow."""
    return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())


def wide_norm(grads: Sequence[Tensor]) -> float:
    """The same norm in float64, for finite gradients whose squares overflow float32."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


def clip_to(grads: Sequence[Tensor], norm: Tensor | float, largest: float) -> None:
    """Scale gradients of that L2 norm down to norm `largest`, in place; smaller ones keep their values. No sync."""
    scale = largest / (torch.as_tensor(norm) + 1e-6)
    torch._foreach_mul_(list(grads), scale.clamp(max=1.0).to(grads[0].device))


def on_host(scalars: Sequence[Tensor]) -> list[float]:
    """0-dim tensors as Python numbers by one host copy; float32 values are exact."""
    return torch.stack([s.detach().double() for s in scalars]).tolist()


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
        optimizer = make_optimizer(config.name, [g for g in groups if g["params"]], **{**settings, **config.options})
        if config.reset_every:
            row.check_reset(config.reset_moments, optimizer)
        return optimizer
    except (AltGradError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.name {config.name!r}: {error}") from None


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the weights are those that an optimizer with `eval()` and `train()` (as `LMD`) wants evaluated."""
    there, back = getattr(optimizer, "eval", None), getattr(optimizer, "train", None)
    if there is None or back is None:
        yield
        return
    there()
    try:
        yield
    finally:
        back()


def lr_at(step: int, max_steps: int, config: OptimizerSection) -> float:
    """Learning rate of step 1 .. max_steps: linear warmup, then a cosine from lr to min_lr_ratio * lr, or constant."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
