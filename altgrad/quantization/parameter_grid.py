"""Which grid a parameter lives on: stated on the parameter by its storage, read by optimizers that step along the grid.

Storage (`altgrad.nn`) and optimizers (`altgrad.optim`) do not import each other; this fact on the parameter is all that
they share. Whoever changes a parameter's format or scale declares the new grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from altgrad.formats.scalar import FloatFormat

_ATTRIBUTE = "_altgrad_grid"


@dataclass(frozen=True)
class ParameterGrid:
    """The values scale * v, v a value of `format`.

    scale: positive number, or a tensor that broadcasts to the parameter (never written to in place).
    """

    format: FloatFormat
    scale: Tensor | float = 1.0


def declare_grid(parameter: Tensor, grid: ParameterGrid | None) -> None:
    """State that `parameter` holds values of `grid` only; None takes the statement back."""
    setattr(parameter, _ATTRIBUTE, grid)


def declared_grid(parameter: Tensor) -> ParameterGrid | None:
    """The grid that storage declared for `parameter`, or None where it may hold any value of its dtype."""
    return getattr(parameter, _ATTRIBUTE, None)
