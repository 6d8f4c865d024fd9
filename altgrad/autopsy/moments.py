"""Optimizer moments in a low-precision format, as cells: which there are, and moments moved to other formats.

An optimizer of `altgrad.optim` with `moment_format` keeps its first and second moment rounded between steps. Each of the
two is a cell, for all parameters together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from altgrad.nn.recipe.spec import OperandSpec
from altgrad.optim import moments

NAMES = ("exp_avg", "exp_avg_sq")
"""The first moment and the second, as an optimizer's state calls them."""


@dataclass(frozen=True, order=True)
class MomentCell:
    """A moment of all parameters; it is no cell of a recipe."""

    role: str
    layer: str = "optimizer"
    gemm: str = "moments"

    def __str__(self) -> str:
        return f"{self.layer}.{self.gemm}.{self.role}"


def moment_cells(optimizer: torch.optim.Optimizer) -> dict[MomentCell, OperandSpec]:
    """The moments that an optimizer keeps in a format, with it; none for optimizers that know no such option."""
    found: dict[MomentCell, OperandSpec] = {}
    for group in optimizer.param_groups:
        for name, fmt in zip(NAMES, moments.moment_formats(group.get("moment_format")), strict=True):
            if fmt is not None:
                found[MomentCell(name)] = OperandSpec(fmt.name, rounding=group["moment_rounding"])
    return found


@torch.no_grad()
def put_moments(optimizer: torch.optim.Optimizer, specs: Mapping[MomentCell, OperandSpec]) -> None:
    """Keep the moments from here on as `specs` say, those not named in full precision; what they hold is rounded once.

    Groups of an optimizer without that option are left alone. A rounding asked for one moment holds for both.
    """
    wanted = {cell.role: spec for cell, spec in specs.items()}
    formats = tuple(moments.moment_format(wanted[name].format) if name in wanted else None for name in NAMES)
    for group in optimizer.param_groups:
        if "moment_format" not in group:
            continue
        before = moments.moment_formats(group["moment_format"])
        for parameter in group["params"]:
            for name, old, new in zip(NAMES, before, formats, strict=True):
                if old != new and name in optimizer.state.get(parameter, {}):
                    _convert(optimizer.state[parameter], name, parameter, old, new)
        group["moment_format"] = None if formats == (None, None) else tuple(fmt and fmt.name for fmt in formats)
        if wanted:
            group["moment_rounding"] = next(iter(wanted.values())).rounding.value


def _convert(state: dict[str, Any], name: str, parameter: torch.Tensor, old: Any, new: Any) -> None:
    value = moments.read(state, name, parameter, old).clone()
    state.pop(name)
    state.pop(f"{name}_scale", None)
    if new is None:
        state[name] = value
        return
    moments.create(state, name, parameter, new)
    moments.write(state, name, value, new, "nearest_even", None)
