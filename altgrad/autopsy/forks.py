"""Forks are run once: answers are cached by the hash of their question, logged line by line, and counted on a budget."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from altgrad.autopsy.fork import LOW, TWIN, Fork, Oracle, Outcome, Stop
from altgrad.errors import OptionError
from altgrad.records.files import read_file
from altgrad.records.metrics_log import is_sealed, line_of, seal_holds
from altgrad.records.untrusted import Malformed, parse_line
from altgrad.report.numbers import plural


class BudgetSpent(Exception):
    """The budget does not cover the next fork; the stages turn it into "inconclusive"."""


@dataclass(frozen=True)
class Told:
    """One line of progress. left, left_s: forks and seconds that are still to be expected, from the pace so far."""

    stage: str
    fork: Fork
    outcome: Outcome
    done: int
    budget: int
    left: int
    left_s: float


class Forks:
    """An oracle with a memory.

    Args:
        oracle: who runs forks.
        budget: forks that may be run, those found in the log not counted.
        log: file that answers are appended to and read back from, one JSON object with its checksum a line; the forks of
            lines that are not as they were written are run again, with a warning that counts them. Those of other
            trajectories, such as the run before it was mended, stay there and answer nothing here.
        tell: is called with a `Told` after each fork that was run.

    Raises:
        OptionError: a budget below 1.
    """

    def __init__(
        self, oracle: Oracle, *, budget: int = 120, log: Path | None = None, tell: Callable[[Told], None] | None = None
    ) -> None:
        if budget < 1:
            raise OptionError(f"a budget of {budget} forks runs none; give at least 1")
        self.oracle, self.budget, self.log, self.tell = oracle, budget, log, tell
        self.expected: dict[str, int] = {}  # forks by stage, once they can be told
        self._stage, self._in_stage = "", 0
        self._began = time.monotonic()
        self.run = 0
        self._of = "" if log is None else trajectories_of(oracle)
        self.known: dict[str, Outcome] = read_log(log, self._of)
        self.seconds = sum(outcome.seconds for outcome in self.known.values())
        self._torn = log is not None and log.exists() and not (read_file(log) or b"\n").endswith(b"\n")
        self.found = len(self.known)

    @property
    def stage(self) -> str:
        """The stage that forks are run for."""
        return self._stage

    @stage.setter
    def stage(self, name: str) -> None:
        self._stage, self._in_stage = name, 0

    def __call__(self, fork: Fork, stop: Stop | None = None) -> Outcome:
        """The fork's outcome; with `stop`, only as much of it as decides the question.

        Raises:
            BudgetSpent: it would have to be run, and the budget is spent.
        """
        known = self._known(fork, stop)
        if known is not None:
            return known
        if self.run >= self.budget:
            raise BudgetSpent
        return self._keep(fork, self.oracle.run(fork, stop))

    def all(self, forks: Sequence[Fork], stop: Stop | None = None) -> list[Outcome]:
        """The outcomes of several forks, run side by side where the oracle can (`side_by_side`).

        Each is kept as it ends, so that an interrupted batch is not run again.
        """
        together = getattr(self.oracle, "side_by_side", None)
        missing = [fork for fork in dict.fromkeys(forks) if self._known(fork, stop) is None]
        if together is not None and len(missing) > 1:
            for fork, outcome in together(missing[: self.budget - self.run], stop):
                self._keep(fork, outcome)
        return [self(fork, stop) for fork in forks]

    def ahead(self, forks: Sequence[Fork], stop: Stop | None = None) -> None:
        """Run forks that may be asked for next, as many as the oracle has idle hands for; with one hand, none."""
        hands = getattr(self.oracle, "jobs", 1)
        missing = [fork for fork in dict.fromkeys(forks) if self._known(fork, stop) is None]
        if hands > 1 and len(missing) > 1:
            self.all(missing[: min(hands, self.budget - self.run)], stop)

    def _known(self, fork: Fork, stop: Stop | None) -> Outcome | None:
        known = self.known.get(fork.key)
        if known is not None and known.answers(fork, stop):
            return known
        return self.oracle.recorded(fork)

    def _keep(self, fork: Fork, outcome: Outcome) -> Outcome:
        self.run += 1
        self._in_stage += 1
        self.seconds += outcome.seconds
        self.known[fork.key] = outcome
        if self.log is not None:
            line = line_of({"key": fork.key, "of": self._of, "stage": self.stage, **outcome.as_dict()})
            with self.log.open("ab") as file:
                file.write((b"\n" if self._torn else b"") + line)
            self._torn = False
        if self.tell is not None:
            more = min(left(self.expected, self.stage, self._in_stage), self.budget - self.run)
            pace = (time.monotonic() - self._began) / self.run
            self.tell(Told(self.stage, fork, outcome, self.run, self.budget, more, more * pace))
        return outcome


def left(expected: dict[str, int], stage: str, done: int) -> int:
    """Forks still to be expected in a stage of which `done` were run, and in those after it."""
    stages = list(expected)
    if stage not in stages:
        return sum(expected.values())
    later = stages[stages.index(stage) + 1 :]
    return max(0, expected[stage] - done) + sum(expected[name] for name in later)


def trajectories_of(oracle: Oracle) -> str:
    """What tells the forks of one run from those of another: a hash of both trajectories' losses and of the cells."""
    told = repr([oracle.history(LOW), oracle.history(TWIN), sorted(map(str, oracle.cells))])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def read_log(log: Path | None, of: str | None = None) -> dict[str, Outcome]:
    """The answers that a log holds, by the key of their question; none where there is no log.

    of: `trajectories_of` the oracle whose answers are meant; None: of any. Logs of before this was noted say nothing of it.
    """
    if log is None or not log.exists():
        return {}
    known: dict[str, Outcome] = {}
    lines = read_file(log).splitlines()
    sealed, damaged = any(map(is_sealed, lines)), 0
    for line in lines:
        try:
            if sealed and not (is_sealed(line) and seal_holds(line)):
                raise Malformed("it does not match its checksum")
            record = parse_line(line)
            if of is None or record.get("of", of) == of:
                known[record["key"]] = Outcome.from_dict(record)
        except (ValueError, KeyError, TypeError):
            damaged += line.endswith(b"}")  # else a kill tore it
    if damaged:
        warnings.warn(f"{plural(damaged, 'line')} of {log} could not be read; those forks are run again", stacklevel=2)
    return known
