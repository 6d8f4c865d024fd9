"""What `demo` does and prints: six runs, the arm that saves the worst, autopsies while the time lasts, and the story."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from altgrad.analysis.comparison import twins
from altgrad.analysis.outcome import Outcome, label_runs
from altgrad.analysis.remedies import cause_of, damaged, is_damaged, remedy_of
from altgrad.cli.run_pages import print_comparison, run_all, terminal
from altgrad.cli.usage import at_least
from altgrad.errors import AltGradError
from altgrad.records.documents import load_result
from altgrad.records.lock import is_locked
from altgrad.records.run import read_run
from altgrad.records.schema import ExperimentResult
from altgrad.report.console import Terminal, waiting
from altgrad.report.numbers import difference, duration
from altgrad.sweep import Plan, PlannedRun, SweepOptions, run_sweep
from altgrad.sweep.job import state_of
from altgrad.sweep.local import available_cores
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.run.demo import demo_configs, saving_arm
from altgrad.training.run.folder import plan_run

LONG = 5.0
"""Seconds of a run from which processes side by side are worth their start."""
MOST_JOBS = 4
"""Forks of an autopsy at a time."""


def demo(runs_dir: str, steps: int | None, device: str, minutes: float) -> list[ExperimentResult]:
    """`altgrad demo`: the baseline and five formats, what saves the worst of them, causes, the table and the report.

    Args:
        minutes: that all of it may take; autopsies are made while they last.
    """
    at_least("--minutes", minutes, 0)
    ends = time.monotonic() + 60 * minutes
    console = terminal()
    configs = demo_configs(runs_dir, steps, device)
    results = run_all(console, configs[:1])
    if results[0].finished:
        jobs = min(len(configs) - 1, available_cores()) if device == "cpu" and results[0].wall_s > LONG else 1
        results += _formats(console, configs[1:], (configs[0], results[0].run_dir), jobs)
    if all(result.finished for result in results):
        worst = damaged(label_runs([read_run(r.run_dir) for r in results]))[:1]
        arms = [
            saving_arm(c) for c, r in zip(configs, results, strict=True) if worst and r.run_dir == worst[0].run.path
        ]
        results += run_all(console, arms, made=[(configs[0], results[0].run_dir)])
    if all(result.finished for result in results):
        _explain(console, damaged(label_runs([read_run(r.run_dir) for r in results])), ends)
    print_comparison(console, results, Path(runs_dir) / "report.html", reasons=False)
    if not console.quiet and all(result.finished for result in results):
        _print_story(console, label_runs([read_run(r.run_dir) for r in results]))
    return results


def _formats(
    console: Terminal, configs: Sequence[ExperimentConfig], twin: tuple[ExperimentConfig, Path], jobs: int
) -> list[ExperimentResult]:
    """The runs of the formats, `jobs` at a time: none has work for more than one core."""
    if jobs > 1:
        folders = [plan_run(config).path for config in configs]
        planned = [PlannedRun(c, {}, f, state_of(f, is_locked(f))) for c, f in zip(configs, folders, strict=True)]
        command = (sys.executable, "-m", "altgrad", "run", "{config}", "--twin", str(twin[1]))
        made = run_sweep(
            Plan(planned), SweepOptions(jobs=jobs), make_job=lambda run, _: replace(run.job(), command=command)
        )
        if made.count("stopped"):
            return [found for found in map(load_result, folders) if found is not None]
    return run_all(console, configs, made=[twin])  # looks up what is made; what failed says why


def _explain(console: Terminal, runs: Sequence[Outcome], ends: float) -> None:
    """Make the autopsies that fit into the time that is left, of the worst run first."""
    from altgrad.autopsy.run import plan
    from altgrad.cli.autopsy_pages import TimeIsUp, followed

    jobs = min(MOST_JOBS, available_cores())
    for outcome in runs:
        left = ends - time.monotonic()
        if cause_of(outcome.run) is not None or left < 10:
            continue
        try:
            with waiting(f"timing an autopsy of {outcome.label}"):
                planned = plan(outcome.run.path, jobs=jobs)
            left = ends - time.monotonic()
            if planned.seconds > left:
                said = f"takes {duration(planned.seconds)}, {duration(max(0.0, left))} are left"
                console.say(f"autopsy of {outcome.label}: {said}")
                return
            console.say(f"autopsy of {outcome.label}: about {duration(planned.seconds)}")
            followed(console, outcome.run.path, until=ends, jobs=jobs)
        except TimeIsUp:
            console.print(
                f"the time is up; this goes on: altgrad autopsy {outcome.run.path}", highlight=False, soft_wrap=True
            )
            return
        except AltGradError as error:  # what it cannot explain it still shows
            console.say(f"autopsy of {outcome.label}: {error}")


def _print_story(console: Terminal, outcomes: Sequence[Outcome]) -> None:
    """Per damaged run what it did, why (or what finds it), what saves it, and where its failure report is."""
    same = twins(outcomes)
    for outcome in filter(is_damaged, outcomes):
        run, cause, remedy = outcome.run, cause_of(outcome.run), remedy_of(outcome, outcomes)
        away = "" if outcome.gap is None else f" ({difference(outcome.gap)} nats)"
        console.say(f"\n{outcome.label}{away}", "bold")
        if outcome.label in same:
            console.say(
                f"  as {same[outcome.label]}: the same training loss at every recorded step, to the last bit", hang=8
            )
            continue
        reasons = [str(said["reason"]) for said in (run.verdict, *run.remarks) if said and said.get("reason")]
        for reason in reasons[:1]:
            console.say(f"  what    {reason}", hang=8)
        if cause:
            console.say(f"  why     {cause.sentence}", hang=8)
        else:
            _print_line(console, "why?", f"altgrad autopsy {run.path}")
        if remedy is not None:
            _print_line(console, "saved", f"{difference(remedy.saved.gap)} nats: {remedy.command}")
        for page in run.failure_reports[:1]:
            _print_line(console, "report", str(page))


def _print_line(console: Terminal, what: str, said: str) -> None:
    """A command or a path, which is copied in one piece."""
    console.print(f"  {what:8}{said}", highlight=False, soft_wrap=True)
