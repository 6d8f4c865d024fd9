"""The recipe of a whole model: a default and overrides, as a value, as plain data and as YAML; `uniform` is the short form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase, translate
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from altgrad.errors import FormatError, RecipeError
from altgrad.formats.scalar import FloatFormat
from altgrad.nn.recipe.cells import Cell, Finder, Place, cells_of, changed_layer, own_cells
from altgrad.nn.recipe.ingredients import HIGH_LAYERS, INGREDIENTS, changed, check_known, names_in
from altgrad.nn.recipe.layer_config import check_keys, layer_from_dict, layer_to_dict, plain_fields
from altgrad.nn.recipe.layer_recipe import LayerRecipe, layer_recipe
from altgrad.nn.recipe.spec import OperandSpec, StorageSpec
from altgrad.nn.recipe.text import layer_text, parse_layer, split_recipe
from altgrad.records.files import read_file
from altgrad.records.untrusted import MOST_YAML_BYTES, Malformed, parse_pattern, parse_yaml
from altgrad.report.notebook import notebook_table
from altgrad.report.text import shortened

ATTENTION_NAME = "attention_products"
"""The last part of the name of a module's attention as a place."""


@dataclass(frozen=True)
class Override:
    """Another recipe for the layers that match every condition given; `recipe=None` leaves them unquantized.

    Args:
        name: pattern of the qualified module name: shell wildcards ("*.mlp.*"), or "re:" and a regular expression.
        type: class name of the layer, such as "Conv2d"; "attention": the products of attention (scores and values), which
            are quantized only where an override by this type, or by a name that ends in "attention_products", says so.
        position: "after_norm": the layer's input is the very output of a normalisation layer.
    """

    recipe: LayerRecipe | None
    name: str | None = None
    type: str | None = None
    position: str | None = None

    def __post_init__(self) -> None:
        if self.name is None and self.type is None and self.position is None:
            raise RecipeError("an override without name, type or position matches everything; set the default instead")
        for key in ("name", "type"):
            if not isinstance(getattr(self, key), str | None):
                raise RecipeError(f"an override's {key} is {getattr(self, key)!r}; write a text such as 'head'")
        if self.name is not None and self.name.startswith("re:"):
            _regex(self.name)
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
    def names_one(self) -> bool:
        """Whether its name is one layer's own and no pattern."""
        return self.name is not None and self.name == _exactly(self.name)

    @property
    def leaves_high(self) -> bool:
        """Whether it leaves layers in full precision that it finds by name or position."""
        return self.recipe is None and self.type is None

    @property
    def condition(self) -> str:
        """The conditions in words."""
        given = (("name", self.name), ("type", self.type), ("position", self.position))
        return " and ".join(f"{key}={value!r}" for key, value in given if value is not None)


def name_matches(pattern: str, name: str) -> bool:
    """Whether a qualified name matches a shell pattern, an exact name, or "re:" and a regular expression."""
    if pattern.startswith("re:"):
        return _regex(pattern).fullmatch(name) is not None
    return fnmatchcase(name, pattern)


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return parse_pattern(pattern[3:])
    except Malformed as error:
        raise RecipeError(f"name pattern {shortened(repr(pattern))}: {error}") from None


def _exactly(name: str) -> str:
    """A pattern that matches this name and no other."""
    plain = not any(c in name for c in "*?[") and not name.startswith("re:")
    return name if plain else f"re:{re.escape(name)}"


