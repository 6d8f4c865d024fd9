"""Configs and matrices that come with AltGrad, found by name: `e3m4_uniform`, `formats`; and the first files of one's own."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from altgrad.errors import ConfigError
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.formats import SHORT_DEFAULTS, WHOLE

_PACKAGE = Path(__file__).parents[2]
FIRST_MATRIX = """\
# A study: every format below with the same seeds and batches, so that differences are paired.
#
#   altgrad sweep matrix.yaml --dry-run     how many runs, and how long
#   altgrad sweep matrix.yaml
#   altgrad report runs/matrix
base: fp32_baseline        # a config file beside this one, or the name of one that comes with AltGrad
name: study
overrides: {max_steps: 300}
seeds: [42, 43, 44]        # 3 give error bars, 5 or more narrow ones
matrix:                    # every combination; any key of a config can be an axis
  formats: [E4M3, E3M4, MXFP8, x:E4M3 w:E4M3 dy:E5M2]
  # optimizer.lr: [1.0e-3, 3.0e-3]
include:                   # further runs
  - {formats: FP32}
# exclude:                 # combinations to leave out
#   - {formats: MXFP8, optimizer.lr: 3.0e-3}
"""


def shipped_folder(kind: str) -> Path:
    """Where the files of that kind ("configs", "matrix") are: inside an installed package, beside it in a checkout."""
    inside = _PACKAGE / "experiments" / kind
    return inside if inside.is_dir() else _PACKAGE.parent / "experiments" / kind


def shipped_names(kind: str) -> list[str]:
    """The names that `shipped_file` finds."""
    return sorted(path.stem for path in shipped_folder(kind).glob("*.yaml"))


def shipped_file(name: str | Path, kind: str) -> Path | None:
    """The file of that name, None if there is none; a path is no name."""
    return shipped_folder(kind) / f"{name}.yaml" if str(name) in shipped_names(kind) else None


def first_config() -> str:
    """A config of one's own to begin with: every key with its default and what it means, and `formats: E4M3`.

    Keys without a value of their own (None), and aliases for parts of `formats`, are commented out.
    """
    head = [
        "# One experiment: every key that AltGrad knows, with its default. Change what you like and run it with",
        "#",
        "#   altgrad run experiment.yaml",
        "#   altgrad run experiment.yaml optimizer.lr=3e-4 seed=7",
        "#   altgrad compare experiment.yaml --formats FP32,E4M3,MXFP8 --seeds 3",
    ]
    return "\n".join([*head, *_lines(ExperimentConfig, "")]) + "\n"


def write_first(text: str, target: Path) -> None:
    """Write a first file; one that is there stays.

    Raises:
        ConfigError: there is one.
    """
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{target} exists and stays as it is; name another file") from None


def _lines(section: type[BaseModel], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        words = _sentence(field.description)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield ""
            yield from _comment((inner.__doc__ or "").split("\n")[0], indent)
            yield f"{indent}{name}:"
            yield from _lines(inner, indent + "  ")
            continue
        yield from _comment(words, indent)
        value: Any = field.default
        if value is PydanticUndefined:
            assert field.default_factory is not None
            value = field.default_factory()  # type: ignore[call-arg]
        if name == "formats":
            value = "E4M3"
        silent = value is None or (not indent and name in (*SHORT_DEFAULTS, *WHOLE) and name != "formats")
        yield f"{indent}{'# ' if silent else ''}{name}: {_flow(value)}"


def _sentence(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").replace("`", "").strip()


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(_sentence(text), 110 - len(indent)):
        yield f"{indent}# {line}"


def _flow(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).split("\n...")[0].strip()
