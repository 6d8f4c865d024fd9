"""Change the formats of a quantized model while it trains: the emergency shift, from the next step on."""

from __future__ import annotations

from torch import nn

from altgrad.errors import RecipeError
from altgrad.nn.layer.classes import is_quantized
from altgrad.nn.layer.registry import kind_of
from altgrad.nn.model.convert import store_on_grid
from altgrad.nn.model.optimizer_hook import watch_optimizers
from altgrad.nn.model.recipe_checks import check_layer, check_ties
from altgrad.nn.recipe.recipe import Recipe
from altgrad.nn.recipe.reformat import reformat, reformat_layer
from altgrad.nn.recipe.spec import LayerRecipe
from altgrad.nn.session import STATE, sessions_of
from altgrad.quantization import FloatFormat, get_format


def change_format(
    model: nn.Module, new: FloatFormat | str | LayerRecipe | Recipe, *, old: str | None = None, regrid: bool = True
) -> int:
    """Put another format or recipe on an already quantized model; call it between steps.

    Args:
        new: a format: every quantized operand and every grid takes it, and keeps its rounding, overflow policy and
            scaling; or a whole recipe, which must quantize the same layers.
        old: with a format: only entries in this format change.
        regrid: round grid weights to the new grid, under a fresh scale. False only when the weights are about to be
            loaded, as `load_quant_state` does.

    Returns:
        Number of parameters that were put on a new grid. Scale histories start anew where a format changed.

    Raises:
        RecipeError: the model is not quantized, or the new format does not fit a layer (nothing is changed then).
    """
    sessions = sessions_of(model)
    layers = [(module, module.__dict__[STATE]) for module in model.modules() if is_quantized(module)]
    if isinstance(new, (Recipe, LayerRecipe)):
        recipe = new if isinstance(new, Recipe) else Recipe(new)
        if recipe.needs_positions:
            raise RecipeError("a recipe with overrides by position cannot replace another; quantize_model again")
        recipes = [recipe for _ in sessions]
        made = [recipe.for_layer(state.name, module._base.__name__) for module, state in layers]
        if any(one is None for one in made):
            name = layers[made.index(None)][1].name
            raise RecipeError(f"the new recipe leaves {name!r} unquantized; restore_model and quantize_model instead")
    else:
        fmt = get_format(new)
        was = None if old is None else get_format(old).name

        def successor(name: str) -> str | None:
            return fmt.name if was in (None, name) else None

        recipes = [None if s.recipe is None else reformat(s.recipe, successor) for s in sessions]
        made = [reformat_layer(state.recipe, successor) for _, state in layers]
    for (module, state), recipe in zip(layers, made, strict=True):
        kind = kind_of(module._base)
        assert kind is not None
        assert recipe is not None
        check_layer(state.name, module, kind, recipe)
    check_ties(model, {state.name: one for (_, state), one in zip(layers, made, strict=True) if one is not None})
    for session, recipe in zip(sessions, recipes, strict=True):
        session.recipe = recipe
    changed = [state for (_, state), recipe in zip(layers, made, strict=True) if recipe != state.recipe]
    for (_, state), recipe in zip(layers, made, strict=True):
        if recipe != state.recipe:
            state.change_recipe(recipe)
    if any(state.recipe.needs_steps for state in changed):
        watch_optimizers()
    return store_on_grid(model, snap=regrid, only=changed)
