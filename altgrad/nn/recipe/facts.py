"""What records and reports say of a recipe: its label, how weights are stored and operands rounded, and a format's numbers."""

from __future__ import annotations

from typing import Any

from altgrad.formats.catalog import get_format
from altgrad.formats.scalar import FloatFormat
from altgrad.nn.recipe.recipe import Recipe


def label_of(recipe: Recipe | None) -> str:
    """What reports call the formats: the format's name in the uniform case, else the recipe's text; FP32 for none."""
    return "FP32" if recipe is None else recipe.label


def storage_of(recipe: Recipe | None) -> str:
    """ "grid" where every weight is stored on one, "master" where none is, else "mixed"."""
    return _agreed(["master" if one.storage is None else "grid" for one in _layers(recipe)], "master")


def rounding_of(recipe: Recipe | None) -> str:
    """The rounding mode of the operands, "mixed" where they differ; nearest_even where nothing is rounded."""
    return _agreed([spec.rounding.value for spec in recipe.operands()] if recipe else [], "nearest_even")


def recipe_facts(recipe: Recipe | None) -> dict[str, Any]:
    """The formats' label, storage and rounding and, of one format for all, its numbers, for reports (which do not import
    the numerics)."""
    facts: dict[str, Any] = {"name": label_of(recipe), "recipe": recipe.text if recipe else "FP32"}
    facts |= {"storage": storage_of(recipe), "rounding": rounding_of(recipe)}
    names = {spec.format for spec in recipe.operands()} if recipe else {"FP32"}
    if len(names) != 1:
        return facts
    fmt = get_format(names.pop())
    if isinstance(fmt, FloatFormat):
        facts |= {"exponent_bits": fmt.exponent_bits, "mantissa_bits": fmt.mantissa_bits, "max": fmt.max}
        facts["smallest"] = fmt.min_subnormal
        if fmt.bits <= 8:
            facts["values"] = [abs(v) for v in fmt.values().tolist() if v >= 0]
    return facts


def _layers(recipe: Recipe | None) -> list[Any]:
    return [one for one in recipe.layer_recipes() if one.quantizes_products] if recipe else []


def _agreed(values: list[str], otherwise: str) -> str:
    kinds = set(values)
    return otherwise if not kinds else kinds.pop() if len(kinds) == 1 else "mixed"
