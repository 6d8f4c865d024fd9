"""Shows a sweep while it runs: a live table with an ETA on a terminal, one line per event in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from itertools import takewhile

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from altgrad.report.console import BAR, Terminal
from altgrad.report.text import without_middle
from altgrad.sweep.estimate import schedule
from altgrad.sweep.job import Job, Position, position
from altgrad.sweep.local import Event

_LEAST = {"step": 7, "": 16, "loss": 6, "tokens/s": 8, "left": 6}
"""The columns beside a run's name, and how wide they are at least."""
_BESIDE_A_NAME = sum(_LEAST.values()) + 2 * len(_LEAST)


class SweepProgress:
    """An executor's observer. Use as a context manager around the executor's `run`.

    Args:
        jobs: everything that will be run.
        already_done: runs that were finished before.
        slots: runs at a time, for the ETA.
        estimates: seconds per run name, where known; the rest is learned from this sweep's own runs.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        already_done: int = 0,
        slots: int = 1,
        estimates: Mapping[str, float] | None = None,
        console: Console | None = None,
    ) -> None:
        self._console = console or Terminal(markup=True, stderr=True)
        self._jobs = list(jobs)
        self._before = already_done
        self._slots = slots
        self._estimates = dict(estimates or {})
        self._guard = threading.Lock()
        self._running: dict[str, tuple[Job, float, str]] = {}
        self._ended: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        self._crashes = 0
        self._start = _shared_start([job.name for job in self._jobs])
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_interactive else None

    def __enter__(self) -> SweepProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.update(self._view(), refresh=True)
            self._live.stop()

    def __call__(self, event: Event | None) -> None:
        """Take note of an event, or redraw."""
        if event is None:
            if self._live:
                self._live.update(self._view(), refresh=True)
            return
        with self._guard:
            line = self._note(event)
        if line and not self._live:
            self._console.print(line, highlight=False, soft_wrap=True)
        elif line and event.kind in ("crashed", "failed"):
            self._console.print(line, highlight=False)  # stays above the table

    def _note(self, event: Event) -> str | None:
        job, name = event.job, escape(event.job.name)
        if event.kind in ("started", "waiting"):
            self._running[job.name] = (job, time.monotonic(), event.kind)
            what = "starts" if event.kind == "started" else "is being made by another process; waiting for it"
            return f"{name} {what}"
        if event.kind == "crashed":
            self._crashes += 1
            crash = event.crash or {}
            return f"[yellow]{name} crashed at step {crash.get('step')}: {escape(str(crash.get('reason')))}[/yellow]"
        self._running.pop(job.name, None)
        self._ended[job.name] = event.kind
        outcome = event.outcome
        if outcome and event.kind == "done" and not outcome.by_another:
            self._seconds[job.name] = outcome.seconds
        if event.kind == "done":
            how = str((outcome.result or {}).get("status")) if outcome else "done"
            return f"[green]{name} {how}[/green] ({self._headline()})"
        if event.kind == "failed":
            return f"[red]{name} failed[/red]; its output is in {escape(str(job.folder / 'log.txt'))}"
        return None

    def eta_s(self) -> float | None:
        """Seconds until all is done; None while nothing is known about any of it."""
        known = {**self._estimates, **self._seconds}
        usual = sorted(known.values())[len(known) // 2] if known else None
        remaining: list[float] = []
        for job, begun, kind in self._running.values():
            left = _left(job, position(job.folder), time.monotonic() - begun) if kind == "started" else None
            total = known.get(job.name, usual)
            guess = left if left is not None else total
            if guess is None:
                return None
            remaining.append(guess)
        for job in self._jobs:
            if job.name not in self._ended and job.name not in self._running:
                guess = known.get(job.name, usual)
                if guess is None:
                    return None
                remaining.append(guess)
        return schedule(remaining, self._slots)

    def _headline(self) -> str:
        ended = list(self._ended.values())
        facts = [f"{self._before + ended.count('done')} of {self._before + len(self._jobs)} done"]
        if failed := ended.count("failed"):
            facts.append(f"{failed} failed")
        if self._crashes:
            facts.append(f"{self._crashes} crash{'es' if self._crashes > 1 else ''}")
        eta = self.eta_s()
        if eta:
            facts.append(f"{duration(eta)} left")
        return ", ".join(facts)

    def _view(self) -> Group:
        with self._guard:
            of = f"{self._start.rstrip('-')}: " if self._start else ""
            head = Text(f"{of}{self._headline()}", style="bold")
            if not self._running:
                return Group(head)
            table = Table(box=None, pad_edge=False, header_style="dim")
            most, names = self._console.width - _BESIDE_A_NAME, [len(job.name) for job in self._jobs]
            least = {"run": min(most, max(names) - len(self._start)), **_LEAST}  # columns stay where they are
            for column, width in least.items():
                left = column in ("run", "")
                table.add_column(column, justify="left" if left else "right", no_wrap=True, min_width=width)
            for job, begun, kind in self._running.values():
                at = position(job.folder)
                left = _left(job, at, time.monotonic() - begun)
                waits = "" if kind == "started" else " (another process)"
                table.add_row(
                    escape(without_middle(job.name.removeprefix(self._start) + waits, max(16, most))),
                    f"{at.step}/{job.max_steps}",
                    ProgressBar(job.max_steps, at.step, width=16, **BAR),
                    "" if at.loss is None else f"{at.loss:.3f}",
                    "" if at.tokens_per_s is None else f"{at.tokens_per_s:,.0f}",
                    "" if left is None else duration(left),
                )
            return Group(head, table)


def _shared_start(names: Sequence[str]) -> str:
    """What all of several names begin with, up to and with a "-"."""
    if len(names) < 2:
        return ""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(min(names), max(names), strict=False))
    start, dash, _ = "".join(a for a, _ in same).rpartition("-")
    return start + dash


def _left(job: Job, at: Position, running_s: float) -> float | None:
    """Seconds that a running run still needs, from its own speed."""
    if at.step < 2 or not at.elapsed_s:
        return None
    return at.elapsed_s / at.step * max(0, job.max_steps - at.step)


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
