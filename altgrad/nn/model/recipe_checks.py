"""Whether a recipe fits a layer: dtype, block sizes and ties, refused before anything is changed."""

from __future__ import annotations

import torch
from torch import nn

from altgrad.errors import RecipeError
from altgrad.nn.layer.computed import computed
from altgrad.nn.layer.raw import ATTENTION
from altgrad.nn.layer.registry import LayerKind
from altgrad.nn.model.spots import Spot, all_spots
from altgrad.nn.recipe.layer_recipe import LayerRecipe
from altgrad.nn.recipe.scaling_choice import is_block
from altgrad.quantization import get_format

_MANTISSA = {torch.float32: 23, torch.float64: 52, torch.bfloat16: 7, torch.float16: 10}


def check_layer(spot: Spot, recipe: LayerRecipe) -> None:
    """Refuse formats wider than the weight's dtype, and blocks that do not divide the layer's features where the recipe
    wants whole ones.

    Raises:
        RecipeError: with the layer, the value, the limit and the remedy.
    """
    name, kind, weight = spot.name, spot.kind, spot.weight
    if spot.parameter == ATTENTION:
        return
    if spot.is_computed:
        weight = computed(spot.module, spot.parameter)
        if recipe.storage is not None:
            raise RecipeError(
                f"layer {name!r}: grid storage in {recipe.storage.format} needs a weight that is stored, and this one is computed from "
                f"other parameters at each use (a parametrization, weight_norm, pruning); remove that first, give the layer "
                f'storage="master" by an override such as name={name!r}, or exclude it'
            )
    if weight is None or weight.dtype not in _MANTISSA:
        raise RecipeError(f"layer {name!r} has a weight of dtype {getattr(weight, 'dtype', None)}; cast it to float32")
    formats = {spec.format for _, _, spec in recipe.entries()} if kind.kind != "norm" else {recipe.norm_weight.format}
    if recipe.storage is not None:
        formats.add(recipe.storage.format)
    for fmt in (get_format(f) for f in formats if f is not None):
        bits = (fmt.element if is_block(fmt) else fmt).mantissa_bits
        if bits > _MANTISSA[weight.dtype]:
            raise RecipeError(
                f"{fmt.name} has {bits} mantissa bits, but layer {name!r} has {weight.dtype} parameters with "
                f"{_MANTISSA[weight.dtype]}; use float32 parameters (with autocast) or a narrower format"
            )
    if recipe.storage is not None and weight.dtype not in (torch.float32, torch.float64):
        raise RecipeError(
            f"grid storage in {recipe.storage.format} for layer {name!r} of {weight.dtype}: scale times payload need not "
            "fit it; use float32 parameters (with autocast)"
        )
    if recipe.is_emulated and kind.kind in ("conv", "conv_transpose", "embedding"):
        raise RecipeError(
            f"layer {name!r} ({kind.kind}): accumulators, transforms, inverse scales and requantization are for linear "
            f"layers; leave it out by an override such as name={name!r}: FP32, or give it another recipe"
        )
    if kind.kind in ("linear", "conv", "conv_transpose"):
        _check_blocks(name, weight, kind, recipe)
    elif kind.kind == "embedding":
        _check_divides(name, "embedding_dim", weight.shape[1], recipe.forward.weight)


def _check_blocks(name: str, weight, kind: LayerKind, recipe: LayerRecipe) -> None:
    rows, columns = (1, 0) if kind.transposed else (0, 1)
    out_features, in_features = weight.shape[rows], weight.shape[columns]
    inner, outer = ("in_channels", "out_channels") if kind.kind.startswith("conv") else ("in_features", "out_features")
    for spec in (recipe.forward.input, recipe.forward.weight):
        _check_divides(name, inner, in_features, spec)
    for spec in (recipe.input_grad.grad_output, recipe.input_grad.weight):
        _check_divides(name, outer, out_features, spec)


def _check_divides(name: str, what: str, size: int, spec) -> None:
    fmt = spec.resolved
    if not is_block(fmt) or not spec.whole_blocks:
        return
    side = max(fmt.tile)
    if size % side:
        divisors = [d for d in range(2, 129) if size % d == 0]
        raise RecipeError(
            f"layer {name!r}: {what} {size} is not a multiple of {fmt.name}'s block {side}; drop whole_blocks from the recipe, exclude the layer, pad it to "
            f"{-(-size // side) * side}, or use a block of {', '.join(map(str, divisors[-6:])) or 'another size'}"
        )


def check_ties(model: nn.Module, planned: dict[str, LayerRecipe]) -> None:
    """Refuse tied weights whose layers disagree on storage: a parameter is stored in one way.

    Raises:
        RecipeError: naming both layers.
    """
    users: dict[int, list[str]] = {}
    for spot in all_spots(model):
        if spot.weight is not None:
            users.setdefault(id(spot.weight), []).append(spot.name)
    for names in users.values():
        stores = {name: planned[name].storage if name in planned else None for name in names}
        first = names[0]
        for other in names[1:]:
            if stores[other] != stores[first]:
                raise RecipeError(
                    f"{first!r} and {other!r} share one weight but store it differently ({stores[first] or 'master'}, "
                    f"{stores[other] or 'master'}); quantize both alike or exclude both"
                )
