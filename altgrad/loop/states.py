"""Captured states: nested tensors copied whole and put back into those that live on, and a bounded ring of such states.

A fault is looked into from states before it began, and nobody knows beforehand when that is. So the ring keeps the first
state, the newest, and between them about as many states for the last 10 steps as for the last 100 and the last 1,000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from altgrad.errors import OptionError
from altgrad.nn.spread import spread_like, whole


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


def state_bytes(state: Any) -> int:
    """Bytes of all tensors of a nested state."""
    return sum(t.numel() * t.element_size() for t in tensors_of(state))


@dataclass
class CaptureRing:
    """States by step, at most `limit_bytes` of them.

    Args:
        every: steps between captures.
        limit_bytes: bytes of all states together; one state is always kept.
        offload: what is done to a state before it is kept, such as moving it to the host.

    Raises:
        OptionError: `every` or `limit_bytes` below 1.
    """

    every: int = 10
    limit_bytes: int = 512 * 2**20
    offload: Callable[[Any], Any] = lambda state: state
    _states: dict[int, Any] = field(default_factory=dict)
    _bytes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 1 or self.limit_bytes < 1:
            raise OptionError(
                f"a ring of captures every {self.every} steps in {self.limit_bytes} bytes; use at least 1"
            )

    def due(self, step: int) -> bool:
        """Whether the state after this step is to be kept."""
        return step % self.every == 0

    def keep(self, step: int, state: Any) -> None:
        """Keep a state; older ones are thinned out until all fit. A state of a step that is there is replaced.

        Steps after `step` are dropped: the run went back and took them anew.
        """
        for later in [s for s in self._states if s > step]:
            self._drop(later)
        self._states[step] = self.offload(state)
        self._bytes[step] = state_bytes(state)
        while self.bytes > self.limit_bytes and len(self._states) > 1:
            self._drop(self._least_missed(step))

    @property
    def bytes(self) -> int:
        """Bytes kept."""
        return sum(self._bytes.values())

    @property
    def steps(self) -> list[int]:
        """Steps of the states kept, ascending."""
        return sorted(self._states)

    def __getitem__(self, step: int) -> Any:
        return self._states[step]

    def _drop(self, step: int) -> None:
        del self._states[step], self._bytes[step]

    def _least_missed(self, now: int) -> int:
        """The state whose gap, once it is gone, is smallest for its age; the first and the newest are missed most."""
        steps = self.steps
        if len(steps) == 2:
            return steps[0]
        inner = range(1, len(steps) - 1)
        return steps[min(inner, key=lambda i: ((steps[i + 1] - steps[i - 1]) / (now - steps[i] + 1), steps[i]))]
