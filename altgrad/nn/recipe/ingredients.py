"""What recipes are made of, one ingredient at a time: `recipe.without("hadamard")`, `recipe.with_(accumulator="ada_fp8")`.

An ablation is a value: the recipe as it is, less one thing. What an ingredient is removed from keeps everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from altgrad.errors import RecipeError
from altgrad.formats.catalog import block_format, get_format
from altgrad.formats.rounding import Rounding
from altgrad.nn.recipe.cells import STORAGE, Cell, changed_layer
from altgrad.nn.recipe.layer_recipe import LayerRecipe
from altgrad.nn.recipe.scaling_choice import BlockScaling, CurrentScaling, DelayedScaling, is_block
from altgrad.nn.recipe.spec import GemmRecipe, OperandSpec
from altgrad.quantization.inverse_scaling import RegionScaling
from altgrad.quantization.scaling import Arithmetic
from altgrad.records.metrics import OPERANDS


@dataclass(frozen=True)
class Ingredient:
    """One thing that a recipe can have.

    says: what it is. operand: an operand without it. gemm: a GEMM without it, where it is not in the operands. layer: a
    layer without it, where it is in neither.
    """

    says: str
    operand: Callable[[OperandSpec], OperandSpec] = lambda spec: spec
    gemm: Callable[[GemmRecipe], GemmRecipe] = lambda one: one
    layer: Callable[[LayerRecipe], LayerRecipe] = lambda layer: layer

    def removed_from(self, layer: LayerRecipe) -> LayerRecipe:
        """The layer's recipe without it; an equal one where it is not there."""

        def bare(one: GemmRecipe) -> GemmRecipe:
            specs = {role: self.operand(spec) for role, spec in one.named() if spec.format is not None}
            return self.gemm(replace(one, **specs))

        return self.layer(replace(layer, **{gemm: bare(one) for gemm, one in layer.gemms.items()}))


def _nearest(spec: OperandSpec) -> OperandSpec:
    return replace(spec, rounding=Rounding.NEAREST_EVEN) if spec.rounding is Rounding.STOCHASTIC else spec


def _rows(spec: OperandSpec) -> OperandSpec:
    """Tiles as blocks along the reduced axis, each product's own."""
    fmt = get_format(spec.format)
    if not is_block(fmt) or not fmt.is_tile:
        return spec
    rule = fmt.rule if fmt.power_of_two else None
    flat = block_format(fmt.element, fmt.tile[1], fmt.scale_format, rule, tensor_scale=fmt.tensor_scale)
    return replace(spec, format=flat.name)


def _dividing(spec: OperandSpec) -> OperandSpec:
    policy = spec.scaling
    if isinstance(policy, BlockScaling):
        return replace(spec, scaling=replace(policy, arithmetic=Arithmetic.DIVIDE, outer=0))
    if isinstance(policy, CurrentScaling) and policy.arithmetic is Arithmetic.MULTIPLY:
        return replace(spec, scaling=CurrentScaling(policy.axis, policy.power_of_two))
    return spec


def _current(spec: OperandSpec) -> OperandSpec:
    policy = spec.scaling
    if isinstance(policy, RegionScaling):
        return replace(spec, scaling=CurrentScaling(arithmetic=Arithmetic.MULTIPLY))
    if isinstance(policy, DelayedScaling):
        return replace(spec, scaling=CurrentScaling(policy.axis, policy.power_of_two))
    return spec


def _of_blocks(**changes: Any) -> Callable[[OperandSpec], OperandSpec]:
    """An operand whose block scales are those of the format in some respect; a mask that they made goes with them."""

    def changed(spec: OperandSpec) -> OperandSpec:
        if not isinstance(spec.scaling, BlockScaling):
            return spec
        policy = replace(spec.scaling, **changes)
        return replace(spec, scaling=policy, mask_saturated=spec.mask_saturated and bool(policy.deviation))

    return changed


def _once(spec: OperandSpec) -> OperandSpec:
    """Made of the tensor itself; a mask of mixed elements means nothing then."""
    return replace(spec, requantize=False, mask_saturated=spec.mask_saturated and spec.hadamard is None)


def _unpromoted(one: GemmRecipe) -> GemmRecipe:
    unit = one.accumulator
    if unit is None or unit.promote_every is None or unit.scaled_promotion:
        return one
    return replace(one, accumulator=replace(unit, promote_every=None, main="FP32"))


