"""The short form of a layer's recipe: one format for all of it, with any operand replaced."""

from __future__ import annotations

from altgrad.errors import RecipeError
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.nn.recipe.scaling_choice import StorageScaling, is_block
from altgrad.nn.recipe.spec import GemmRecipe, LayerRecipe, OperandSpec, StorageSpec
from altgrad.quantization import FloatFormat, get_format

_SAME = object()


def layer_recipe(
    format: FloatFormat | str | None,
    *,
    weight=_SAME,
    activation=_SAME,
    grad=_SAME,
    rounding: Rounding | str = Rounding.NEAREST_EVEN,
    scaling="amax",
    overflow: Overflow | str = Overflow.SATURATE_FINITE,
    storage: str | StorageSpec = "master",
    storage_rounding: Rounding | str | None = None,
    norm_weight: FloatFormat | str | None = None,
    subnormals: bool = True,
    mask_saturated: bool = False,
    random_bits: int = 24,
    whole_blocks: bool = False,
) -> LayerRecipe:
    """One format for x, w and dy of all three GEMMs, with any of the three replaced.

    Args:
        format: format of every operand that is not replaced; None or "FP32" leaves it unquantized.
        weight, activation, grad: formats of w, x and dy where they differ (None leaves that operand unquantized).
        rounding, overflow, subnormals, random_bits: of every quantized operand.
        scaling: of every quantized operand; "amax" is the current amax per tensor (scale 1 for BF16 and TF32). Block
            formats have their own.
        storage: "master": float32 weights quantized at use. "grid": weights that stay on the weight format's grid; or
            a `StorageSpec`.
        storage_rounding: of the write back to the grid; None is `rounding`.
        norm_weight: format of normalisation weights (current amax per tensor).
        mask_saturated: straight-through gradient only where |x / scale| <= max (x and w).
        whole_blocks: refuse axes that are no multiple of a block format's block, instead of letting the last block be
            short.

    Raises:
        RecipeError: contradictory arguments.
    """

    def named(value):
        return format if value is _SAME else value

    def operand(name, *, own_scaling=None, masked=False) -> OperandSpec:
        if name is None or get_format(name).name == "FP32":
            return OperandSpec()
        choice = None if is_block(get_format(name)) else own_scaling or scaling
        return OperandSpec(
            name if isinstance(name, str) else name.name,
            rounding,  # type: ignore[arg-type]
            overflow,  # type: ignore[arg-type]
            choice,  # type: ignore[arg-type]
            subnormals or is_block(get_format(name)),
            masked and not is_block(get_format(name)),
            random_bits,
            whole_blocks and is_block(get_format(name)),
        )

    grid = _storage(storage, named(weight), storage_rounding or rounding, subnormals, random_bits)
    x = operand(named(activation), masked=mask_saturated)
    w = operand(named(weight), masked=mask_saturated)
    if grid is not None and w.format == grid.format:
        w = operand(named(weight), own_scaling=StorageScaling(), masked=mask_saturated)
    dy = operand(named(grad))
    norm = OperandSpec() if norm_weight is None else operand(norm_weight, own_scaling="amax")
    return LayerRecipe(
        forward=GemmRecipe(input=x, weight=w),
        input_grad=GemmRecipe(grad_output=dy, weight=w),
        weight_grad=GemmRecipe(grad_output=dy, input=x),
        storage=grid,
        norm_weight=norm,
    )


def _storage(storage, weight, rounding, subnormals, random_bits) -> StorageSpec | None:
    if isinstance(storage, StorageSpec) or storage is None:
        return storage
    if storage == "master":
        return None
    if storage != "grid":
        raise RecipeError(f"storage {storage!r} is not one of master, grid; or pass a StorageSpec")
    if weight is None or get_format(weight).name == "FP32":
        raise RecipeError("storage='grid' needs a weight format other than FP32: the grid is that format's")
    fmt = get_format(weight)
    return StorageSpec(fmt.name, rounding, subnormals=subnormals, random_bits=random_bits)
