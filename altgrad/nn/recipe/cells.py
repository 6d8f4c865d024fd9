"""The cells of a recipe: every place (layer x product x role) that it quantizes, by name, and a layer changed in one of them.

    blocks.0.mlp.up.forward.weight     an operand of one of the layer's three products
    head.storage                       the grid of a stored weight
    norm.norm.weight                   the weight of a normalisation layer

`Recipe.cells`, `.with_cell`, `.only` and `.rescue` are made of these pure functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from altgrad.errors import RecipeError
from altgrad.nn.recipe.layer_recipe import LayerRecipe
from altgrad.nn.recipe.scaling_choice import StorageScaling, default_scaling
from altgrad.nn.recipe.spec import GEMMS, GemmRecipe, OperandSpec, StorageSpec
from altgrad.quantization import get_format

STORAGE, NORM = "storage", "norm"
_ROLES: dict[str, tuple[str, ...]] = {**GEMMS, STORAGE: (STORAGE,), NORM: ("weight",)}


@dataclass(frozen=True, order=True)
class Cell:
    """One place where a model can be quantized; `str` and `parse` are inverses.

    Args:
        layer: qualified module name.
        gemm: forward, input_grad or weight_grad; "storage" for the stored weight; "norm" for a normalisation's weight.
        role: input, weight or grad_output, of that GEMM's two; "storage" for the stored weight.

    Raises:
        RecipeError: the GEMM has no such operand.
    """

    layer: str
    gemm: str
    role: str

    def __post_init__(self) -> None:
        roles = _ROLES.get(self.gemm)
        if roles is None:
            raise RecipeError(f"cell of layer {self.layer!r}: {self.gemm!r} is none of {', '.join(_ROLES)}")
        if self.role not in roles:
            raise RecipeError(
                f"cell of layer {self.layer!r}: {self.gemm} has no {self.role!r}, only {' and '.join(roles)}"
            )

    def __str__(self) -> str:
        parts = (self.layer, self.role) if self.gemm == STORAGE else (self.layer, self.gemm, self.role)
        return ".".join(part for part in parts if part)

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The cell that `str(cell)` names.

        Raises:
            RecipeError: the text names no cell.
        """
        parts = text.strip().split(".")
        if parts[-1] == STORAGE:
            return cls(".".join(parts[:-1]), STORAGE, STORAGE)
        if len(parts) < 2:
            raise RecipeError(
                f"{text!r} is no cell; write layer.gemm.role such as head.forward.weight, or head.storage"
            )
        return cls(".".join(parts[:-2]), parts[-2], parts[-1])


@dataclass(frozen=True)
class Place:
    """A layer of a model that a recipe may quantize: what the recipe's overrides ask about it, and its kind."""

    name: str
    type_name: str
    kind: str
    positions: frozenset[str] | None


class Finder:
    """Knows the places of a model; `altgrad.nn.model` says how they are found, as recipes know no layers."""

    find: Callable[[nn.Module], list[Place]]


def cells_of(layers: Iterable[tuple[Place, LayerRecipe | None]]) -> dict[Cell, OperandSpec | StorageSpec]:
    """Every quantized place with its spec, in the model's order."""
    found: dict[Cell, OperandSpec | StorageSpec] = {}
    for place, layer in layers:
        if layer is None:
            continue
        if place.kind == "norm":
            parts = [(NORM, "weight", layer.norm_weight)]
        else:
            parts = [
                entry for entry in layer.entries() if place.kind != "embedding" or entry[:2] == ("forward", "weight")
            ]
        found.update({Cell(place.name, gemm, role): spec for gemm, role, spec in parts if spec.format is not None})
        if layer.storage is not None and place.kind != "norm":
            found[Cell(place.name, STORAGE, STORAGE)] = layer.storage
    return found


