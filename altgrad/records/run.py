"""Reads run folders: what a run is, how it ended, and its records, without loading more than is asked for.

A folder is whatever a run left behind, on the disk or in a pack, so everything here tolerates a run that is still going or
was killed: a missing `result.json` makes the run *unfinished*, a damaged one *damaged*, a line of `metrics.jsonl` that is
no record is skipped and counted, and a step that was recorded twice counts once, the last record winning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from altgrad.errors import ReportError
from altgrad.records.documents import (
    CONFIG,
    CRASHES,
    ENVIRONMENT,
    RESULT,
    Document,
    read_config,
    read_json,
    read_result,
)
from altgrad.records.folders import children, is_file, is_folder, pack_of, read_bytes
from altgrad.records.metrics_log import METRICS, Curve, Damage, Metrics, read_metrics, read_rows
from altgrad.records.schema import FINISHED, as_number, as_whole

__all__ = ["Curve", "Metrics", "Run", "as_number", "find_runs", "is_run", "read_run"]

FAILURE_REPORTS = "failure_reports"


@dataclass(frozen=True)
class Run:
    """One run folder. Every file is read when it is first asked for; a missing or damaged one reads as empty."""

    path: Path

    @cached_property
    def _result(self) -> Document:
        return read_result(self.path / RESULT)

    @cached_property
    def _environment(self) -> Document:
        return read_json(self.path / ENVIRONMENT)

    @cached_property
    def _config(self) -> Document:
        return read_config(self.path / CONFIG)

    @property
    def result(self) -> Mapping[str, Any]:
        return self._result.content

    @property
    def environment(self) -> Mapping[str, Any]:
        return self._environment.content

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration as it was run."""
        return self._config.content

    @property
    def finished(self) -> bool:
        return bool(self.result)

    @property
    def status(self) -> str:
        """ "completed", "collapsed", "interrupted" as recorded; else "damaged" when the record of it cannot be read, "failed"
        when a sweep gave the run up after its process died, else "unfinished" (running, or killed)."""
        if recorded := self.result.get("status"):
            return str(recorded)
        if self._result.problem is not None:
            return "damaged"
        return "failed" if read_json(self.path / CRASHES).content.get("state") == "failed" else "unfinished"

    @property
    def crash(self) -> str | None:
        """Why the run's process died, as a sweep recorded it last; None when it did not."""
        crashes = read_json(self.path / CRASHES).content.get("crashes")
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
        return int(seed) if isinstance(seed, int | str) and re.fullmatch(r"-?\d{1,19}", str(seed)) else None

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
    def storage_rounding(self) -> str | None:
        """Of the write back to the grid, where it differs from the operands' rounding; else None."""
        own = _text(self.config.get("storage_rounding"))
        return own if own != self.rounding else None

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
    def remarks(self) -> list[Mapping[str, Any]]:
        """What is no collapse but should be known, as verdicts (kinds "stalled", "far_above", "no_learning")."""
        found = self.result.get("remarks")
        return [remark for remark in found if isinstance(remark, dict)] if isinstance(found, list) else []

    @property
    def max_steps(self) -> int | None:
        return as_whole(self.result.get("max_steps", self.config.get("max_steps")))

    def fact(self, key: str) -> Any:
        """A fact recorded in the result or, for unfinished runs, in the environment; None when in neither."""
        return self.result.get(key, self.environment.get(key))

    def number(self, key: str) -> float | None:
        """A number of the result ("final_loss", "wall_s", ...); the strings nan, inf, -inf count as numbers."""
        return as_number(self.result.get(key))

    @cached_property
    def failure_reports(self) -> list[Path]:
        """HTML failure reports, in this folder or in the checkpoint directory that the configuration names; none in a pack."""
        if pack_of(self.path) is not None:
            return []
        folders = [self.path, self.path / "checkpoints"]
        if isinstance(configured := self.config.get("checkpoint_dir"), str):
            folders.append(Path(configured))
        found: set[Path] = set()
        for folder in folders:
            with suppress(OSError, ValueError):  # what a config names may be no path at all
                found |= set((folder / FAILURE_REPORTS).glob("*.html"))
        return sorted(found)

    def text(self, name: str) -> str | None:
        """A text file of the folder, such as failure.md; None where it is not there or no text."""
        try:
            return read_bytes(self.path / name).decode("utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def metrics(self, *, monitor_steps: int | None = 0, columns: Collection[str] | None = None) -> Metrics:
        """The records. `monitor_steps`: how many of the monitored steps to parse, evenly thinned (None: all, 0: none).
        `columns`: the fields of step and evaluation records to keep (None: all that are numbers).
        """
        data = self._metrics_bytes()
        found = read_metrics(data, monitor_steps, columns)
        self._count_missing(data, found.damage)
        return found

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The sound records of a kind ("step", "eval", "event", "monitor"; None: all) in file order."""
        return [record for record in read_rows(self._metrics_bytes())[0] if kind in (None, record["kind"])]

    def damage(self) -> Damage:
        """What is wrong with the metrics, every line looked at."""
        data = self._metrics_bytes()
        damage = read_rows(data)[1]
        self._count_missing(data, damage)
        return damage

    @cached_property
    def problems(self) -> list[str]:
        """What is wrong with the folder's own files, as clauses (damaged lines of the metrics are in `Metrics.damage`)."""
        found = [d.problem for d in (self._result, self._environment, self._config) if d.problem is not None]
        return found + [
            f"{name} is missing" for name in (CONFIG, ENVIRONMENT, METRICS, RESULT) if not is_file(self.path / name)
        ]

    def _metrics_bytes(self) -> bytes | None:
        try:
            return read_bytes(self.path / METRICS)
        except OSError:
            return None

    def _count_missing(self, data: bytes | None, damage: Damage) -> None:
        """Lines that the result counts and that are neither there nor known as damaged."""
        listed = (self.result.get("files") or {}).get(METRICS)
        expected = as_whole(listed.get("lines")) if isinstance(listed, dict) else None
        if expected is not None:
            damage.missing = max(0, expected - (data or b"").count(b"\n") - (bool(data) and not data.endswith(b"\n")))


def read_run(path: str | Path) -> Run:
    """The run in folder `path`, which may lie in a pack. Raises ReportError when that is no run folder."""
    path = Path(path)
    if not is_folder(path):
        raise ReportError(f"{path} is not a folder; give a run folder such as runs/e3m4_uniform-s42-1a2b3c4d")
    if not is_run(path):
        raise ReportError(
            f"{path} is not a run folder: it has no {CONFIG}, {METRICS} or {RESULT}; "
            f"give one run folder, or find the runs below it with altgrad.analysis.find_runs"
        )
    return Run(path)


def is_run(path: Path) -> bool:
    return any(is_file(path / name) for name in (METRICS, RESULT, CRASHES)) or (
        is_file(path / CONFIG) and is_file(path / ENVIRONMENT)
    )


def find_runs(folder: str | Path) -> list[Path]:
    """Run folders at or below `folder` (or in a pack), in name order. A run folder is not searched for further runs."""
    folder = Path(folder)
    if not is_folder(folder):
        raise ReportError(f"{folder} is not a folder; runs are looked for in folders, such as runs/, and in packs")
    found, waiting = [], [folder]
    while waiting:
        place = waiting.pop()
        if is_run(place):
            found.append(place)
        else:
            waiting += children(place)
    return sorted(found)


def finished_result(folder: Path) -> Mapping[str, Any] | None:
    """The result of a finished run; None while there is none, and where it is damaged."""
    result = read_result(folder / RESULT).content
    return result if result.get("status") in FINISHED else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
