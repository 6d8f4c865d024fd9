"""Change the formats of a quantized model while it trains: an emergency shift, or another recipe for a replay.

Any layer goes to and from full precision, any weight to and from its grid. Parameters keep their identity, so optimizers
keep their state, and what the new recipe leaves alone keeps every bit: values, grid scales, scale histories.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from altgrad.errors import RecipeError
from altgrad.nn.layer.classes import attention_in, swap, swap_back
from altgrad.nn.layer.raw import ATTENTION
from altgrad.nn.model.convert import close_fast_paths, fitting, leave_grid, left_unquantized, store_on_grid
from altgrad.nn.model.optimizer_hook import follow_layers, watch_optimizers
from altgrad.nn.model.recipe_checks import check_layer, check_ties
from altgrad.nn.model.spots import Spot, all_spots
from altgrad.nn.recipe.layer_recipe import LayerRecipe
from altgrad.nn.recipe.recipe import Recipe
from altgrad.nn.recipe.reformat import reformat, reformat_layer
from altgrad.nn.session import Session, sessions_of
from altgrad.quantization import FloatFormat, get_format


@dataclass(frozen=True)
class _Change:
    """What one layer becomes: `now` and `then` are None where it is in full precision."""

    spot: Spot
    session: Session
    name: str
    now: LayerRecipe | None
    then: LayerRecipe | None


def change_format(
    model: nn.Module, new: FloatFormat | str | LayerRecipe | Recipe, *, old: str | None = None, regrid: bool = True
) -> int:
    """Put another format or recipe on a quantized model; call it between steps.

    Args:
        new: a format: every quantized operand and every grid takes it, and keeps its rounding, overflow policy and
            scaling; or a whole recipe, for every layer that the call of `quantize_model` could have quantized.
        old: with a format: only entries in this format change.
        regrid: round weights to a new grid, under a fresh scale. False only when the weights are about to be loaded, as
            `load_quant_state` does.

    Returns:
        Number of parameters that were put on a new grid. Scale histories start anew where an entry changed.

    Raises:
        RecipeError: the model is not quantized, or the new format does not fit a layer (nothing is changed then).
    """
    recipes, changes = _planned(model, new, old)
    for session, recipe in zip(sessions_of(model), recipes, strict=True):
        session.recipe = recipe
    differing = [change for change in changes if change.now != change.then]
    regridded = []
    for change in differing:
        stored = change.now.storage if change.now is not None else None
        _apply(change)
        if change.then is not None and change.then.storage != stored:
            regridded.append(change.spot.state)
    if differing:
        close_fast_paths(model)
        follow_layers(model)
    if any(change.then is not None and change.then.needs_steps for change in differing):
        watch_optimizers()
    return store_on_grid(model, snap=regrid, only=regridded)


def check_change(model: nn.Module, new: FloatFormat | str | LayerRecipe | Recipe) -> None:
    """Refuse now what `change_format` would refuse; nothing is changed.

    Raises:
        RecipeError: as `change_format`.
    """
    _planned(model, new, None)


def _planned(
    model: nn.Module, new: FloatFormat | str | LayerRecipe | Recipe, old: str | None
) -> tuple[list[Recipe | None], list[_Change]]:
    """The new recipe of each session, and what becomes of each module; all of it checked."""
    sessions = sessions_of(model)
    reached = [(spot, _place(spot)) for spot in all_spots(model) if spot.reach is not None or spot.state is not None]
    if isinstance(new, (Recipe, LayerRecipe)):
        recipe = new if isinstance(new, Recipe) else Recipe(new)
        recipes: list[Recipe | None] = [recipe for _ in sessions]
    else:
        fmt, was, recipe = get_format(new), None if old is None else get_format(old).name, None

        def successor(name: str) -> str | None:
            return fmt.name if was in (None, name) else None

        recipes = [None if s.recipe is None else reformat(s.recipe, successor) for s in sessions]
    changes = []
    for spot, (session, name, positions) in reached:
        now = None if spot.state is None else spot.state.recipe
        if recipe is None:
            then = None if now is None else reformat_layer(now, successor)
        else:
            if recipe.needs_positions and positions is None:
                raise RecipeError(
                    "the recipe has overrides by position, and the model was quantized without watching it run; "
                    "restore_model, then quantize_model(model, recipe, example=...)"
                )
            then = recipe.for_layer(name, spot.type_name, positions or frozenset())
        then = None if then is None or left_unquantized(spot.kind, then) else fitting(spot, then)
        changes.append(_Change(spot, session, name, now, then))
    for change in changes:
        if change.then is not None:
            check_layer(change.spot, change.then)
    check_ties(model, {change.name: change.then for change in changes if change.then is not None})
    return recipes, changes


def _place(spot: Spot) -> tuple[Session, str, frozenset[str] | None]:
    reach, state = spot.reach, spot.state
    if reach is not None:
        return reach.session, reach.name, reach.positions
    assert state is not None
    return state.session, state.name, None


def _apply(change: _Change) -> None:
    spot, then = change.spot, change.then
    if change.now is None:
        assert then is not None
        swap(spot.module, spot.parameter, then, change.session, change.name, spot.kind)
        return
    if change.now.storage is not None and (then is None or then.storage is None):
        leave_grid(spot.module, spot.parameter)
    states = attention_in(spot.module) if spot.parameter == ATTENTION else [spot.state]
    for state in states:
        assert state is not None
        if then is None:
            state.leave_session()
        else:
            state.change_recipe(then)
    if then is None:
        swap_back(spot.module, spot.parameter)
