"""Which grid a parameter lives on: one fact with one owner, asked for by layers, optimizers and saved states alike.

Storage (`altgrad.nn`) and optimizers (`altgrad.optim`) do not import each other; this fact is all that they share. It is
kept beside the parameter, not on it, so that copies and files of a parameter carry nothing. A grid is never changed
(on a GPU its owner may write a step's scale into the old one's tensor, which CUDA graphs go on reading): whoever
changes a parameter's format or scale states the new grid. An owner in place of a grid is asked at every reading, so
that a parameter which somebody else has written since has the grid of its present values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from altgrad.formats.scalar import FloatFormat


@dataclass(frozen=True)
class ParameterGrid:
    """The values scale * v, v a value of `format`.

    scale: positive number, or a tensor that broadcasts to the parameter (which only its owner may write to).
    settled: False where the parameter, or one of its channels, holds nothing but zeros: the scale is then a placeholder
        that the first update replaces, so an optimizer leaves the landing to storage.
    """

    format: FloatFormat
    scale: Tensor | float = 1.0
    settled: bool = True


class GridOwner(Protocol):
    """What knows the grid of a parameter's present values, whoever wrote them."""

    def grid_of(self, weight: Tensor) -> ParameterGrid:
        """The grid of the values that are there now."""
        ...


_GRIDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def declare_grid(parameter: Tensor, grid: ParameterGrid | GridOwner | None) -> None:
    """State that `parameter` lives on `grid`, or on that of an owner; None takes the statement back."""
    if grid is None:
        _GRIDS.pop(parameter, None)
    else:
        _GRIDS[parameter] = grid


def grid_owner(parameter: Tensor) -> ParameterGrid | GridOwner | None:
    """What `declare_grid` was given."""
    return _GRIDS.get(parameter)


def declared_grid(parameter: Tensor) -> ParameterGrid | None:
    """The grid of the parameter's present values, or None where it may hold any value of its dtype."""
    found = _GRIDS.get(parameter)
    return found if found is None or isinstance(found, ParameterGrid) else found.grid_of(parameter)