def _without(override: Override, name: str) -> Override:
    """The override, no longer for the layer of that name."""
    if override.name is not None and not name_matches(override.name, name):
        return override
    pattern = override.name or "*"
    regex = pattern[3:] if pattern.startswith("re:") else translate(pattern)
    return replace(override, name=f"re:(?!{re.escape(name)}$)(?:{regex})")


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
        attends = name.endswith(ATTENTION_NAME)
        if attends:
            found = [o for o in found if o.type == "attention" or (o.name or "").endswith(ATTENTION_NAME)]
        for other in found[1:]:
            if other.recipe != found[0].recipe:
                raise RecipeError(
                    f"two recipes claim layer {name!r} ({type_name}): the overrides {found[0].condition} and "
                    f"{other.condition}; narrow one of them"
                )
        return found[0].recipe if found else None if attends else self.default

    @property
    def needs_positions(self) -> bool:
        """Whether an override asks for a layer's position in the model."""
        return any(o.position is not None for o in self.overrides)

    def layer_recipes(self) -> tuple[LayerRecipe, ...]:
        """The default and the overrides' recipes, without None."""
        return tuple(r for r in (self.default, *(o.recipe for o in self.overrides)) if r is not None)

    def cells(self, model: nn.Module) -> dict[Cell, OperandSpec | StorageSpec]:
        """Every place of the model that this recipe quantizes, with its spec, in the model's order.

        Raises:
            RecipeError: the recipe asks for positions, and `quantize_model` has not watched the model run.
        """
        return cells_of([(place, self._of_place(place)) for place in Finder.find(model)])

    def with_cell(self, layer: str, gemm: str, role: str, spec: object, model: nn.Module | None = None) -> Recipe:
        """This recipe with another spec in one cell.

        Args:
            spec: an OperandSpec, a format's name, or None for full precision; for storage a StorageSpec or None.
            model: needed where overrides go by type or position.

        Raises:
            RecipeError: there is no such cell, or the layer's recipe would contradict itself.
        """
        return self._changed({Cell(layer, gemm, role): spec}, model)

    def only(self, cells: Iterable[Cell | str], model: nn.Module | None = None) -> Recipe:
        """These cells as they are, everything else in full precision; `model` as for `with_cell`.

        Raises:
            RecipeError: a cell that this recipe does not quantize.
        """
        kept = self._known(cells, model)
        made = {}
        for name in dict.fromkeys(cell.layer for cell in kept):
            layer = self._of_name(name, model)
            made[name] = changed_layer(
                layer, dict.fromkeys(cell for cell in own_cells(name, layer) if cell not in kept)
            )
        return Recipe(None, tuple(Override(one, name=_exactly(name)) for name, one in made.items()))

    def rescue(self, cells: Iterable[Cell | str], model: nn.Module | None = None) -> Recipe:
        """These cells in full precision (stored weights as float32), everything else as it is; `model` as for `with_cell`.

        Raises:
            RecipeError: a cell that this recipe does not quantize.
        """
        return self._changed(dict.fromkeys(self._known(cells, model)), model)

    def _changed(self, changes: Mapping[Cell, object], model: nn.Module | None) -> Recipe:
        """An override of its own for each layer concerned; overrides that claimed it so far no longer do."""
        by_layer: dict[str, dict[Cell, object]] = {}
        for cell, spec in changes.items():
            by_layer.setdefault(cell.layer, {})[cell] = spec
        overrides = list(self.overrides)
        for name, own in by_layer.items():
            was = self._of_name(name, model)
            now = changed_layer(was, own)
            if now == was:
                continue
            exact = Override(now, name=_exactly(name))
            kept = [_without(o, name) for o in overrides if o.condition != exact.condition]
            overrides = [*kept, *([] if now == self.default else [exact])]
        return Recipe(self.default, tuple(overrides))

    def _known(self, cells: Iterable[Cell | str], model: nn.Module | None) -> dict[Cell, None]:
        """The cells in the order given, each once; all of them quantized by this recipe."""
        wanted = dict.fromkeys(Cell.parse(cell) if isinstance(cell, str) else cell for cell in cells)
        for name in {cell.layer for cell in wanted}:
            there = own_cells(name, self._of_name(name, model))
            missing = [cell for cell in wanted if cell.layer == name and cell not in there]
            if missing:
                shown = ", ".join(map(str, there)) or "none: it is in full precision"
                raise RecipeError(f"{missing[0]} is not quantized by this recipe; the layer's cells are {shown}")
        return wanted

    def _of_name(self, name: str, model: nn.Module | None) -> LayerRecipe | None:
        """What a layer has by this recipe."""
        if model is not None:
            places = {place.name: place for place in Finder.find(model)}
            if name not in places:
                close = ", ".join(get_close_matches(name, list(places), n=3, cutoff=0.3)) or "none like it"
                raise RecipeError(f"the model has no layer {name!r} that a recipe can quantize; it has {close}")
            return self._of_place(places[name])
        if any(o.type is not None or o.position is not None for o in self.overrides):
            raise RecipeError(f"what layer {name!r} has depends on its type or position; pass the model, too")
        return self.for_layer(name, "")

    def _of_place(self, place: Place) -> LayerRecipe | None:
        if self.needs_positions and place.positions is None:
            raise RecipeError("the recipe asks for positions; quantize_model(model, recipe, example=...) first")
        return self.for_layer(place.name, place.type_name, place.positions or frozenset())

    @property
    def ingredients(self) -> list[str]:
        """What the recipe is made of that `without` takes away, such as stochastic_rounding, hadamard, accumulator."""
        layers = self.layer_recipes()
        found = [name for name, one in INGREDIENTS.items() if any(one.removed_from(layer) != layer for layer in layers)]
        return found + [HIGH_LAYERS] * any(o.leaves_high for o in self.overrides)

    def without(self, *names: str) -> Recipe:
        """This recipe less some of its ingredients, in every layer; everything else as it is.

        Raises:
            RecipeError: an ingredient that the recipe does not have, or that cannot go alone.
        """
        made = self
        for name in names:
            check_known(name, made.ingredients)
            if name == HIGH_LAYERS:
                made = replace(made, overrides=tuple(o for o in made.overrides if not o.leaves_high))
                continue
            try:
                made = made._of_layers(INGREDIENTS[name].removed_from)
            except RecipeError as error:
                raise RecipeError(f"{name!r} cannot be removed alone: {error}") from None
        return made

    def with_(self, *, high: str | Iterable[str] = (), **changes: Any) -> Recipe:
        """This recipe with something added, in every quantized layer.

        Args:
            high: a name pattern, or several, of layers left in full precision.
            changes: `accumulator`: one for the three GEMMs, or three (None: float32). `stochastic_rounding`: a role
                (input, weight, grad_output) or several. `hadamard`: a transform for the operands of weight_grad.
                `plain_evaluation`, `save_codes`: True or False.

        Raises:
            RecipeError: no such change, or what results contradicts itself.
        """
        made = self._of_layers(lambda layer: changed(layer, changes))
        added = [Override(None, name=pattern) for pattern in names_in(high, "high")]
        return replace(made, overrides=(*made.overrides, *(o for o in added if o not in made.overrides)))

    def _of_layers(self, change: Callable[[LayerRecipe], LayerRecipe]) -> Recipe:
        """Every layer's recipe changed; those in full precision stay."""
        default = None if self.default is None else change(self.default)
        overrides = tuple(o if o.recipe is None else replace(o, recipe=change(o.recipe)) for o in self.overrides)
        return Recipe(default, overrides)

    def operands(self) -> list[OperandSpec]:
        """Every quantized operand of every layer recipe, norm weights included."""
        found = (spec for one in self.layer_recipes() for _, _, spec in one.entries())
        norms = (one.norm_weight for one in self.layer_recipes())
        return [spec for spec in (*found, *norms) if spec.format is not None]

    @property
    def quantizes(self) -> bool:
        """Whether anything has a format at all."""
        return bool(self.operands()) or any(one.storage is not None for one in self.layer_recipes())

    @property
    def text(self) -> str:
        """The recipe in one line, such as `x:E4M3 w:E4M3 dy:E5M2; name='head': FP32`; `Recipe.from_dict` reads it."""
        overrides = (f"; {o.condition}: {layer_text(o.recipe)}" for o in self.overrides)
        return layer_text(self.default) + "".join(overrides)

    @property
    def label(self) -> str:
        """What reports call it: its name where people know it by one, a format's name where that is all, else its text."""
        one = self.default
        if (known := Names.name_of(self)) is not None:
            return known
        if self.overrides or one is None:
            return self.text if self.quantizes else "FP32"
        names = {spec.format for _, _, spec in one.entries()} | ({one.storage.format} if one.storage else set())
        plain = len(names) == 1 and one.norm_weight.format is None
        return (names.pop() or "FP32") if plain else self.text

    def to_dict(self) -> dict:
        """Plain data (strings, numbers, lists, mappings) that `from_dict` reads back to an equal recipe."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, data: dict | str) -> Recipe:
        """A recipe from `to_dict`'s form, from the short form {"uniform": "E4M3", "grad": "E5M2", ...}, or from text.

        Raises:
            RecipeError, FormatError: the data is no recipe.
        """
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

    def __repr__(self) -> str:
        return f"Recipe({Names.name_of(self) or self.text})"

    def _repr_html_(self) -> str:
        rows = [("default", self.default or "FP32"), *((o.condition, o.recipe or "FP32") for o in self.overrides)]
        return notebook_table("Recipe", rows, ("layers", "formats"))


_KEPT = {
    "adapters": {"name": r"re:(?:.*\.)?lora_\w+(?:\..*)?"},
    "routers": {"name": r"re:(?:.*\.)?(?:router|gate)(?:\.(?:layer|classifier|wg))?"},
    "heads": {"name": r"re:(?:.*\.)?(?:lm_head|head|embed_out|proj_out|score|classifier)"},
    "embeddings": {"name": r"re:(?:.*\.)?(?:\w*emb\w*|wte|wpe)"},
}


def keep(*presets: str) -> tuple[Override, ...]:
    """Overrides that leave kinds of layers unquantized, by the names that models give them.

    Args:
        presets: "routers" (of a mixture of experts: `router`, `gate`), "heads" (`lm_head`, `head`, `classifier`, ...),
            "embeddings" (`embed_tokens`, `wte`, ...), "adapters" (peft's `lora_A`, `lora_B`, ...).

    Raises:
        RecipeError: another word.
    """
    for preset in presets:
        if preset not in _KEPT:
            raise RecipeError(f"keep={preset!r} is none of {', '.join(_KEPT)}; for other layers write an Override")
    return tuple(Override(None, **_KEPT[preset]) for preset in presets)


def uniform(
    format: FloatFormat | str | None,
    *,
    overrides: tuple[Override, ...] = (),
    keep: str | Iterable[str] = (),
    **options,
) -> Recipe:
    """The recipe `layer_recipe(format, **options)` for every layer, with optional overrides; `keep`: names of `keep(...)`.

    By default x, w and dy are rounded to nearest-even under the current amax per tensor and saturate; weights stay
    float32 (`master` storage); biases and norm weights stay float32.

    >>> print(uniform("E4M3", grad="E5M2"))
    default: x:E4M3 w:E4M3 dy:E5M2
    """
    return Recipe(layer_recipe(format, **options), (*overrides, *_kept(keep)))


def _kept(presets: str | Iterable[str]) -> tuple[Override, ...]:
    return keep(*([presets] if isinstance(presets, str) else presets))


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
    """A recipe from `Recipe.to_dict`'s form, from text, or from one layer's short form for all layers."""
    if isinstance(data, str):
        default, parts = split_recipe(data)
        overrides = tuple(
            Override(_layer_or_none(text, f"recipe {data!r}"), **given)  # type: ignore[arg-type]
            for given, text in parts
        )
        base = _by_name(default)
        if base is not None:
            return replace(base, overrides=(*base.overrides, *overrides))
        try:
            return Recipe(_layer_or_none(default), overrides)
        except FormatError as error:
            near = get_close_matches(default.strip().lower(), Names.texts, n=3, cutoff=0.7)
            if not near:
                raise
            raise RecipeError(f"{error}; recipes of a like name: {', '.join(near)}") from None
    if data is not None and not isinstance(data, dict):
        raise RecipeError(f"recipe is {data!r}; write a format name or a mapping with default and overrides")
    try:
        if data is None or "default" not in data:
            short = dict(data) if data is not None else None
            overrides, kept = (short.pop("overrides", []), short.pop("keep", ())) if short is not None else ([], ())
            return Recipe(layer_from_dict(short, "recipe"), (*_overrides(overrides), *_kept(kept)))
        check_keys(data, ["default", "overrides"], "recipe")
        return Recipe(layer_from_dict(data["default"], "default"), _overrides(data.get("overrides") or []))
    except (TypeError, AttributeError, OverflowError) as error:  # a value of a kind that no field takes
        raise RecipeError(f"recipe holds a value of the wrong kind: {error}") from None


class Names:
    """Recipes that have a name, by their texts: `altgrad.nn.recipe.named` fills them in."""

    texts: Mapping[str, str] = {}
    name_of: Callable[[Recipe], str | None] = staticmethod(lambda recipe: None)


def _by_name(text: str) -> Recipe | None:
    """The recipe that `te_mxfp8`, or `nvfp4_te without hadamard, tiles` names; None where the text is a recipe itself."""
    name, _, less = text.partition(" without ")
    known = Names.texts.get(name.strip().lower())
    if known is None:
        return None
    return _from_dict(known).without(*(word.strip() for word in less.split(",") if word.strip()))


def _layer_or_none(text: str, where: str = "recipe") -> LayerRecipe | None:
    layer = parse_layer(text, where)
    return layer if layer.quantizes_products or layer.norm_weight.format is not None else None


def _overrides(entries) -> tuple[Override, ...]:
    made = []
    if not isinstance(entries, list | tuple):
        raise RecipeError(f"overrides is {entries!r}, not a list; write - {{name: head, recipe: null}}")
    for index, entry in enumerate(entries):
        where = f"overrides[{index}]"
        if not isinstance(entry, dict):
            raise RecipeError(f"{where} is {entry!r}; write a mapping with name, type or position, and recipe")
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
    try:
        text = source.encode("utf-8", "surrogatepass") if is_text else read_file(Path(source), MOST_YAML_BYTES)
        return _from_dict(parse_yaml(text))
    except Malformed as error:
        raise RecipeError(f"recipe is no YAML: {error}") from None
