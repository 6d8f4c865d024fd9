"""What `autopsy` and `replay` print: the plan with its cost, progress, the verdict in words, and where the page is."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console

from altgrad.autopsy.folder import threads_of
from altgrad.autopsy.forks import Told
from altgrad.autopsy.run import autopsy as run_autopsy
from altgrad.autopsy.run import fork_run, plan
from altgrad.autopsy.verdict import CAUSE, INCONCLUSIVE, Verdict
from altgrad.autopsy.workers import check_jobs
from altgrad.cli.usage import at_least
from altgrad.errors import ConfigError
from altgrad.report.console import Bars, Terminal, ruled_table, waiting
from altgrad.report.numbers import duration, plural
from altgrad.report.pages.autopsy import share_text


@dataclass(frozen=True)
class Places:
    """Where forks run: `jobs` at a time, in processes of this machine or as tasks of a Ray cluster.

    Raises:
        OptionError: no possible number of jobs. ConfigError: another executor, or an address for processes of this machine.
    """

    jobs: int | None = None
    executor: str = "local"
    address: str | None = None

    def __post_init__(self) -> None:
        if self.executor not in ("local", "ray"):
            raise ConfigError(f"executor {self.executor!r} is unknown; use one of local, ray")
        if self.jobs is not None:
            check_jobs(self.jobs)
        if self.address is not None and self.executor != "ray":
            raise ConfigError(f"--address {self.address} needs --executor ray")

    @contextmanager
    def open(self, run_dir: Path) -> Iterator[tuple[int, Any]]:
        """(forks at a time, executor; None where the autopsy makes its own)."""
        if self.executor == "local":
            yield self.jobs or 1, None
            return
        from altgrad.sweep.cluster import ray_calls

        with ray_calls(self.address, threads=threads_of(run_dir), jobs=self.jobs) as calls:
            yield calls.places, calls


def autopsy(run_dir: Path, budget: int, twin: Path | None, places: Places, *, dry_run: bool) -> int:
    """`altgrad autopsy`: exit code 0 for any verdict, 3 where it is inconclusive."""
    at_least("--budget", budget, 1)
    console = Terminal()
    with places.open(run_dir) as (jobs, executor):
        with waiting("timing a few steps"):
            planned = plan(run_dir, budget, twin=twin, jobs=jobs)
        console.say(f"{planned}")
        if dry_run:
            return 0
        verdict = followed(console, run_dir, budget=budget, twin=twin, jobs=jobs, executor=executor)
    _print(console, verdict)
    console.print(f"page: {run_dir / 'autopsy' / 'autopsy.html'}", highlight=False, soft_wrap=True)
    return 3 if verdict.kind == INCONCLUSIVE else 0


class TimeIsUp(Exception):
    """An autopsy was not through when it had to end; the same autopsy goes on from its forks."""


def followed(console: Console, run_dir: Path, *, until: float = math.inf, **options: Any) -> Verdict:
    """The autopsy, with its progress on the console.

    Raises:
        TimeIsUp: it is not through at `until`, a time of `time.monotonic`.
    """
    with Bars(console) as moved:

        def told(one: Told) -> None:
            if time.monotonic() > until:
                raise TimeIsUp
            moved(f"forks: {one.stage}", one.done, one.done + one.left, f", {duration(one.left_s)} left")

        return run_autopsy(run_dir, tell=moved, told=told, **options)


def _print(console: Terminal, verdict: Verdict) -> None:
    console.print()
    console.say(verdict.sentence)
    facts = [f"level: {verdict.level}" if verdict.level else "", f"{verdict.forks} forks", duration(verdict.seconds)]
    if verdict.kind == CAUSE:
        sure = "not calibrated" if verdict.confidence is None else f"{verdict.confidence:.0%}"
        facts.append(f"confidence: {sure}")
    if verdict.onset is not None:
        facts.append(f"onset: step {verdict.onset}")
    if verdict.acts_from is not None:
        facts.append(f"at work since step {verdict.acts_from}")
    if verdict.no_return is not None:
        facts.append(f"no return after step {verdict.no_return}")
    console.say(" · ".join(fact for fact in facts if fact))
    made = [one for one in verdict.interventions if one.closed is not None]
    if made:
        table = ruled_table()
        for head in ("on the cells found", "gap closed", "bits it adds a value"):
            table.add_column(head, justify="left" if head.startswith("on") else "right")
        for one in sorted(made, key=lambda one: -one.closed.value):  # type: ignore[union-attr]
            table.add_row(one.says, share_text(vars(one.closed)), f"{one.cost_bits:g}" if one.cost_bits else "none")
        console.print(table)


def replay(run_dir: Path, step: int, steps: int, patterns: list[str]) -> None:
    """`altgrad replay`: losses of the fork beside the run's own."""
    at_least("--step", step, 0)
    at_least("--steps", steps, 1)
    console = Terminal()

    def chosen(cells: list) -> frozenset:
        found = frozenset(c for c in cells for p in patterns if fnmatchcase(str(c), p))
        for pattern in patterns:
            if not any(fnmatchcase(str(cell), pattern) for cell in cells):
                known = ", ".join(map(str, cells[:6]))
                raise ConfigError(
                    f"no cell of this run is named {pattern!r}; its cells are {known}, ... ({len(cells)})"
                )
        return found

    with waiting("replaying"):
        start, own, forked, rescued = fork_run(run_dir, step, steps, chosen)
    console.say(
        f"from the state after step {start}, {plural(len(rescued), 'cell')} in float32"
        + (f": {', '.join(sorted(map(str, rescued))[:4])}" if rescued else "")
    )
    table = ruled_table()
    for head in ("step", "run", "fork", "difference"):
        table.add_column(head, justify="right")
    for i, loss in enumerate(forked):
        was = own[start + i] if start + i < len(own) else None
        difference = "" if was is None else f"{loss - was:+.4f}"
        table.add_row(str(start + i + 1), "" if was is None else f"{was:.4f}", f"{loss:.4f}", difference)
    console.print(table)
