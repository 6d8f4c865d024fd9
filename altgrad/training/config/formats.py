"""The one place where a config's format keys become a recipe: `formats`, and the short keys that are aliases for it.

`formats` takes a format's name, a recipe's text, its short form or the whole recipe. Each short key names a part of one
uniform recipe: `fp8_format`, `weight_storage`, `rounding`, `storage_rounding`, `scaling`, `overflow`, `gradient_format`
and `storage_refresh_interval`; `recipe` is `formats` under its old name. Nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from altgrad.errors import ConfigError

if TYPE_CHECKING:
    from altgrad.nn.recipe.recipe import Recipe

SHORT_DEFAULTS: Mapping[str, Any] = {
    "fp8_format": "FP32",
    "weight_storage": "master",
    "rounding": "nearest_even",
    "storage_rounding": None,
    "scaling": "amax",
    "overflow": "saturate_finite",
    "gradient_format": None,
    "storage_refresh_interval": 10,
}
"""The short keys, with what they mean where they are not given."""

WHOLE = ("formats", "recipe")
"""The keys that hold a whole recipe."""


_HASHED_OVERFLOW = {"saturate_finite": "saturate", "saturate": "saturate, inf too"}
# The default was called "saturate" when it made a finite number of an inf, too: runs without one keep their names.


def recipe_of(config: Any) -> Recipe | None:
    """The recipe that a config (an `ExperimentConfig`, or its mapping) asks for; None where nothing is quantized.

    Raises:
        RecipeError, FormatError: what the keys say contradicts itself.
    """
    from altgrad.nn.recipe.recipe import Recipe

    keys = config if isinstance(config, Mapping) else {key: getattr(config, key) for key in (*WHOLE, *SHORT_DEFAULTS)}
    whole = next((keys[key] for key in WHOLE if keys.get(key) is not None), None)
    recipe = _from_short_keys({**SHORT_DEFAULTS, **keys}) if whole is None else Recipe.from_dict(whole)
    return recipe if recipe.quantizes else None


def format_facts(config: Any) -> dict[str, str]:
    """What a result says of a config's formats: their label, how weights are stored, how operands are rounded."""
    from altgrad.nn.recipe.facts import label_of, rounding_of, storage_of

    recipe = recipe_of(config)
    return {"format": label_of(recipe), "storage": storage_of(recipe), "rounding": rounding_of(recipe)}


def short_keys(recipe: Recipe | None) -> dict[str, Any] | None:
    """The short keys that mean exactly this recipe; None where they cannot say it."""
    if recipe is None:
        return dict(SHORT_DEFAULTS)
    from altgrad.nn.recipe.scaling_choice import default_scaling, scaling_to_config
    from altgrad.quantization import get_format

    layer = recipe.default
    if layer is None or recipe.overrides:
        return None
    keys = dict(SHORT_DEFAULTS)
    specs = {role: spec for _, role, spec in layer.entries()}
    keys["fp8_format"] = specs["weight"].format or "FP32"
    if specs["grad_output"].format != specs["weight"].format:
        keys["gradient_format"] = specs["grad_output"].format or "FP32"
    rounded = next((spec for spec in specs.values() if spec.format is not None), None)
    if rounded is not None:
        keys |= {"rounding": rounded.rounding.value, "overflow": rounded.overflow.value}
    scaled = [specs[role] for role in ("input", "grad_output") if specs[role].format is not None]
    for spec in scaled:
        if (
            spec.format is not None
            and spec.scaling is not None
            and spec.scaling != default_scaling(get_format(spec.format))
        ):
            keys["scaling"] = scaling_to_config(spec.scaling)
            break
    if layer.storage is not None:
        keys["weight_storage"] = "grid"
        if layer.storage.rounding.value != keys["rounding"]:
            keys["storage_rounding"] = layer.storage.rounding.value
        if layer.storage.scale is None:
            keys["storage_refresh_interval"] = layer.storage.refresh_every
    try:
        said = _from_short_keys(keys)
    except ValueError:  # the guess contradicts itself
        return None
    return keys if said == recipe else None


def identity_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """A config's mapping with its formats spelled in the one way that is hashed.

    Short keys and `recipe` are left as they are, so that runs keep the names that they were made under; what `formats`
    says becomes the short keys where they can say it, else the whole recipe under `recipe`.
    """
    plain = {key: value for key, value in keys.items() if key != "formats"}
    if keys.get("formats") is not None:
        recipe = recipe_of(keys)
        short = short_keys(recipe)
        if short is not None:
            plain |= {**short, "recipe": None}
        else:
            assert recipe is not None
            plain |= {**SHORT_DEFAULTS, "recipe": recipe.to_dict()}
    if "overflow" in plain:
        plain["overflow"] = _HASHED_OVERFLOW.get(plain["overflow"], plain["overflow"])
    return plain


def with_formats(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` made ready for `changes` (top-level keys) that come after it and speak of formats, too.

    A later whole recipe replaces all that the base says. A later short key changes that part of the base's recipe.

    Raises:
        ConfigError: the base's recipe has no such part: the short keys cannot say it.
    """
    result = deepcopy(dict(base))
    if any(changes.get(key) is not None for key in WHOLE):
        for key in (*WHOLE, *SHORT_DEFAULTS):
            result.pop(key, None)
        return result
    later = [key for key in SHORT_DEFAULTS if key in changes]
    held = next((key for key in WHOLE if result.get(key) is not None), None)
    if not later or held is None:
        return result
    try:
        short = short_keys(recipe_of(result))
    except ValueError as error:
        raise ConfigError(f"{held}: {error}") from None
    if short is None:
        raise ConfigError(
            f"{', '.join(later)} cannot change the recipe that {held} holds, {format_facts(result)['format']}: it is not "
            "one format for all; set formats to the whole recipe that you mean"
        )
    for key in WHOLE:
        result.pop(key, None)
    return {**result, **short}


def refuse_two_spellings(keys: Mapping[str, Any]) -> None:
    """Refuse a whole recipe beside short keys that are not at their defaults.

    Raises:
        ValueError: naming the keys.
    """
    whole = [key for key in WHOLE if keys.get(key) is not None]
    short = [key for key, default in SHORT_DEFAULTS.items() if keys.get(key, default) != default]
    short = [] if short == ["storage_refresh_interval"] and whole == ["recipe"] else short  # old configs may say it
    if whole and len(whole + short) > 1:
        raise ValueError(f"{whole[0]} and {', '.join((whole + short)[1:])} both set the formats; remove one of the two")


def _from_short_keys(keys: Mapping[str, Any]) -> Recipe:
    from altgrad.nn.recipe.recipe import Recipe, uniform
    from altgrad.nn.recipe.spec import StorageSpec

    name = keys["fp8_format"]
    gradient: dict[str, Any] = {} if keys["gradient_format"] is None else {"grad": keys["gradient_format"]}
    if name == "FP32" and not gradient:
        return Recipe(None)
    storage: Any = "master"
    if keys["weight_storage"] == "grid" and name != "FP32":
        fixed = keys["scaling"] == "none"  # unscaled means the stored weights, too
        storage = StorageSpec(
            name,
            rounding=keys["storage_rounding"] or keys["rounding"],
            scale=1.0 if fixed else None,
            refresh_every=0 if fixed else keys["storage_refresh_interval"],
        )
    return uniform(
        name,
        rounding=keys["rounding"],
        scaling=keys["scaling"],
        overflow=keys["overflow"],
        storage=storage,
        **gradient,
    )
