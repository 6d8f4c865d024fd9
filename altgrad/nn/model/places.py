"""The layers of a model that a recipe may quantize, as plain facts for `Recipe.cells`."""

from __future__ import annotations

from torch import nn

from altgrad.nn.layer.registry import kind_of
from altgrad.nn.model.convert import out_of_reach
from altgrad.nn.recipe.cells import Place
from altgrad.nn.session import REACH


def places(model: nn.Module) -> list[Place]:
    """The layers in the reach of the model's `quantize_model` call; of a model without one, all that it would reach."""
    known = [(module, module.__dict__[REACH]) for module in model.modules() if REACH in module.__dict__]
    if known:
        return [_place(module, reach.name, reach.positions) for module, reach in known]
    reached = [(name, module) for name, module, reason in out_of_reach(model) if reason is None]
    return [_place(module, name, None) for name, module in reached]


def _place(module: nn.Module, name: str, positions: frozenset[str] | None) -> Place:
    kind = kind_of(type(module))
    assert kind is not None
    return Place(name, getattr(module, "_base", type(module)).__name__, kind.kind, positions)
