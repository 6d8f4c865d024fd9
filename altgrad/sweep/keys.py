"""Dotted keys: nested settings read, changed, compared and named by paths such as `optimizer.lr`."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

OPEN = ("formats", "recipe", "model.options", "optimizer.options", "monitor.schedule", "shift.chain")
"""Settings that are mappings with the user's own keys: one value each, and any key below them is valid."""

_ABSENT = object()


def dotted(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys; mappings under the user's own keys (`OPEN`) stay values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value and path not in OPEN:
            flat.update(dotted(value, path + "."))
        else:
            flat[path] = value
    return flat


def listed(entry: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Dotted keys, each with a list of values."""
    return {key: value if isinstance(value, list) else [value] for key, value in dotted(entry).items()}


def grid(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, the last axis moving fastest; no axes give the one empty combination."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def matches(choice: Mapping[str, Any], rule: Mapping[str, Any]) -> bool:
    """Whether every key of `rule` has its value (or, for a list, one of its values) in `choice`."""
    flat = {**choice, **dotted(choice)}
    return all(
        key in flat and (flat[key] == wanted or (isinstance(wanted, list) and flat[key] in wanted))
        for key, wanted in rule.items()
    )


def changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with dotted keys set; a mapping on a section changes the keys that it names."""
    result = deepcopy(dict(base))
    for path, value in changes.items():
        at = result
        *sections, last = path.split(".")
        for section in sections:
            if not isinstance(at.get(section), dict):
                at[section] = {}
            at = at[section]
        if isinstance(value, dict) and isinstance(at.get(last), dict) and path not in OPEN:
            at[last] = changed(at[last], value)
        else:
            at[last] = value
    return result


def variant_name(first: str, choice: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """`first` and the values in which this choice differs from the base, such as formats-e3m4-grid-lr0.003."""
    parts = [first]
    for key, value in dotted(choice).items():
        if key != "seed" and value != _at(base, key):
            parts.append(_slug(key.rpartition(".")[2], value))
    name = "-".join(part for part in parts if part)
    return name if len(name) <= 100 else f"{name[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _at(nested: Mapping[str, Any], path: str) -> Any:
    at: Any = nested
    for part in path.split("."):
        at = at.get(part, _ABSENT) if isinstance(at, dict) else _ABSENT
    return at


def _slug(key: str, value: Any) -> str:
    if key == "formats" and isinstance(value, dict):  # `recipe` keeps its hash: a run's name is part of its identity
        from altgrad.nn.recipe.recipe import Recipe

        text = Recipe.from_dict(value).text
    elif isinstance(value, bool):
        text = key if value else f"no-{key}"
    elif isinstance(value, str):
        text = value
    elif isinstance(value, int | float) or value is None:
        text = f"{key}{value}"
    else:
        text = f"{key}-{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:6]}"
    return re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_.")


def plain(value: Any) -> str:
    """A value as a person would write it in YAML's flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) + "}"
    return str(value)
