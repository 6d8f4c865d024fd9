"""A sweep from a matrix file to its finished runs: plan, estimate, execute, sum up. The command line calls this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from altgrad.errors import SweepError
from altgrad.records.machine import MOST_THREADS
from altgrad.report.console import Terminal
from altgrad.report.numbers import plural
from altgrad.sweep.estimate import Estimate, calibrate, estimate_all, measure_finished, schedule
from altgrad.sweep.job import Job, Outcome, State
from altgrad.sweep.local import LocalExecutor, available_cores, cuda_devices, threads_per_run
from altgrad.sweep.matrix import read_matrix
from altgrad.sweep.plan import Plan, PlannedRun, make_plan
from altgrad.sweep.progress import SweepProgress, duration
from altgrad.training.config.experiment import ExperimentConfig

EXECUTORS = ("local", "ray")
_SHOWN = 40  # variants listed one by one in a dry run


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run.

    Args:
        jobs: runs at a time; None: one per device for CUDA runs, else one per two cores.
        executor: "local" or "ray".
        address: of the Ray cluster; None starts one here.
        devices: device slots; None: every GPU of this machine.
        retries: how often a crashed run is started again.
        shared: whether the Ray workers see `out`; None finds out.
    """

    jobs: int | None = None
    executor: str = "local"
    address: str | None = None
    devices: Sequence[str] | None = None
    retries: int = 1
    shared: bool | None = None


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left: its plan and the outcome of every run that was not done before."""

    plan: Plan
    outcomes: Mapping[str, Outcome]

    def count(self, status: str) -> int:
        """How many outcomes are "done", "failed" or "stopped"."""
        return sum(outcome.status == status for outcome in self.outcomes.values())


def plan_sweep(path: str | Path, out: str | Path | None = None, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a matrix file; `out` None is runs/<the file's name>."""
    matrix = read_matrix(path).with_overrides(overrides)
    return make_plan(matrix, out if out is not None else Path("runs") / Path(path).stem)


def run_sweep(
    plan: Plan,
    options: SweepOptions = SweepOptions(),
    console: Console | None = None,
    make_job: Callable[[PlannedRun, int], Job] = lambda run, threads: run.job(threads),
) -> SweepResult:
    """Make every run of `plan` that is not done.

    Args:
        make_job: the job of a run with so many threads.

    Raises:
        SweepError: an unknown executor, no devices for runs that need them, or no cluster at the address.
    """
    missing = plan.missing
    slots = slots_of(plan, options)
    threads = threads_per_run(slots)
    jobs = [make_job(run, threads) for run in missing]
    for folder in {run.folder.parent for run in missing}:
        _make_folder(folder)
    estimates = estimate_all(missing, measure_finished(_history(plan)))
    seconds = {name: estimate.seconds for name, estimate in estimates.items()}
    progress = SweepProgress(
        jobs, already_done=len(plan.runs) - len(missing), slots=slots, estimates=seconds, console=console
    )
    if not jobs:
        return SweepResult(plan, {})
    with progress:
        if options.executor == "local":
            devices = _devices(options) if any(job.gpus for job in jobs) else ()
            outcomes = LocalExecutor(slots, devices, options.retries).run(jobs, progress)
        else:
            from altgrad.sweep.cluster import RayExecutor

            executor = RayExecutor(options.address, options.jobs, options.retries, options.shared)
            outcomes = executor.run(jobs, progress)
    return SweepResult(plan, outcomes)


