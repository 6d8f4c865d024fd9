"""Reads run folders: what a run is, how it ended, and its records, without loading more than is asked for.

A folder is whatever a run left behind, so everything here tolerates a run that is still going or was killed: a missing
`result.json` makes the run *unfinished*, a torn line of `metrics.jsonl` is skipped and counted, and a step that was
recorded twice (a resume repeats the steps after its checkpoint) counts once, the last record winning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from altgrad.errors import ReportError

CONFIG, ENVIRONMENT, METRICS, RESULT = "config.yaml", "env.json", "metrics.jsonl", "result.json"
CRASHES = "crashes.json"  # a sweep's record of a run whose process died
FAILURE_REPORTS = "failure_reports"

_NON_FINITE = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "+inf": np.inf, "infinity": np.inf, "-infinity": -np.inf}
_HEAD = re.compile(rb'"kind":\s*"(\w+)"')
_STEP = re.compile(rb'"step":\s*(\d+)')


@dataclass(frozen=True)
class Curve:
    """A quantity over training: `values[i]` was measured at `steps[i]`; steps ascend without repetition."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last_finite(self) -> float | None:
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if len(finite) else None

    @staticmethod
    def of(pairs: Iterable[tuple[int, float]]) -> Curve:
        """From (step, value) pairs in file order; of two records of one step the later one counts."""
        latest = dict(pairs)
        steps = np.fromiter(latest.keys(), dtype=np.int64, count=len(latest))
        values = np.fromiter(latest.values(), dtype=np.float64, count=len(latest))
        order = np.argsort(steps, kind="stable")
        return Curve(steps[order], values[order])


@dataclass(frozen=True)
class Metrics:
    """The records of one run, by kind. `columns` maps a field of the step records ("loss", "lr", ...) to its curve."""

    columns: Mapping[str, Curve]
    evaluations: Mapping[str, Curve]
    events: Sequence[Mapping[str, Any]]
    monitor: Sequence[Mapping[str, Any]]
    torn: Sequence[int]
    """Line numbers (from 1) that are not a JSON record, as a crash leaves them."""

    @property
    def train(self) -> Curve:
        return self.columns.get("loss", Curve.of(()))

    @property
    def validation(self) -> Curve:
        return self.evaluations.get("val_loss", Curve.of(()))

    @property
    def last_step(self) -> int | None:
        return int(self.train.steps[-1]) if len(self.train) else None


@dataclass(frozen=True)
class Run:
    """One run folder. Every file is read when it is first asked for; a missing or damaged one reads as empty."""

    path: Path

    @cached_property
    def _result_and_problem(self) -> tuple[Mapping[str, Any], str | None]:
        return _read_json(self.path / RESULT)

    @property
    def result(self) -> Mapping[str, Any]:
        return self._result_and_problem[0]

    @cached_property
    def environment(self) -> Mapping[str, Any]:
        return _read_json(self.path / ENVIRONMENT)[0]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration as it was run."""
        try:
            loaded = yaml.load((self.path / CONFIG).read_text("utf-8"), Loader=_YamlLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    @property
    def finished(self) -> bool:
        return bool(self.result)

    @property
    def status(self) -> str:
        """ "completed", "collapsed", "interrupted" as recorded; else "failed" when a sweep gave the run up after its process
        died, else "unfinished" (running, or killed)."""
        if recorded := self.result.get("status"):
            return str(recorded)
        return "failed" if _read_json(self.path / CRASHES)[0].get("state") == "failed" else "unfinished"

    @property
    def crash(self) -> str | None:
        """Why the run's process died, as a sweep recorded it last; None when it did not."""
        crashes = _read_json(self.path / CRASHES)[0].get("crashes")
        last = crashes[-1] if isinstance(crashes, list) and crashes else None
        return _text(last.get("reason")) if isinstance(last, dict) else None

    @property
    def run_id(self) -> str:
        return str(self.result.get("run_id") or self.path.name)

    @property
    def name(self) -> str:
        return str(self.result.get("name") or self.config.get("name") or re.sub(r"-s\d+-\w{6,}$", "", self.path.name))

    @property
    def seed(self) -> int | None:
        seed = self.result.get("seed", self.config.get("seed"))
        if seed is None and (found := re.search(r"-s(\d+)-", self.path.name)):
            seed = found[1]
        return int(seed) if isinstance(seed, int | str) and str(seed).lstrip("-").isdigit() else None

    @property
    def format(self) -> str:
        """The formats under test: a name, or a recipe's text; an unquantized run is "FP32"."""
        recorded = self.result.get("format") or self._format_facts.get("name") or self.config.get("fp8_format")
        return str(recorded) if recorded and str(recorded).lower() != "none" else "FP32"

    @property
    def is_baseline(self) -> bool:
        return self.format.upper() == "FP32"

    @property
    def storage(self) -> str | None:
        known = self._format_facts.get("storage", self.config.get("weight_storage"))
        return _text(self.result.get("storage", known))

    @property
    def rounding(self) -> str | None:
        known = self._format_facts.get("rounding", self.config.get("rounding"))
        return _text(self.result.get("rounding", known))

    @property
    def recipe(self) -> str | None:
        """The text of the recipe of a run whose formats were not given by the short keys."""
        return _text(self._format_facts.get("recipe")) if self.config.get("formats") is not None else None

    @property
    def _format_facts(self) -> Mapping[str, Any]:
        """What the environment says of the run's formats: present before there is a result."""
        facts = self.environment.get("format")
        return facts if isinstance(facts, dict) else {}

    @property
    def optimizer(self) -> str | None:
        section = self.config.get("optimizer")
        return _text(section.get("name")) if isinstance(section, dict) else _text(section)

    @property
    def verdict(self) -> Mapping[str, Any] | None:
        verdict = self.result.get("verdict")
        return verdict if isinstance(verdict, dict) else None

    @property
    def max_steps(self) -> int | None:
        steps = self.result.get("max_steps", self.config.get("max_steps"))
        return int(steps) if isinstance(steps, int | float) else None

    def fact(self, key: str) -> Any:
        """A fact recorded in the result or, for unfinished runs, in the environment; None when in neither."""
        return self.result.get(key, self.environment.get(key))

    def number(self, key: str) -> float | None:
        """A number of the result ("final_loss", "wall_s", ...); the strings nan, inf, -inf count as numbers."""
        return as_number(self.result.get(key))

    @cached_property
    def failure_reports(self) -> list[Path]:
        """HTML failure reports, in this folder or in the checkpoint directory that the configuration names."""
        folders = [self.path, self.path / "checkpoints"]
        if configured := self.config.get("checkpoint_dir"):
            folders.append(Path(str(configured)))
        return sorted({page for folder in folders for page in (folder / FAILURE_REPORTS).glob("*.html")})

    def metrics(self, *, monitor_steps: int | None = 0, columns: Collection[str] | None = None) -> Metrics:
        """The records. `monitor_steps`: how many of the monitored steps to parse, evenly thinned (None: all, 0: none).
        `columns`: the fields of step and evaluation records to keep (None: all that are numbers).

        Monitor lines outnumber all others by layers x roles, and most reports draw few of them, so the lines of the
        steps that are thinned out are never parsed.
        """
        return _read_metrics(self.path / METRICS, monitor_steps, columns)

    @cached_property
    def problems(self) -> list[str]:
        """What is wrong with the folder's own files, as sentences (torn metrics lines are in `Metrics.torn`)."""
        found = [] if self._result_and_problem[1] is None else [self._result_and_problem[1]]
        found += [
            f"{name} is missing" for name in (CONFIG, ENVIRONMENT, METRICS, RESULT) if not (self.path / name).is_file()
        ]
        return found