INGREDIENTS: dict[str, Ingredient] = {
    "stochastic_rounding": Ingredient("gradients (or requantized operands) rounded stochastically", operand=_nearest),
    "hadamard": Ingredient(
        "a block Hadamard transform before quantization", operand=lambda spec: replace(spec, hadamard=None)
    ),
    "tiles": Ingredient("square blocks, shared by both products of a tensor", operand=_rows),
    "requantization": Ingredient(
        "backward operands made of the forward's quantized ones",
        operand=_once,
    ),
    "ema": Ingredient(
        "an average of the master that decides how a weight is rounded",
        operand=lambda spec: replace(spec, average=None),
    ),
    "outer_scales": Ingredient("scales of 128 elements above those of blocks", operand=_of_blocks(outer=0)),
    "deviation_scales": Ingredient("scales by the standard deviation of a block", operand=_of_blocks(deviation=0.0)),
    "gain": Ingredient("elements shrunk before they are scaled, so that none is clipped", operand=_of_blocks(gain=1.0)),
    "clip_mask": Ingredient(
        "no gradient where an element is clipped", operand=lambda spec: replace(spec, mask_saturated=False)
    ),
    "inverse_scales": Ingredient("x multiplied by fl(max / amax) instead of divided by a scale", operand=_dividing),
    "delayed_scales": Ingredient("scales from amaxes of the past", operand=_current),
    "accumulator": Ingredient("a unit's sums", gemm=lambda one: replace(one, accumulator=None)),
    "promotion": Ingredient("a unit's sums promoted to a main sum", gemm=_unpromoted),
    "storage": Ingredient("weights stored on a grid", layer=lambda layer: _with_master(layer)),
    "plain_evaluation": Ingredient(
        "full precision in evaluation", layer=lambda layer: replace(layer, plain_evaluation=False)
    ),
}
HIGH_LAYERS = "high_layers"  # overrides by name or position that leave layers in full precision
SWITCHES = ("plain_evaluation", "save_codes")
CHANGES = ("accumulator", "stochastic_rounding", "hadamard", *SWITCHES)


def check_known(name: str, there: list[str]) -> None:
    """Refuse an ingredient that a recipe does not have.

    Raises:
        RecipeError: with those that it has.
    """
    if name not in there:
        known = name in INGREDIENTS or name == HIGH_LAYERS
        what = "the recipe has no" if known else "no ingredient is called"
        raise RecipeError(f"{what} {name!r}; it has {', '.join(there) or 'none that can be removed'}")


def changed(layer: LayerRecipe, changes: dict[str, Any]) -> LayerRecipe:
    """A layer's recipe with something added: see `Recipe.with_`.

    Raises:
        RecipeError: no such change, or what results contradicts itself.
    """
    for key in changes:
        if key not in CHANGES:
            raise RecipeError(f"a recipe is not changed by {key!r}; with_ takes high, {', '.join(CHANGES)}")
    gemms = layer.gemms
    if "accumulator" in changes:
        given = changes["accumulator"]
        three = list(given) if isinstance(given, list | tuple) else [given] * 3
        if len(three) != 3:
            raise RecipeError(f"{len(three)} accumulators; give one, or one for each of {', '.join(gemms)}")
        gemms = {name: replace(one, accumulator=unit) for (name, one), unit in zip(gemms.items(), three)}
    for role in names_in(changes.get("stochastic_rounding", ()), "stochastic_rounding"):
        gemms = {name: _rounded_by_chance(one, role) for name, one in gemms.items()}
    if "hadamard" in changes:
        one = gemms["weight_grad"]
        mixed = {role: replace(spec, hadamard=changes["hadamard"]) for role, spec in one.named()}
        gemms["weight_grad"] = replace(one, **mixed)
    return replace(layer, **gemms, **{name: changes[name] for name in SWITCHES if name in changes})


def names_in(value: Any, key: str) -> tuple[str, ...]:
    """One name, or several.

    Raises:
        RecipeError: neither.
    """
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{key} is {value!r}; give a name or several")
    return names


def _rounded_by_chance(one: GemmRecipe, role: str) -> GemmRecipe:
    if role not in OPERANDS:
        raise RecipeError(f"{role!r} is no role; stochastic_rounding takes {', '.join(OPERANDS)}")
    spec = getattr(one, role)
    if spec is None or spec.format is None:
        return one
    return replace(one, **{role: replace(spec, rounding=Rounding.STOCHASTIC)})


def _with_master(layer: LayerRecipe) -> LayerRecipe:
    return layer if layer.storage is None else changed_layer(layer, {Cell("", STORAGE, STORAGE): None}) or layer
