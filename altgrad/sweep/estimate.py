"""How long runs will take, from runs that were measured: finished ones of the same model size, else a short calibration."""

from __future__ import annotations

import heapq
import json
import math
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altgrad.errors import AltGradError, SweepError
from altgrad.formats.catalog import get_format
from altgrad.formats.scalar import FloatFormat
from altgrad.nn.recipe.reformat import reformat
from altgrad.records.documents import read_json
from altgrad.records.metrics_log import METRICS
from altgrad.records.run import Run, finished_result
from altgrad.records.schema import as_number, as_whole
from altgrad.sweep.job import TIMES, Job
from altgrad.sweep.plan import PlannedRun
from altgrad.sweep.worker import Stop, execute
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.formats import recipe_of
from altgrad.training.config.loading import dump_config

CALIBRATION_STEPS, CALIBRATION_LIMIT_S = 16, 120.0
_WARM = 4  # steps before the first that is timed: kernels are compiled in them
_FORWARD_SHARE = 1 / 3  # of a step's time; evaluation is forward only


@dataclass(frozen=True)
class Measurement:
    """A finished run's time: `seconds` for `steps` steps and their evaluations, of a run like `facts`.

    `start_s` is what its process took besides, where a sweep measured that.
    """

    facts: Mapping[str, Any]
    steps: int
    seconds: float
    start_s: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Seconds that a run will take, and what that rests on."""

    seconds: float
    source: str


def measure_finished(folders: Iterable[Path]) -> list[Measurement]:
    """The times of the finished runs among `folders`; others are passed over."""
    found = []
    for folder in folders:
        result = finished_result(folder)
        if not result:
            continue
        config = Run(folder).config
        steps, seconds = as_whole(result.get("steps")), as_number(result.get("wall_s"))
        whole = as_number(read_json(folder / TIMES).content.get("seconds"))
        if config and steps and steps > 0 and seconds and 0 < seconds < math.inf:
            found.append(Measurement(config, steps, seconds, max(0.0, (whole or seconds) - seconds)))
    return found


def estimate_run(config: ExperimentConfig, measured: Sequence[Measurement]) -> Estimate | None:
    """From the measured runs that are most like `config`; None if none has its model size, batch and device."""
    facts = config.model_dump(mode="json")
    same_size = [m for m in measured if _size(m.facts) == _size(facts)]
    alike = [m for m in same_size if _kind(m.facts) == _kind(facts)]
    chosen, what = (alike, "like it") if alike else (same_size, "of its model size")
    if not chosen:
        return None
    per_step = statistics.median(m.seconds / m.steps for m in chosen)
    runs = f"{len(chosen)} finished run{'s' if len(chosen) > 1 else ''}"
    start_s = statistics.median(m.start_s for m in chosen)
    return Estimate(start_s + per_step * config.max_steps, f"{runs} {what}")


def calibrate(config: ExperimentConfig, make_job: Callable[[ExperimentConfig, Path], Job] | None = None) -> Estimate:
    """Time a few steps of this very run in a scratch folder.

    Args:
        make_job: the job that runs a config under a folder; None runs `altgrad run`.

    Raises:
        SweepError: the calibration failed (its last output is quoted), or was not over within 120 s.
    """
    evaluations = config.max_steps // config.evaluation.interval + 2
    steps_worth = config.max_steps + evaluations * config.evaluation.batches * _FORWARD_SHARE
    with tempfile.TemporaryDirectory(prefix="altgrad-calibration-") as scratch:
        short = config.model_copy(
            update={
                "name": "calibration", "runs_dir": scratch, "max_steps": CALIBRATION_STEPS,
                "evaluation": config.evaluation.model_copy(update={"interval": CALIBRATION_STEPS, "batches": 1}),
            }
        )  # fmt: skip
        job = (make_job or _calibration_job)(short, Path(scratch))
        stop = Stop(grace_s=5.0)
        limit = threading.Timer(CALIBRATION_LIMIT_S, stop.requested.set)
        limit.start()
        try:
            outcome = execute(job, stop, retries=0)
        finally:
            limit.cancel()
        ends = [end for path in Path(scratch).rglob(METRICS) for end in _step_ends(Run(path.parent))]
        if len(ends) <= _WARM + 1:
            if outcome.status == "stopped":
                raise SweepError(
                    f"the calibration of {config.name} took no {_WARM + 2} steps in {CALIBRATION_LIMIT_S:g} s; "
                    "look at the plan without times (--no-estimate), or time one run: altgrad run"
                )
            tail = (outcome.crash or {}).get("log_tail") or ["no output"]
            raise SweepError(f"the calibration of {config.name} failed: {tail[-1]}; try the run itself: altgrad run")
    per_step = statistics.median(b - a for a, b in zip(ends[_WARM:], ends[_WARM + 1 :]))
    start_s = max(0.0, outcome.seconds - per_step * CALIBRATION_STEPS)
    return Estimate(start_s + per_step * steps_worth, f"a calibration of {CALIBRATION_STEPS} steps")


def estimate_all(
    runs: Sequence[PlannedRun],
    measured: Sequence[Measurement],
    calibration: Callable[[ExperimentConfig], Estimate] | None = None,
) -> dict[str, Estimate]:
    """Estimate per run name. One calibration (where given) per model size without a measured run; else that is left out."""
    estimates: dict[str, Estimate] = {}
    calibrated: dict[str, tuple[Estimate, int]] = {}
    quantized_first = sorted(runs, key=lambda run: not run.config.quantized)  # the usual case is the one to time
    for run in quantized_first:
        found = estimate_run(run.config, measured)
        if found is None and calibration is not None:
            size = json.dumps(_size(run.config.model_dump(mode="json")))
            if size not in calibrated:
                calibrated[size] = calibration(run.config), run.config.max_steps
            base, steps = calibrated[size]
            found = Estimate(base.seconds * run.config.max_steps / steps, base.source)
        if found:
            estimates[run.name] = found
    return estimates


def schedule(seconds: Iterable[float], slots: int) -> float:
    """Seconds until the last of these runs ends, started in this order whenever one of `slots` is free; 0 for none."""
    ends = [0.0] * slots
    for duration in seconds:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def _calibration_job(config: ExperimentConfig, scratch: Path) -> Job:
    return Job("calibration-job", str(scratch), dump_config(config), config.max_steps)


def _step_ends(run: Run) -> list[float]:
    ends = (as_number(record.get("elapsed_s")) for record in run.records("step"))
    return [end for end in ends if end is not None]


def _size(facts: Mapping[str, Any]) -> Any:
    """What decides the arithmetic of a step: model, batch, device."""
    data = facts.get("data") or {}
    return (
        facts.get("model"),
        data.get("batch_size"),
        data.get("grad_accumulation"),
        str(facts.get("device")).split(":")[0],
    )


def _kind(facts: Mapping[str, Any]) -> Any:
    """What else makes a step of that size dearer or cheaper."""
    optimizer = (facts.get("optimizer") or {}).get("name")
    monitor = (facts.get("monitor") or {}).get("enabled")
    return _formats(facts), optimizer, monitor, facts.get("compile")


def _formats(facts: Mapping[str, Any]) -> Any:
    """The recipe with no format's name in it: formats of one kind cost the same, scaling, rounding and storage do not."""
    try:
        recipe = recipe_of(facts)
    except (AltGradError, TypeError, AttributeError):  # a finished run's config may be damaged, or of another version
        return "unreadable"
    if recipe is None:
        return None
    try:
        return reformat(recipe, _of_its_kind).text
    except AltGradError:  # an option that only the format itself has
        return recipe.text


def _of_its_kind(name: str) -> str:
    """A format that costs as much: the arithmetic depends on the width and on whether there are blocks."""
    fmt = get_format(name)
    return "E4M3" if isinstance(fmt, FloatFormat) and fmt.bits <= 8 else fmt.name