def own_cells(name: str, layer: LayerRecipe | None) -> list[Cell]:
    """Every place of one layer's recipe that has a format, whatever kind of layer it is."""
    if layer is None:
        return []
    parts = [*layer.entries(), (NORM, "weight", layer.norm_weight)]
    found = [Cell(name, gemm, role) for gemm, role, spec in parts if spec.format is not None]
    return [*found, Cell(name, STORAGE, STORAGE)] if layer.storage is not None else found


def changed_layer(layer: LayerRecipe | None, changes: Mapping[Cell, object]) -> LayerRecipe | None:
    """A layer's recipe with other specs in some of its cells; None where it then quantizes nothing.

    Args:
        changes: cell to an OperandSpec (or a format's name; None: full precision); of storage a StorageSpec, or None for
            float32 master weights. An operand that took the grid's scale then quantizes with its format's own.

    Raises:
        RecipeError: the result contradicts itself.
    """
    result = layer or FULL_PRECISION
    for cell, spec in sorted(changes.items(), key=lambda entry: entry[0].gemm != STORAGE):
        if cell.gemm == STORAGE:  # first: it decides how weight operands are scaled
            result = _with_storage(result, spec)
            continue
        operand = spec if isinstance(spec, OperandSpec) else OperandSpec(spec)  # type: ignore[arg-type]
        if cell.gemm == NORM:
            result = replace(result, norm_weight=operand)
        else:
            made = {cell.gemm: _with_operand(getattr(result, cell.gemm), cell.role, operand)}
            again = _AGAIN.get(cell.role) if cell.gemm == "forward" and operand.format is None else None
            if again is not None:  # it then starts from the tensor itself
                one = getattr(result, again)
                made[again] = replace(one, **{cell.role: replace(getattr(one, cell.role), requantize=False)})
            if (cell.gemm, cell.role) in (
                ("input_grad", "weight"),
                ("weight_grad", "input"),
            ) and operand.format is None:
                made["forward"] = _unmasked(result.forward)  # the gradient is then one of unmixed elements
            result = replace(result, **made)
    return result if result.quantizes_products or result.norm_weight.format is not None else None


def _with_operand(one: GemmRecipe, role: str, operand: OperandSpec) -> GemmRecipe:
    """A GEMM with another operand; where that is in full precision nothing is mixed, and sums are plain."""
    if operand.format is not None:
        return replace(one, **{role: operand})
    others = {name: replace(spec, hadamard=None) for name, spec in one.named() if name != role}
    return replace(one, **others, **{role: operand}, accumulator=None)


def _unmasked(forward: GemmRecipe) -> GemmRecipe:
    """A forward without masks of mixed elements."""
    specs = {role: replace(spec, mask_saturated=False) for role, spec in forward.named() if spec.hadamard is not None}
    return replace(forward, **specs)


_AGAIN = {"weight": "input_grad", "input": "weight_grad"}  # where the forward's operands can be quantized once more


def _with_storage(layer: LayerRecipe, storage: object) -> LayerRecipe:
    if storage is not None and not isinstance(storage, StorageSpec):
        raise RecipeError(f"storage is {storage!r}; give a StorageSpec, or None for float32 master weights")

    def scaled(one: GemmRecipe) -> GemmRecipe:
        spec = one.weight
        if spec is None or spec.format is None:
            return one
        if storage is not None and spec.format == storage.format:
            return replace(one, weight=replace(spec, scaling=StorageScaling()))
        if isinstance(spec.scaling, StorageScaling):
            return replace(one, weight=replace(spec, scaling=default_scaling(get_format(spec.format))))
        return one

    return replace(layer, forward=scaled(layer.forward), input_grad=scaled(layer.input_grad), storage=storage)


_NOTHING = OperandSpec()
FULL_PRECISION = LayerRecipe(
    GemmRecipe(input=_NOTHING, weight=_NOTHING),
    GemmRecipe(grad_output=_NOTHING, weight=_NOTHING),
    GemmRecipe(grad_output=_NOTHING, input=_NOTHING),
)
