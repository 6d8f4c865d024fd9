"""Weights that a module computes from other parameters at each use: parametrizations, the older weight_norm, pruning.

Such a layer multiplies the quantized computed weight. The gradient goes through the computation to what is trained; the
parameters and their names stay. torch makes a class for each parametrized module, with the computed tensors as
properties, and takes its one base back when the last parametrization is removed; so a quantized class has its place
below that class.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def base_class(module: nn.Module) -> type[nn.Module]:
    """A module's class as it was written: not quantized, not parametrized, not spread by FSDP2."""
    cls = parametrize.type_before_parametrizations(module)
    cls = getattr(cls, "_base", cls)
    made_by_fsdp2 = cls.__mro__[1].__name__ == "FSDPModule"
    return cls.__mro__[getattr(cls, "_orig_cls_mro_index", 2)] if made_by_fsdp2 else cls


def is_computed(module: nn.Module, name: str) -> bool:
    """Whether a tensor of that name is computed from other parameters."""
    if module._parameters.get(name) is not None:
        return False
    return parametrize.is_parametrized(module, name) or isinstance(module.__dict__.get(name), Tensor)


def computed_names(module: nn.Module) -> list[str]:
    """The names of a module's computed tensors."""
    named = list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]
    return named + [k for k, v in module.__dict__.items() if isinstance(v, Tensor) and sources(module, k)]


def sources(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that a computed tensor is computed from."""
    if parametrize.is_parametrized(module, name):
        return list(module.parametrizations[name].parameters())  # type: ignore[index,union-attr]
    return [p for key, p in module._parameters.items() if p is not None and key.startswith(f"{name}_")]


@torch.no_grad()
def computed(module: nn.Module, name: str) -> Tensor:
    """The value of a computed tensor, found without a trace: spectral_norm's vectors and generators stay as they are."""
    if not parametrize.is_parametrized(module, name):
        return module.__dict__[name]
    known = module.parametrizations._modules[name]  # type: ignore[union-attr]
    if isinstance(known, _Given):
        return known.value
    parts = list(module.parametrizations[name].modules())  # type: ignore[index,union-attr]
    training = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        with torch.random.fork_rng():
            return getattr(module, name)
    finally:
        for part, was in zip(parts, training, strict=True):
            part.training = was


class _Given(nn.Module):
    """Stands in for a parametrization: its result is known."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.__dict__["value"] = value

    def forward(self) -> Tensor:
        return self.value


@contextmanager
def reading_as(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Meanwhile a module's tensor (parameter or computed) reads as `value`."""
    if parametrize.is_parametrized(module, name):
        place, key = module.parametrizations._modules, name  # type: ignore[union-attr]
        value = _Given(value)  # type: ignore[assignment]
    else:
        place, key = module.__dict__, name
    before = place.get(key)
    place[key] = value  # type: ignore[index]
    try:
        yield
    finally:
        if before is None:
            del place[key]
        else:
            place[key] = before


def settled(module: nn.Module) -> ExitStack:
    """Until it is closed a module's computed tensors are what they are now, one tensor each."""
    stack = ExitStack()
    for name in computed_names(module):
        stack.enter_context(reading_as(module, name, getattr(module, name)))
    return stack


def over(module: nn.Module, base: type[nn.Module]) -> type[nn.Module]:
    """The class that a module gets to be a `base`: that, or its parametrized class anew over that."""
    if not parametrize.is_parametrized(module):
        return base
    cls = type(module)
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "__deepcopy__")}
    if not hasattr(base, "__deepcopy__"):
        own["__deepcopy__"] = replicate
    return type(f"Parametrized{base.__name__}", (base,), own)


def replicate(self: nn.Module, memo: dict) -> nn.Module:
    """`__deepcopy__` of classes that exist once: the copy has the same one."""
    replica = memo[id(self)] = self.__new__(type(self))
    replica.__setstate__(copy.deepcopy(self.__dict__, memo))
    return replica
