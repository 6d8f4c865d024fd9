"""Nested states of tensors and plain values: copied whole, and put back into the tensors that live on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from altgrad.training.step.distributed import spread_like, whole


def copy_tree(node: Any) -> Any:
    """A copy that shares nothing with `node`: tensors are cloned on their device (whole, where they are spread over
    ranks), containers rebuilt."""
    if isinstance(node, torch.Tensor):
        return whole(node.detach()).clone()
    if isinstance(node, dict):
        return {key: copy_tree(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(copy_tree(value) for value in node)
    return node


def to_device(node: Any, device: torch.device) -> Any:
    """A copy with its tensors on `device`."""
    if isinstance(node, torch.Tensor):
        return node.detach().to(device, copy=True)
    if isinstance(node, dict):
        return {key: to_device(value, device) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(to_device(value, device) for value in node)
    return node


def tensors_of(node: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a nested state."""
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict | list | tuple):
        for value in node.values() if isinstance(node, dict) else node:
            yield from tensors_of(value)


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's parameters and persistent buffers by name."""
    return {name: whole(tensor.detach()).clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def load_model_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Write `model_state`'s result into the model's own tensors, whose identity stays."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(spread_like(tensor, state[name]))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy of an optimizer's complete state."""
    return copy_tree(optimizer.state_dict())


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue from `optimizer_state`'s result, bit for bit.

    `torch.optim.Optimizer.load_state_dict` casts floating-point state to its parameter's dtype and may keep the
    caller's tensors; the entries are therefore put back as they were saved, as copies.
    """
    optimizer.load_state_dict(copy_tree(state))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        parameter = parameters[int(index)]
        entry = optimizer.state[parameter]
        for key, value in saved.items():
            if not isinstance(value, torch.Tensor):
                continue
            live = entry.get(key)
            device = live.device if isinstance(live, torch.Tensor) else parameter.device
            value = value.detach().to(device, copy=True)
            entry[key] = spread_like(parameter, value) if value.shape == parameter.shape else value