_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_run(path: str | Path) -> Run:
    """The run in folder `path`. Raises ReportError when that is no run folder."""
    path = Path(path)
    if not path.is_dir():
        raise ReportError(f"{path} is not a folder; give a run folder such as runs/e3m4_uniform-s42-1a2b3c4d")
    if not is_run(path):
        raise ReportError(
            f"{path} is not a run folder: it has no {CONFIG}, {METRICS} or {RESULT}; "
            f"give one run folder, or find the runs below it with altgrad.analysis.find_runs"
        )
    return Run(path)


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (METRICS, RESULT, CRASHES)) or (
        (path / CONFIG).is_file() and (path / ENVIRONMENT).is_file()
    )


def find_runs(folder: str | Path) -> list[Path]:
    """Run folders at or below `folder`, in name order. A run folder is not searched for further runs."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; runs are looked for in folders, such as runs/")
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    for child in folder.iterdir():
        if child.is_dir() and not child.name.startswith(".") and not child.is_symlink():
            yield from _walk(child)


def as_number(value: Any) -> float | None:
    """JSON value -> float; "nan", "inf", "-inf" are floats; anything else that is no number is None."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value)
    return _NON_FINITE.get(value.lower()) if isinstance(value, str) else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _read_json(path: Path) -> tuple[Mapping[str, Any], str | None]:
    try:
        loaded = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError) as error:
        return {}, f"{path.name} is unreadable: {error}"
    return (loaded, None) if isinstance(loaded, dict) else ({}, f"{path.name} holds no JSON object")


def _read_metrics(path: Path, monitor_steps: int | None, keep: Collection[str] | None) -> Metrics:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        lines = []
    wanted = None if monitor_steps is None else _monitored_steps(lines, monitor_steps)
    columns: dict[str, list[tuple[int, float]]] = {}
    evaluations: dict[str, list[tuple[int, float]]] = {}
    events: list[Mapping[str, Any]] = []
    monitor: dict[tuple[int, Any, Any], Mapping[str, Any]] = {}
    torn: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        head = _HEAD.search(line[:64])
        if head and head[1] == b"monitor" and wanted is not None and line.rstrip().endswith(b"}"):
            step = _STEP.search(line)
            if step and int(step[1]) not in wanted:
                continue
        try:
            record = json.loads(line)
            kind, step = record["kind"], int(record["step"])
        except (ValueError, KeyError, TypeError):
            torn.append(number)
            continue
        if kind in ("step", "eval"):
            target = columns if kind == "step" else evaluations
            for key in record if keep is None else keep:
                if key not in ("kind", "step") and (as_float := as_number(record.get(key))) is not None:
                    target.setdefault(key, []).append((step, as_float))
        elif kind == "event":
            events.append(record)
        elif kind == "monitor" and (wanted is None or step in wanted):
            monitor[step, record.get("layer"), record.get("role")] = record
    return Metrics(
        {key: Curve.of(pairs) for key, pairs in columns.items()},
        {key: Curve.of(pairs) for key, pairs in evaluations.items()},
        events,
        list(monitor.values()),
        torn,
    )


def _monitored_steps(lines: list[bytes], keep: int) -> set[int]:
    """At most `keep` of the steps that have monitor lines, evenly spaced, first and last included."""
    if keep == 0:
        return set()
    heads = (_HEAD.search(line[:64]) for line in lines)
    steps = sorted(
        {
            int(found[1])
            for line, head in zip(lines, heads, strict=True)
            if head and head[1] == b"monitor" and (found := _STEP.search(line))
        }
    )
    if len(steps) <= keep:
        return set(steps)
    return {steps[i] for i in np.linspace(0, len(steps) - 1, keep).round().astype(int)}
