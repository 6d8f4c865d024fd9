"""A recipe with other formats in place of its own: what an emergency shift and `change_format` put on a model.

Rounding, overflow policy and scaling stay; where the old format had its default scaling the new one has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from altgrad.nn.recipe.layer_recipe import LayerRecipe
from altgrad.nn.recipe.recipe import Recipe
from altgrad.nn.recipe.scaling_choice import BlockScaling, default_scaling, is_block
from altgrad.nn.recipe.spec import GemmRecipe, OperandSpec
from altgrad.quantization import get_format

Successor = Callable[[str], str | None]
"""Format name to the name of the format that takes its place; None: it stays."""


def reformat(recipe: Recipe, successor: Successor) -> Recipe:
    """The recipe with each format replaced by its successor, overrides and grids included; unquantized stays so.

    Raises:
        RecipeError: a successor does not fit what the recipe says beside it (a block format as a storage grid).
    """
    default = None if recipe.default is None else reformat_layer(recipe.default, successor)
    overrides = tuple(
        o if o.recipe is None else replace(o, recipe=reformat_layer(o.recipe, successor)) for o in recipe.overrides
    )
    return Recipe(default, overrides)


def reformat_layer(recipe: LayerRecipe, successor: Successor) -> LayerRecipe:
    """One layer's recipe with each format replaced by its successor."""

    def operand(spec: OperandSpec) -> OperandSpec:
        name = None if spec.format is None else successor(spec.format)
        if name is None:
            return spec
        fmt, was = get_format(name), get_format(spec.format)
        if fmt.name == "FP32":
            return OperandSpec()
        keep = not is_block(fmt) and not isinstance(spec.scaling, BlockScaling) and spec.scaling != default_scaling(was)
        kept = spec if keep else replace(spec, mask_saturated=spec.mask_saturated and not is_block(was), average=None)
        return replace(kept, format=fmt.name, scaling=spec.scaling if keep else default_scaling(fmt))

    def gemm(one: GemmRecipe) -> GemmRecipe:
        made = replace(one, **{role: operand(spec) for role, spec in one.named()}, accumulator=None)
        kept = all(spec.format is not None for _, spec in made.named())
        return replace(made, accumulator=one.accumulator) if kept else made

    storage = recipe.storage
    name = None if storage is None else successor(storage.format)
    if storage is not None and name is not None:
        storage = None if get_format(name).name == "FP32" else replace(storage, format=get_format(name).name)
    return LayerRecipe(
        gemm(recipe.forward),
        gemm(recipe.input_grad),
        gemm(recipe.weight_grad),
        storage,
        operand(recipe.norm_weight),
        recipe.plain_evaluation,
        recipe.save_codes,
    )
