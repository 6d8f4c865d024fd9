"""A matrix file expanded into experiments: axes over any config key, explicit extra runs, exclusions, paired seeds.

    base: ../configs/e3m4_uniform.yaml   # a config file (relative to this file), or a mapping
    name: formats                        # first part of every run's name
    overrides: {max_steps: 300}          # on top of base, for every run
    seeds: [42, 43, 44]                  # every variant runs with every seed, so that differences are paired
    matrix:                              # the grid: every combination
      fp8_format: [E3M4, E5M2]
      optimizer.lr: [1e-3, 3e-3]
      optimizer: [{name: adamw}, {name: sgd, lr: 0.1}]   # a section: several keys move together
    include:                             # further runs; each entry is a small grid of its own
      - {fp8_format: FP32, weight_storage: master}
    exclude:                             # combinations of the grid to leave out
      - {fp8_format: E5M2, optimizer.lr: 3e-3}

A run's name says where it differs from the base, not which axes the file has: adding an axis, values or seeds to the
file leaves the runs that are already there what they were.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from altgrad.errors import ConfigError, SweepError
from altgrad.sweep.keys import OPEN, changed, dotted, grid, listed, matches, plain, variant_name
from altgrad.training.config.document import literal, read_document, setting
from altgrad.training.config.experiment import ExperimentConfig, checked_name
from altgrad.training.config.formats import WHOLE, with_formats
from altgrad.training.config.identity import identity
from altgrad.training.config.loading import key_paths, load_config, nearest_key
from altgrad.training.config.shipped import shipped_file, shipped_names

MOST_RUNS = 20_000
"""More is a slip of the pen."""


@dataclass(frozen=True)
class Variant:
    """One experiment of a matrix: the values that its axes took, and the whole config."""

    choices: Mapping[str, Any]
    config: ExperimentConfig

    def __str__(self) -> str:
        return ", ".join(f"{key}={plain(value)}" for key, value in self.choices.items()) or "base"


@dataclass(frozen=True)
class Matrix:
    """What a matrix file says, with keys in dotted form. `expand` makes the experiments."""

    base: Mapping[str, Any]
    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    include: Sequence[Mapping[str, Any]] = ()
    exclude: Sequence[Mapping[str, Any]] = ()
    origin: str = "matrix"

    def with_overrides(self, overrides: Sequence[str]) -> Matrix:
        """This matrix with `key=value` from the command line: on an axis (or `seeds`) it replaces the axis's values.

        Raises:
            SweepError, ConfigError: an override that is no key=value, or names no config key.
        """
        axes, plain, seeds = dict(self.axes), dict(self.overrides), self.seeds
        for override in overrides:
            try:
                path, value = setting(override)
            except ConfigError as error:
                raise SweepError(str(error)) from None
            key = ".".join(path)
            if key in ("seed", "seeds"):
                seeds = _seeds(value, self.base, self.origin)
            elif key in axes:
                axes[key] = value if isinstance(value, list) else [value]
                _refuse_empty(key, axes[key], self.origin)
            else:
                plain[key] = value
        _check_keys([*axes, *plain], self.origin)
        return Matrix(self.base, self.name, plain, seeds, axes, self.include, self.exclude, self.origin)

    def expand(self, **fixed: Any) -> list[Variant]:
        """Every experiment, all variants of the first seed first: an interrupted study holds whole comparisons.

        Args:
            fixed: top-level config keys that the sweep itself sets (such as runs_dir).

        Raises:
            SweepError: nothing to run, the same run twice, or an exclusion that excludes nothing.
            ConfigError: a combination is no valid experiment.
        """
        base = _with(self.base, self.overrides)
        try:
            default = load_config(base)
        except ConfigError as error:
            several = [key for key, value in self.overrides.items() if isinstance(value, list) and key in str(error)]
            hint = f"; to try several, write {several[0]} with its values under matrix: in the file" if several else ""
            raise ConfigError(f"{self.origin}: {str(error).removeprefix('config: ')}{hint}") from None
        seeds = self.seeds or [default.seed]
        self._refuse_too_many(len(seeds))
        combinations = grid(self.axes) if self.axes else []
        explicit = [choice for entry in self.include for choice in grid(listed(entry))]
        if not combinations and not explicit:
            raise SweepError(
                f"{self.origin}: empty matrix, there is no axis in matrix: and nothing in include:; "
                "add an axis such as fp8_format: [E3M4, E5M2]"
            )
        for rule in self.exclude:
            if not any(matches({**choice, "seed": seed}, rule) for choice in combinations for seed in seeds):
                raise SweepError(f"{self.origin}: exclude {plain(rule)} matches no combination; correct or remove it")
        chosen = []
        for seed in seeds:
            paired = [{**choice, "seed": seed} for choice in combinations]
            chosen += [choice for choice in paired if not any(matches(choice, rule) for rule in self.exclude)]
            chosen += [{**choice, "seed": seed} for choice in explicit if "seed" not in choice]
        chosen += [choice for choice in explicit if "seed" in choice]
        if not chosen:
            raise SweepError(f"{self.origin}: empty matrix, every combination is excluded; remove an entry of exclude:")
        facts = default.model_dump(mode="json")
        variants = [self._variant(base, choice, facts, fixed) for choice in chosen]
        self._refuse_duplicates(variants)
        return variants

    def _variant(
        self, base: Mapping[str, Any], choice: Mapping[str, Any], facts: Mapping[str, Any], fixed: Mapping[str, Any]
    ) -> Variant:
        try:
            config = load_config(_with(base, choice))
        except ConfigError as error:
            raise ConfigError(f"{self.origin}: {plain(choice)}: {str(error).removeprefix('config: ')}") from None
        own = {"checkpoint_dir": None, **fixed}
        if "name" not in choice:
            own["name"] = variant_name(self.name, choice, facts)
        return Variant(choice, config.model_copy(update=own))

    def _refuse_too_many(self, seeds: int) -> None:
        """Count before anything is multiplied out."""
        sizes = [[len(values) for values in axes.values()] for axes in (self.axes, *map(listed, self.include)) if axes]
        total = seeds * sum(math.prod(size) for size in sizes)
        if total > MOST_RUNS:
            raise SweepError(
                f"{self.origin}: {total:,} runs; a matrix has at most {MOST_RUNS:,}: take fewer values or seeds"
            )

    def _refuse_duplicates(self, variants: Sequence[Variant]) -> None:
        seen: dict[str, Variant] = {}
        for variant in variants:
            content = {**identity(variant.config), "name": None}
            other = seen.setdefault(json.dumps(content, sort_keys=True), variant)
            if other is not variant:
                raise SweepError(f"{self.origin}: the same run twice: ({other}) and ({variant}); remove one of the two")


def read_matrix(path: str | Path) -> Matrix:
    """The matrix in a YAML file.

    Raises:
        SweepError: the file is missing, is no YAML mapping, or holds an unknown section.
        ConfigError: an axis, override, inclusion or exclusion names no config key (the nearest one is named).
    """
    given, path = path, Path(path)
    if not path.is_file():
        path = shipped_file(path, "matrix") or path
    if not path.is_file():
        beside = get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1, cutoff=0.4)
        near = get_close_matches(path.name, shipped_names("matrix"), n=1, cutoff=0.6) or [
            str(path.parent / name) for name in beside
        ]
        shipped = ", ".join(shipped_names("matrix"))
        hint = f"did you mean {near[0]}?" if near else f"give a file, or one of {shipped}"
        if shipped_file(path, "configs") is not None:
            hint = f"a config of that name is one run: altgrad run {given}"
        raise SweepError(f"matrix file {given} does not exist; {hint}")
    try:
        content = literal(read_document(path))
    except ConfigError as error:
        raise SweepError(str(error)) from None
    return matrix_from_mapping(content, path.parent, str(path))


def matrix_from_mapping(content: Any, folder: str | Path = ".", origin: str = "matrix") -> Matrix:
    """The matrix that a mapping (as read from YAML) describes; `base` may be a path relative to `folder`.

    Raises:
        SweepError, ConfigError: as `read_matrix`.
    """
    if not isinstance(content, dict) or not content:
        raise SweepError(f"{origin} holds no mapping; write base:, matrix: and so on (see docs/guides/sweeps.md)")
    sections = ("base", "name", "overrides", "seeds", "matrix", "include", "exclude")
    for key in content:
        if key not in sections:
            near = get_close_matches(str(key), sections, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"a matrix has {', '.join(sections)}"
            raise SweepError(f"{origin}: unknown section {key!r}; {hint}")
    base, named = _base(content.get("base"), Path(folder), origin)
    axes = listed(_mapping(content.get("matrix"), "matrix", origin))
    overrides = dotted(_mapping(content.get("overrides"), "overrides", origin))
    include = [dotted(_mapping(entry, "include", origin)) for entry in _list(content.get("include"), "include", origin)]
    exclude = [dotted(_mapping(entry, "exclude", origin)) for entry in _list(content.get("exclude"), "exclude", origin)]
    for entries, section in ((include, "include"), (exclude, "exclude")):
        if any(not entry for entry in entries):
            raise SweepError(f"{origin}: an entry of {section} is empty; name at least one key, or remove it")
    for key, values in axes.items():
        _refuse_empty(key, values, origin)
    _check_keys(itertools.chain(axes, overrides, *include, *exclude), origin)
    if "seed" in axes and content.get("seeds") is not None:
        raise SweepError(f"{origin}: seeds and the axis 'seed' both set the seeds; remove one of the two")
    seeds = _seeds(axes.pop("seed") if "seed" in axes else content.get("seeds"), changed(base, overrides), origin)
    name = checked_name(content.get("name") or named, f"{origin}: name")
    return Matrix(base, name, overrides, seeds, axes, include, exclude, origin)


def _base(base: Any, folder: Path, origin: str) -> tuple[Mapping[str, Any], str]:
    """(the base config as a mapping, its name)."""
    if base is None:
        raise SweepError(f"{origin} has no base; write base: a config file such as ../configs/fp32_baseline.yaml")
    if isinstance(base, dict):
        return base, load_config(base).name
    path = folder / str(base)
    path = path if path.is_file() or not Path(str(base)).is_file() else Path(str(base))
    config = load_config(path)
    return literal(config.model_dump(mode="json")), config.name


def _with(base: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any]:
    """The base with dotted keys set, what comes later having the word where both speak of formats."""
    whole = {key: value for key, value in choice.items() if key in WHOLE}
    rest = {key: value for key, value in choice.items() if key not in WHOLE}
    result = changed(with_formats(base, whole), whole)
    beside_recipe = whole.get("recipe") is not None  # older matrices set the short keys to their defaults beside it
    return changed(result if beside_recipe else with_formats(result, rest), rest)


def _seeds(value: Any, base: Mapping[str, Any], origin: str) -> list[int]:
    """A list of seeds as it is; a number n as the n seeds from the base's on."""
    if value is None:
        return []
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise SweepError(f"{origin}: {value} seeds; use at least 1, and 3 or more for error bars")
        if value > MOST_RUNS:
            raise SweepError(f"{origin}: {value:,} seeds; a matrix has at most {MOST_RUNS:,} runs")
        first = load_config(base).seed
        return list(range(first, first + value))
    if not isinstance(value, list) or not value or any(isinstance(s, bool) or not isinstance(s, int) for s in value):
        raise SweepError(f"{origin}: seeds {value!r} is neither a list of integers nor how many; write seeds: [42, 43]")
    return value


def _refuse_empty(key: str, values: Sequence[Any], origin: str) -> None:
    if not values:
        raise SweepError(f"{origin}: empty matrix, axis {key!r} has no values; give it at least one, or remove it")


def _check_keys(keys: Iterable[str], origin: str) -> None:
    known = set(key_paths())
    for key in keys:
        if key not in known and not key.startswith(tuple(f"{name}." for name in OPEN)):
            near = nearest_key(key) or get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{origin}: {key!r} names no config key; did you mean {near!r}? "
                "(altgrad run CONFIG --print-config shows all keys)"
            )
        if key in ("runs_dir", "checkpoint_dir"):
            raise ConfigError(f"{origin}: {key!r} is set by the sweep; choose the folder with --out")


def _mapping(value: Any, section: str, origin: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SweepError(
            f"{origin}: {section} holds {value!r}, not keys with values; write lines such as fp8_format: E3M4"
        )
    return value


def _list(value: Any, section: str, origin: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise SweepError(f"{origin}: {section} holds {value!r}, not a list; begin each entry with '- '")
    return value
