"""Loads a folder of runs as a study: settings (runs that differ in nothing but the seed), their losses and baselines.

A study may hold thousands of runs, so each run is read once, reduced to a summary of a few kilobytes, and let go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from altgrad.analysis.comparability import circumstances, require_comparable
from altgrad.analysis.comparison import IGNORED_KEYS, flatten, table_row
from altgrad.analysis.layers import LayerHistory, layer_history
from altgrad.analysis.outcome import Outcome
from altgrad.analysis.ranking import Contender
from altgrad.errors import ReportError
from altgrad.records.metrics_log import Curve, Damage
from altgrad.records.run import Run, find_runs, read_run
from altgrad.records.schema import as_number
from altgrad.report.numbers import plural
from altgrad.report.verdicts import ending, grade

CURVE_BUCKETS = 100
MONITORED_STEPS = 24
MOST_COMPARED = 16
"""More runs than this are told as a study."""

FORMAT, OPTIMIZER, STORAGE = "fp8_format", "optimizer.name", "weight_storage"
_AXIS_ORDER = (FORMAT, OPTIMIZER, STORAGE, "rounding", "scaling")
_NEARLY_ALL = 0.75  # of the settings
_SHOWN_PROBLEMS = 10
_NO_AXIS = IGNORED_KEYS | {"seed", "distributed", "checkpoint_interval", "formats"}


@dataclass(frozen=True)
class RunSummary:
    """What a study keeps of one run."""

    path: Path
    seed: Hashable
    row: Mapping[str, Any]
    """The run's row of the comparison table."""
    collapsed: bool
    kind: str | None
    onset: int | None
    train: np.ndarray
    """Mean training loss per bucket of steps, float32 [CURVE_BUCKETS], NaN where the run has none."""
    validation: Curve
    layers: LayerHistory
    shifts: tuple[int, ...]
    damage: Damage
    problems: tuple[str, ...]
    failure_reports: tuple[Path, ...]
    remarks: tuple[Mapping[str, Any], ...]

    @property
    def finished(self) -> bool:
        return self.row["status"] in ("completed", "collapsed")

    @property
    def reached_the_end(self) -> bool:
        """Whether it trained to its last step: a collapse may end a run, or (verdict.stop=false) only be recorded."""
        return not self.collapsed or (self.row["steps"] is not None and self.row["steps"] == self.row["max_steps"])

    @property
    def final(self) -> float | None:
        """The loss that settings are compared by: the final validation loss, else the final training loss."""
        value = self.row["final_val_loss"]
        value = self.row["final_loss"] if value is None else value
        return value if value is not None and np.isfinite(value) else None

    def verdict_beside(self, baseline: RunSummary | None) -> str:
        """The verdict for a table cell, graded beside the unquantized run of the same seed where both were evaluated."""
        if baseline is None or self.row["status"] != "completed" or self.collapsed:
            return self.row["verdict"]
        mine, theirs = (as_number(run.row["final_val_loss"]) for run in (self, baseline))
        if mine is None or theirs is None or not len(baseline.validation):
            return self.row["verdict"]
        graded = grade(mine - theirs, float(baseline.validation.values[0]) - theirs)
        return ending("completed", None, self.remarks, graded)


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed only. `values` are the study's axes, in the study's order."""

    label: str
    format: str
    values: Mapping[str, Any]
    runs: Sequence[RunSummary]

    @property
    def is_baseline(self) -> bool:
        return self.format.upper() == "FP32"

    @cached_property
    def contender(self) -> Contender:
        """For the ranking: final losses by seed of the runs that reached the last step, collapsed on the way or not."""
        ended = [run for run in self.runs if run.finished]
        losses = {r.seed: r.final for r in ended if r.reached_the_end and r.final is not None}
        return Contender(self.label, losses, sum(run.collapsed for run in ended), len(ended))


@dataclass(frozen=True)
class Study:
    """All settings of a folder, in the order of their first run."""

    folder: Path
    settings: Sequence[Setting]
    axes: Sequence[str]
    """Configuration keys that differ between settings."""
    max_steps: int
    warnings: Sequence[str] = ()
    remarks: Sequence[str] = ()
    unsaid: Sequence[str] = ()
    """What holds for a setting whose label does not say otherwise."""

    @property
    def runs(self) -> list[RunSummary]:
        return [run for setting in self.settings for run in setting.runs]

    @property
    def quantized(self) -> list[Setting]:
        return [setting for setting in self.settings if not setting.is_baseline]

    def baseline_of(self, setting: Setting) -> Setting | None:
        """The unquantized setting with the same values on most axes (the optimizer's name before all others)."""
        candidates = [s for s in self.settings if s.is_baseline]
        same = [s for s in candidates if s.values.get(OPTIMIZER) == setting.values.get(OPTIMIZER)]
        pool = same or (candidates if len(candidates) == 1 else [])
        return max(pool, key=lambda s: sum(s.values[a] == setting.values[a] for a in self.axes), default=None)

    @property
    def seeds(self) -> list[Hashable]:
        return sorted({run.seed for run in self.runs if run.seed is not None}, key=str)


def is_study(run_dirs: Sequence[str | Path]) -> bool:
    """Whether runs are better told as a study than run by run: they repeat a setting over seeds, or are many."""
    runs = [Run(Path(path)) for path in run_dirs]
    if len(runs) > MOST_COMPARED:
        return True
    keys, _ = _axes(runs)
    return len(set(keys)) < len(runs)


def load_study(source: str | Path | Sequence[str | Path], *, force: bool = False) -> Study:
    """Read every run at or below a folder, or the run folders given one by one.

    Raises ReportError when there is none, or when the runs are of different corpora or code versions (unless `force`,
    which has the report marked).
    """
    if isinstance(source, str | Path):
        folder, paths = Path(source), find_runs(source)
    else:
        paths = list(dict.fromkeys(Path(path) for path in source))
        folder = paths[0].parent if paths else Path()
    if not paths:
        raise ReportError(f"no run folders in {folder}; run a sweep first, or name the folder that holds the runs")
    runs = [read_run(path) for path in paths]
    warnings = require_comparable(runs, force=force)
    keys, axes = _axes(runs)
    max_steps = max([run.max_steps or 0 for run in runs] + [1])
    grouped: dict[Hashable, list[RunSummary]] = {}
    formats: dict[Hashable, tuple[str, dict[str, Any]]] = {}
    for run, key in zip(runs, keys, strict=True):
        grouped.setdefault(key, []).append(summarize(run, max_steps))
        formats[key] = (run.format, dict(zip(axes, key, strict=True)))
    usual = _usual([values for _, values in formats.values()], axes)
    settings = [Setting(_label(*formats[key], axes, usual), *formats[key], members) for key, members in grouped.items()]
    remarks = [*circumstances(runs), *_damage(settings)]
    unsaid = [axis_words(axis, value, named=True) for axis, value in usual.items() if value is not None]
    return Study(folder, settings, axes, max_steps, warnings, remarks, unsaid)


@np.errstate(over="ignore")  # what float32 cannot hold is drawn as infinite
def summarize(run: Run, max_steps: int) -> RunSummary:
    """Read one run and keep its summary."""
    outcome = Outcome(run, run.format)
    metrics = run.metrics(monitor_steps=MONITORED_STEPS, columns=("loss", "val_loss"))
    outcome.__dict__["metrics"] = metrics  # read once, with the monitor's lines
    validation = metrics.validation
    return RunSummary(
        path=run.path,
        seed=run.seed,
        row=table_row(outcome),
        collapsed=outcome.collapsed,
        kind=outcome.kind,
        onset=outcome.onset if outcome.collapsed else None,
        train=bucket_means(metrics.train, max_steps, CURVE_BUCKETS),
        validation=Curve(validation.steps.astype(np.int32), validation.values.astype(np.float32)),
        layers=layer_history(metrics.monitor, max_steps),
        shifts=_shifts(run),
        damage=metrics.damage,
        problems=tuple(run.problems),
        failure_reports=tuple(run.failure_reports),
        remarks=tuple(run.remarks),
    )


def bucket_means(curve: Curve, max_steps: int, buckets: int) -> np.ndarray:
    """Mean of the finite values in each of `buckets` equal stretches of steps; NaN where all are not finite, and beyond the
    first and the last recorded step. Between steps that are recorded, as in records of every tenth, a straight line."""
    finite = np.isfinite(curve.values)
    index = np.clip((np.maximum(curve.steps, 1) - 1) * buckets // max_steps, 0, buckets - 1)
    counts = np.bincount(index[finite], minlength=buckets)
    sums = np.bincount(index[finite], weights=curve.values[finite], minlength=buckets)
    with np.errstate(invalid="ignore"):
        means = sums / np.where(counts > 0, counts, np.nan)
    recorded = np.unique(index)
    between = np.setdiff1d(np.arange(buckets), recorded)
    if len(recorded) and len(between):
        means[between] = np.interp(between, recorded, means[recorded], left=np.nan, right=np.nan)
    return means.astype(np.float32)


def _axes(runs: Sequence[Run]) -> tuple[list[tuple], list[str]]:
    """(key of each run, axes): the fewest configuration keys that tell apart what is not told apart by the seed."""
    flats = []
    for run in runs:
        flat = {k: _hashable(v) for k, v in flatten(run.config).items() if k.split(".")[0] not in _NO_AXIS}
        told = {FORMAT: run.format, STORAGE: run.storage, "rounding": run.rounding}  # however the config spells them
        flats.append({**flat, **told, **({"formats": run.recipe} if run.recipe else {})})
    known = dict.fromkeys(key for flat in flats for key in flat)
    varying = [key for key in known if len({flat.get(key) for flat in flats}) > 1]
    ordered = [key for key in _AXIS_ORDER if key in varying] + [key for key in varying if key not in _AXIS_ORDER]
    axes = [FORMAT]
    keys = [(flat[FORMAT],) for flat in flats]
    for axis in ordered:
        if axis == FORMAT:
            continue
        finer = [(*key, flat.get(axis)) for key, flat in zip(keys, flats, strict=True)]
        if len(set(finer)) > len(set(keys)):
            keys, axes = finer, [*axes, axis]
    return keys, axes


def _hashable(value: Any) -> Hashable:
    return value if isinstance(value, Hashable) else repr(value)


def _usual(values: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> dict[str, Any]:
    """The value that nearly all settings have on an axis, for axes that have one: labels are shorter without it."""
    found = {}
    for axis in axes:
        value, times = Counter(one[axis] for one in values).most_common(1)[0]
        if axis != FORMAT and times >= max(3, _NEARLY_ALL * len(values)):
            found[axis] = value
    return found


def _label(fmt: str, values: Mapping[str, Any], axes: Sequence[str], usual: Mapping[str, Any]) -> str:
    told = [axis for axis in axes if axis != FORMAT and (values[axis] is not None or usual.get(axis) is not None)]
    return " ".join([fmt, *(axis_words(axis, values[axis]) for axis in told if usual.get(axis) != values[axis])])


def axis_name(axis: str) -> str:
    """A configuration key in words: "emergency shift" for enable_emergency_shift."""
    return axis.rsplit(".", 1)[-1].removeprefix("enable_").replace("_", " ")


def axis_words(axis: str, value: Any, *, named: bool = False) -> str:
    """A value in a label; the usual axes are known by their values alone, unless they shall be `named`."""
    name = axis_name(axis)
    if value is None or isinstance(value, bool):
        return f"{name} {'none' if value is None else 'on' if value else 'off'}"
    text = f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")
    if named:
        return f"{name} {text}"
    if (name, text) == ("scaling", "none"):
        return "unscaled"
    return text if axis in _AXIS_ORDER and text != "none" else f"{name} {text}"


def _shifts(run: Run) -> tuple[int, ...]:
    items = run.result.get("interventions") or []
    steps = [as_number(i.get("step")) for i in items if isinstance(i, dict) and i.get("kind") == "shift"]
    return tuple(int(step) for step in steps if step is not None)


def _damage(settings: Sequence[Setting]) -> list[str]:
    runs = [run for setting in settings for run in setting.runs]
    found = []
    if harmed := [run for run in runs if run.damage]:
        lines = plural(sum(run.damage.count for run in harmed), "line")
        found.append(
            f"{lines} of metrics.jsonl in {plural(len(harmed), 'run')} could not be used, such as in "
            f"{harmed[0].path.name}: {harmed[0].damage.said()}."
        )
    broken = [(run, problem) for run in runs for problem in run.problems if not problem.endswith("is missing")]
    found += [f"{run.path.name}: {problem}." for run, problem in broken[:_SHOWN_PROBLEMS]]
    if len(broken) > _SHOWN_PROBLEMS:
        found.append(f"{len(broken) - _SHOWN_PROBLEMS} more files are damaged; altgrad verify names them.")
    unfinished = Counter(run.row["status"] for run in runs if not run.finished)
    found += [
        f"{n} {'run is' if n == 1 else 'runs are'} {status} and left out of the statistics."
        for status, n in unfinished.items()
    ]
    for setting in settings:
        seeds = Counter(run.seed for run in setting.runs)
        if twice := [seed for seed, n in seeds.items() if n > 1]:
            found.append(
                f"{setting.label}: seed {twice[0]} was run more than once; the later folder counts in its statistics."
            )
    return found
