"""What `init`, `sweep` and `compare --formats` do and print: a study of many runs, from its first file to its report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from altgrad.analysis import write_study
from altgrad.errors import AltGradError, OptionError
from altgrad.formats.catalog import get_format
from altgrad.nn.recipe.named import NAMED
from altgrad.report.console import Terminal, waiting
from altgrad.report.numbers import plural
from altgrad.sweep import (
    Plan,
    SweepOptions,
    SweepResult,
    describe_plan,
    describe_result,
    make_plan,
    matrix_from_mapping,
    plan_sweep,
    run_sweep,
)
from altgrad.sweep.estimate import Estimate, calibrate
from altgrad.training.config.document import literal
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.loading import load_config
from altgrad.training.config.shipped import FIRST_MATRIX, first_config, write_first

STOPPED = 130  # as a shell says of a command that Ctrl-C ended


def sweep(
    matrix: Path,
    overrides: Sequence[str],
    out: Path | None,
    *,
    jobs: int | None,
    dry_run: bool,
    estimate: bool,
    executor: str,
    address: str | None,
    devices: str | None,
    fail_on_collapse: bool,
) -> int:
    """Exit code: 0 all runs are done, 1 some failed (or collapsed, on demand), 130 stopped before the end."""
    slots = None if devices is None else [name.strip() for name in devices.split(",") if name.strip()]
    options = SweepOptions(jobs=jobs, executor=executor, address=address, devices=slots)
    return _study(plan_sweep(matrix, out, overrides), options, dry_run, fail_on_collapse, estimate=estimate)[0]


def compare_formats(
    arguments: Sequence[str],
    formats: str,
    seeds: int,
    device: str | None,
    *,
    jobs: int | None,
    dry_run: bool,
    fail_on_collapse: bool,
) -> int:
    """`altgrad compare CONFIG --formats ...`: every format with the same seeds, and the study's report; codes as `sweep`."""
    files = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a] + ([f"device={device}"] if device else [])
    if len(files) != 1:
        raise OptionError(
            f"--formats compares formats of one config, {len(files)} given: altgrad compare A.yaml --formats ..."
        )
    base = load_config(files[0], overrides)
    chosen = [_of_format(text) for text in _listed(formats)]
    name = f"{base.name}-formats"
    matrix = {"base": literal(base.model_dump(mode="json")), "name": name, "seeds": seeds, "include": chosen}
    out = Path(base.runs_dir) / name
    plan = make_plan(matrix_from_mapping(matrix, origin="compare --formats"), out)
    code, finished = _study(plan, SweepOptions(jobs=jobs), dry_run, fail_on_collapse)
    if finished:
        folders = [run.folder for run in plan.runs]
        with waiting(f"reading {plural(len(folders), 'run')}"):
            target = write_study(folders, out / "report.html")
        Terminal().print(f"report: {target}", highlight=False, soft_wrap=True)
    return code


def write_first_file(file: Path | None, *, matrix: bool) -> None:
    """`altgrad init`: a commented config or matrix."""
    target = file or Path("matrix.yaml" if matrix else "experiment.yaml")
    write_first(FIRST_MATRIX if matrix else first_config(), target)
    then = f"altgrad sweep {target} --dry-run" if matrix else f"altgrad run {target}"
    Terminal().print(f"wrote {target}; then: {then}", highlight=False, soft_wrap=True)


def _listed(formats: str) -> list[str]:
    """The texts between commas that stand in no parentheses.

    Raises:
        OptionError: fewer than two.
    """
    texts = [text.strip() for text in re.split(r",(?![^()]*\))", formats) if text.strip()]
    if len(texts) < 2:
        raise OptionError(f"--formats {formats!r} names {len(texts)}; give two or more, such as FP32,E3M4,E4M3")
    return texts


def _of_format(text: str) -> dict[str, Any]:
    """What a run of this format has in its config: a name keeps the config's rounding and storage, a recipe is whole."""
    try:
        return {"fp8_format": str(get_format(text))}
    except AltGradError:
        if re.fullmatch(r"\w+", text) and text.lower() not in NAMED:
            raise
        return {"formats": text}


def _study(
    plan: Plan, options: SweepOptions, dry_run: bool, fail_on_collapse: bool, *, estimate: bool = True
) -> tuple[int, bool]:
    """(exit code, whether every run is there)."""
    if dry_run:
        describe_plan(plan, options, _calibrated if estimate else None)
        return 0, False
    result = run_sweep(plan, options)
    describe_result(result)
    return _exit_code(result, fail_on_collapse), not (result.count("stopped") or result.count("failed"))


def _calibrated(config: ExperimentConfig) -> Estimate:
    with waiting("timing a few steps of a run"):
        return calibrate(config)


def _exit_code(result: SweepResult, fail_on_collapse: bool) -> int:
    if result.count("stopped"):
        return STOPPED
    collapsed = any((outcome.result or {}).get("status") == "collapsed" for outcome in result.outcomes.values())
    return int(bool(result.count("failed")) or (fail_on_collapse and collapsed))
