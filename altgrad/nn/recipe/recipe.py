"""The recipe of a whole model: a default and overrides, as a value, as plain data and as YAML; `uniform` is the short form."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from altgrad.errors import RecipeError
from altgrad.formats.scalar import FloatFormat
from altgrad.nn.recipe.layer_config import check_keys, layer_from_dict, layer_to_dict, plain_fields
from altgrad.nn.recipe.layer_recipe import layer_recipe
from altgrad.nn.recipe.spec import LayerRecipe


@dataclass(frozen=True)
class Override:
    """Another recipe for the layers that match every condition given; `recipe=None` leaves them unquantized.

    Args:
        name: pattern of the qualified module name: shell wildcards ("*.mlp.*"), or "re:" and a regular expression.
        type: class name of the layer, such as "Conv2d".
        position: "after_norm": the layer's input is the very output of a normalisation layer.
    """

    recipe: LayerRecipe | None
    name: str | None = None
    type: str | None = None
    position: str | None = None

    def __post_init__(self) -> None:
        if self.name is None and self.type is None and self.position is None:
            raise RecipeError("an override without name, type or position matches everything; set the default instead")
        if self.position not in (None, "after_norm"):
            raise RecipeError(f"position {self.position!r} is not known; use 'after_norm'")

    def matches(self, name: str, type_name: str, positions: frozenset[str]) -> bool:
        """Whether a layer of that name and class, at those positions, is meant."""
        return (
            (self.name is None or name_matches(self.name, name))
            and (self.type is None or self.type == type_name)
            and (self.position is None or self.position in positions)
        )

    @property
    def condition(self) -> str:
        """The conditions in words."""
        given = (("name", self.name), ("type", self.type), ("position", self.position))
        return " and ".join(f"{key}={value!r}" for key, value in given if value is not None)


def name_matches(pattern: str, name: str) -> bool:
    """Whether a qualified name matches a shell pattern, an exact name, or "re:" and a regular expression."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise RecipeError(f"name pattern {pattern!r} is no regular expression: {error}") from None
    return fnmatchcase(name, pattern)


@dataclass(frozen=True)
class Recipe:
    """The recipe of every layer of a model: a default (None: unquantized) and overrides, at most one for each layer."""

    default: LayerRecipe | None
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", tuple(self.overrides))
        seen: dict[str, LayerRecipe | None] = {}
        for override in self.overrides:
            if override.condition in seen and seen[override.condition] != override.recipe:
                raise RecipeError(f"two overrides with different recipes for {override.condition}; keep one of them")
            seen[override.condition] = override.recipe

    def for_layer(self, name: str, type_name: str, positions: frozenset[str] = frozenset()) -> LayerRecipe | None:
        """The layer's recipe.

        Raises:
            RecipeError: two overrides with different recipes claim the layer.
        """
        found = [o for o in self.overrides if o.matches(name, type_name, positions)]
        for other in found[1:]:
            if other.recipe != found[0].recipe:
                raise RecipeError(
                    f"two recipes claim layer {name!r} ({type_name}): the overrides {found[0].condition} and "
                    f"{other.condition}; narrow one of them"
                )
        return found[0].recipe if found else self.default

    @property
    def needs_positions(self) -> bool:
        """Whether an override asks for a layer's position in the model."""
        return any(o.position is not None for o in self.overrides)

    def layer_recipes(self) -> tuple[LayerRecipe, ...]:
        """The default and the overrides' recipes, without None."""
        return tuple(r for r in (self.default, *(o.recipe for o in self.overrides)) if r is not None)

    def to_dict(self) -> dict:
        """Plain data (strings, numbers, lists, mappings) that `from_dict` reads back to an equal recipe."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, data: dict | str) -> Recipe:
        """A recipe from `to_dict`'s form, or from the short form {"uniform": "E4M3", "grad": "E5M2", ...}."""
        return _from_dict(data)

    def to_yaml(self, path=None) -> str:
        """The recipe as YAML text, written to `path` if given."""
        return _to_yaml(self, path)

    @classmethod
    def from_yaml(cls, source) -> Recipe:
        """A recipe from a YAML file (`Path`, or a string that names one) or from YAML text."""
        return _from_yaml(source)

    def __str__(self) -> str:
        lines = [f"default: {self.default or 'FP32'}"]
        return "\n".join(lines + [f"{o.condition}: {o.recipe or 'FP32'}" for o in self.overrides])


def uniform(format: FloatFormat | str | None, *, overrides: tuple[Override, ...] = (), **options) -> Recipe:
    """The recipe `layer_recipe(format, **options)` for every layer, with optional overrides.

    By default x, w and dy are rounded to nearest-even under the current amax per tensor and saturate; weights stay
    float32 (`master` storage); biases and norm weights stay float32.

    >>> print(uniform("E4M3", grad="E5M2"))
    default: x:E4M3 w:E4M3 dy:E5M2
    """
    return Recipe(layer_recipe(format, **options), tuple(overrides))


def _to_dict(recipe: Recipe) -> dict:
    """{"default": ..., "overrides": [...]}; overrides only where there are any."""
    data: dict = {"default": layer_to_dict(recipe.default)}
    if recipe.overrides:
        data["overrides"] = [
            {**plain_fields(override, skip=("recipe",)), "recipe": layer_to_dict(override.recipe)}
            for override in recipe.overrides
        ]
    return data


def _from_dict(data) -> Recipe:
    """A recipe from `Recipe.to_dict`'s form, from a format name, or from one layer's short form for all layers."""
    if isinstance(data, str) or data is None or (isinstance(data, dict) and "default" not in data):
        short = dict(data) if isinstance(data, dict) else data
        overrides = short.pop("overrides", []) if isinstance(short, dict) else []
        return Recipe(layer_from_dict(short, "recipe"), _overrides(overrides))
    if not isinstance(data, dict):
        raise RecipeError(f"recipe is {data!r}; write a format name or a mapping with default and overrides")
    check_keys(data, ["default", "overrides"], "recipe")
    return Recipe(layer_from_dict(data["default"], "default"), _overrides(data.get("overrides") or []))


def _overrides(entries) -> tuple[Override, ...]:
    made = []
    for index, entry in enumerate(entries):
        where = f"overrides[{index}]"
        check_keys(entry, [f.name for f in fields(Override)], where)
        if "recipe" not in entry:
            raise RecipeError(f"{where} lacks 'recipe'; write one, or null to leave the layers unquantized")
        made.append(Override(**{**entry, "recipe": layer_from_dict(entry["recipe"], f"{where}.recipe")}))
    return tuple(made)


def _to_yaml(recipe: Recipe, path=None) -> str:
    """YAML text of the recipe, written to `path` if given."""
    text = yaml.safe_dump(_to_dict(recipe), sort_keys=False)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _from_yaml(source) -> Recipe:
    """A recipe from a YAML file or text (a string with a line break or a colon is text)."""
    is_text = isinstance(source, str) and ("\n" in source or ":" in source)
    text = source if is_text else Path(source).read_text(encoding="utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe is no YAML: {error}") from None
    return _from_dict(data)
