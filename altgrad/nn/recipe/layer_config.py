"""A layer's recipe as plain data, and back to an equal one; unknown keys are refused with the closest name."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from enum import Enum

from altgrad.errors import RecipeError
from altgrad.nn.recipe.layer_recipe import LayerRecipe, layer_recipe
from altgrad.nn.recipe.scaling_choice import default_scaling, scaling_to_config
from altgrad.nn.recipe.spec import GEMMS, GemmRecipe, OperandSpec, StorageSpec, fields_of
from altgrad.nn.recipe.text import parse_layer
from altgrad.quantization import get_format

_SWITCHES = ("plain_evaluation", "save_codes")


def check_keys(data: dict, known, where: str) -> None:
    for key in data:
        if key not in known:
            close = get_close_matches(str(key), list(known), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"{where} has no key {key!r}{hint} Known: {', '.join(known)}")


def plain_fields(spec, skip=()) -> dict:
    """The fields of a frozen dataclass that differ from their defaults, enums as their values."""
    changed = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in skip}
    changed = {f.name: changed[f.name] for f in fields(spec) if f.name in changed and changed[f.name] != f.default}
    return {key: value.value if isinstance(value, Enum) else value for key, value in changed.items()}


def operand_to_dict(spec: OperandSpec) -> str | dict:
    """A format name, or a mapping where options differ from their defaults."""
    if spec.format is None:
        return "FP32"
    data = plain_fields(spec, skip=("scaling", "hadamard", "average"))
    for name in ("hadamard", "average"):
        if (value := getattr(spec, name)) is not None:
            data[name] = fields_of(value)
    assert spec.scaling is not None
    if spec.scaling != default_scaling(get_format(spec.format)):
        data["scaling"] = scaling_to_config(spec.scaling)
    return spec.format if set(data) == {"format"} else data


def operand_from_dict(data, where: str) -> OperandSpec:
    """An operand from a format name, a mapping or None."""
    if data is None or isinstance(data, str):
        return OperandSpec(data)
    if not isinstance(data, dict):
        raise RecipeError(f"{where} is {data!r}; write a format name or a mapping with format, rounding, ...")
    check_keys(data, [f.name for f in fields(OperandSpec)], where)
    return OperandSpec(**data)


def layer_to_dict(recipe: LayerRecipe | None) -> dict | None:
    """The layer's recipe as a mapping; None for unquantized."""
    if recipe is None:
        return None
    data: dict = {}
    for gemm, role, spec in recipe.entries():
        data.setdefault(gemm, {})[role] = operand_to_dict(spec)
    for gemm, one in recipe.gemms.items():
        if one.accumulator is not None:
            data[gemm]["accumulator"] = str(one.accumulator)
    data |= {name: True for name in _SWITCHES if getattr(recipe, name)}
    if recipe.storage is not None:
        data["storage"] = plain_fields(recipe.storage)
    if recipe.norm_weight.format is not None:
        data["norm_weight"] = operand_to_dict(recipe.norm_weight)
    return data


def layer_from_dict(data, where: str = "layer recipe") -> LayerRecipe | None:
    """A layer's recipe from a format name, the short form (`uniform:`), the full form, or None."""
    if data is None:
        return None
    if isinstance(data, str):
        return parse_layer(data, where)
    if not isinstance(data, dict):
        raise RecipeError(f"{where} is {data!r}; write a format name or a mapping")
    data = dict(data)
    if "uniform" in data:
        known = list(layer_recipe.__kwdefaults__ or ())
        check_keys({k: v for k, v in data.items() if k != "uniform"}, known, where)
        if isinstance(data.get("storage"), dict):
            data["storage"] = _storage_from_dict(data["storage"], where)
        return layer_recipe(data.pop("uniform"), **data)
    check_keys(data, ["uniform", *(f.name for f in fields(LayerRecipe))], where)
    gemms = {}
    for gemm in GEMMS:
        if gemm not in data:
            raise RecipeError(f"{where} lacks {gemm!r}; give forward, input_grad and weight_grad, or uniform: FORMAT")
        if not isinstance(data[gemm], dict):
            raise RecipeError(f"{where}.{gemm} is {data[gemm]!r}; write a mapping of its two operands")
        check_keys(data[gemm], [f.name for f in fields(GemmRecipe)], f"{where}.{gemm}")
        sums = data[gemm].get("accumulator")
        operands = {r: operand_from_dict(v, f"{where}.{gemm}.{r}") for r, v in data[gemm].items() if r != "accumulator"}
        gemms[gemm] = GemmRecipe(**operands, accumulator=sums)
    storage = data.get("storage")
    if isinstance(storage, dict):
        storage = _storage_from_dict(storage, where)
    elif storage not in (None, "master"):
        raise RecipeError(f"{where}.storage is {storage!r}; write master or a mapping with format, rounding, ...")
    else:
        storage = None
    norm = operand_from_dict(data.get("norm_weight"), f"{where}.norm_weight")
    switches = {name: data[name] for name in _SWITCHES if name in data}
    return LayerRecipe(**gemms, storage=storage, norm_weight=norm, **switches)


def _storage_from_dict(data: dict, where: str) -> StorageSpec:
    check_keys(data, [f.name for f in fields(StorageSpec)], f"{where}.storage")
    return StorageSpec(**data)
