"""Change the formats of a quantized model while it trains: the emergency shift, from the next step on."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from altgrad.errors import RecipeError
from altgrad.nn.layer.classes import is_quantized
from altgrad.nn.layer.registry import kind_of
from altgrad.nn.model.convert import store_on_grid
from altgrad.nn.model.optimizer_hook import watch_optimizers
from altgrad.nn.model.recipe_checks import check_layer, check_ties
from altgrad.nn.recipe.recipe import Recipe
from altgrad.nn.recipe.scaling_choice import BlockScaling, default_scaling, is_block
from altgrad.nn.recipe.spec import GemmRecipe, LayerRecipe, OperandSpec
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
        recipes = [None if s.recipe is None else reformat(s.recipe, fmt, was) for s in sessions]
        made = [reformat_layer(state.recipe, fmt, was) for _, state in layers]
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


def reformat(recipe: Recipe, fmt, old: str | None = None) -> Recipe:
    """The recipe with every format (or every `old` one) replaced by `fmt`."""
    default = None if recipe.default is None else reformat_layer(recipe.default, fmt, old)
    overrides = tuple(
        o if o.recipe is None else replace(o, recipe=reformat_layer(o.recipe, fmt, old)) for o in recipe.overrides
    )
    return Recipe(default, overrides)


def reformat_layer(recipe: LayerRecipe, fmt, old: str | None = None) -> LayerRecipe:
    """One layer's recipe with every format (or every `old` one) replaced by `fmt`."""

    def operand(spec: OperandSpec | None) -> OperandSpec | None:
        if spec is None or spec.format is None or (old is not None and spec.format != old):
            return spec
        was = get_format(spec.format)
        keep = not is_block(fmt) and not isinstance(spec.scaling, BlockScaling) and spec.scaling != default_scaling(was)
        scaling = spec.scaling if keep else default_scaling(fmt)
        return replace(spec, format=fmt.name, scaling=scaling)

    def gemm(one: GemmRecipe) -> GemmRecipe:
        return GemmRecipe(operand(one.input), operand(one.weight), operand(one.grad_output))

    storage = recipe.storage
    if storage is not None and (old is None or storage.format == old):
        storage = replace(storage, format=fmt.name)
    return LayerRecipe(
        gemm(recipe.forward), gemm(recipe.input_grad), gemm(recipe.weight_grad), storage, _norm(operand, recipe)
    )


def _norm(operand, recipe: LayerRecipe) -> OperandSpec:
    made = operand(recipe.norm_weight)
    assert made is not None
    return made