def slots_of(plan: Plan, options: SweepOptions) -> int:
    """Runs at a time on this machine."""
    if options.executor not in EXECUTORS:
        raise SweepError(f"executor {options.executor!r} is unknown; use one of {', '.join(EXECUTORS)}")
    if options.devices is not None and plan.runs and not any(run.config.device == "cuda" for run in plan.runs):
        raise SweepError(
            f"--devices {','.join(options.devices)} are GPUs, and no run has device=cuda; leave it out, or add device=cuda"
        )
    if options.jobs is not None:
        if not 1 <= options.jobs <= MOST_THREADS:
            raise SweepError(
                f"--jobs {options.jobs}; use 1 to {MOST_THREADS} (this machine has {available_cores()} cores)"
            )
        return options.jobs
    if any(run.config.device == "cuda" for run in plan.missing):
        return max(1, len(_devices(options)))
    return max(1, available_cores() // 2)


def describe_plan(
    plan: Plan,
    options: SweepOptions = SweepOptions(),
    calibration: Callable[[ExperimentConfig], Estimate] | None = calibrate,
    console: Console | None = None,
) -> float | None:
    """Print what the sweep would do and how long it would take; returns the estimate in seconds, None if unknown."""
    screen = console or Terminal(markup=True)
    missing = plan.missing
    slots = slots_of(plan, options)
    estimates = estimate_all(missing, measure_finished(_history(plan)), calibration)
    _print_variants(plan, estimates, screen)
    count = plan.count()
    names = {
        State.DONE: "done", State.MISSING: "to do", State.PARTIAL: "to resume", State.FAILED: "failed before",
        State.BUSY: "running in another process",
    }  # fmt: skip
    states = ", ".join(f"{count[state]} {text}" for state, text in names.items() if count[state])
    screen.print(
        f"{plural(len(plan.runs), 'run')} in {escape(str(plan.runs[0].folder.parent))}: {states}",
        highlight=False,
        soft_wrap=True,
    )
    if not missing:
        screen.print("nothing to do")
        return 0.0
    if len(estimates) < len(missing):
        screen.print(
            f"no estimate: no finished run has the model size of {len(missing) - len(estimates)} of them",
            highlight=False,
        )
        return None
    total = schedule((estimates[run.name].seconds for run in missing), slots)
    sources = Counter(estimate.source for estimate in estimates.values())
    screen.print(
        f"about {duration(total)} with {slots} run{'s' if slots > 1 else ''} at a time "
        f"({threads_per_run(slots)} threads each), by {sources.most_common(1)[0][0]}",
        highlight=False,
    )
    return total


def describe_result(result: SweepResult, console: Console | None = None) -> None:
    """Print how the runs ended: collapses are results, failures are listed with their reason."""
    screen = console or Terminal(markup=True)
    out = result.plan.runs[0].folder.parent
    before = len(result.plan.runs) - len(result.outcomes)
    ended = Counter(str(o.result.get("status")) for o in result.outcomes.values() if o.status == "done" and o.result)
    facts = [f"{before} done before"] if before else []
    facts += [f"{number} {status}" for status, number in ended.items()]
    facts += [f"{result.count(status)} {status}" for status in ("failed", "stopped") if result.count(status)]
    screen.print(f"{plural(len(result.plan.runs), 'run')}: {', '.join(facts)}", highlight=False)
    for name, outcome in result.outcomes.items():
        if outcome.status == "failed":
            reason = escape(str((outcome.crash or {}).get("reason")))
            screen.print(
                f"  [red]{escape(name)}[/red]: {reason}; see {escape(str(out / name / 'log.txt'))}", soft_wrap=True
            )
    if result.count("stopped"):
        screen.print("the same command goes on where this one stopped", highlight=False)
    elif result.count("failed"):
        screen.print("the same command tries the failed runs again", highlight=False)
    screen.print(f"altgrad report {escape(str(out))}", highlight=False, soft_wrap=True)


def _print_variants(plan: Plan, estimates: Mapping[str, Estimate], console: Console) -> None:
    variants: dict[str, list[PlannedRun]] = {}
    for run in plan.runs:
        variants.setdefault(run.config.name, []).append(run)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("variant", "seeds", "done", "each"):
        table.add_column(column, justify="right" if column in ("done", "each") else "left", overflow="fold")
    for name, runs in list(variants.items())[:_SHOWN]:
        done = sum(run.state is State.DONE for run in runs)
        known = [estimates[run.name].seconds for run in runs if run.name in estimates]
        seeds = ", ".join(str(run.config.seed) for run in runs)
        each = duration(sum(known) / len(known)) if known else ""
        table.add_row(escape(name), seeds, f"{done}/{len(runs)}", each)
    console.print(table)
    if len(variants) > _SHOWN:
        console.print(f"... and {len(variants) - _SHOWN} more variants")


def _history(plan: Plan) -> list[Path]:
    """Folders whose times say something: this sweep's own runs, and runs beside them and beside their folder."""
    out = plan.runs[0].folder.parent
    own = {run.folder for run in plan.runs if run.state is State.DONE}
    beside = [path for root in (out, out.parent) if root.is_dir() for path in root.iterdir() if path.is_dir()]
    return sorted(own) + [path for path in sorted(beside)[:500] if path not in own]


def _make_folder(folder: Path) -> None:
    """Of the runs, before any of them is started."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(
            f"no folder {folder} can be made for the runs: {error.strerror or error}; choose another with --out"
        ) from None


def _devices(options: SweepOptions) -> Sequence[str]:
    return options.devices if options.devices is not None else cuda_devices()
