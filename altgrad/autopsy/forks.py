"""Forks are run once: answers are cached by the hash of their question, logged line by line, and counted on a budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from altgrad.autopsy.fork import Fork, Oracle, Outcome
from altgrad.errors import OptionError


class BudgetSpent(Exception):
    """The budget does not cover the next fork; the stages turn it into "inconclusive"."""


@dataclass(frozen=True)
class Told:
    """One line of progress."""

    stage: str
    fork: Fork
    outcome: Outcome
    done: int
    budget: int


class Forks:
    """An oracle with a memory.

    Args:
        oracle: who runs forks.
        budget: forks that may be run, those found in the log not counted.
        log: file that answers are appended to and read back from, one JSON object a line; a torn last line is dropped.
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
        self.stage = ""
        self.run = 0
        self.seconds = 0.0
        self.known: dict[str, Outcome] = read_log(log)
        self._torn = log is not None and log.exists() and log.stat().st_size > 0 and log.read_bytes()[-1:] != b"\n"
        self.found = len(self.known)

    def __call__(self, fork: Fork) -> Outcome:
        """The fork's outcome.

        Raises:
            BudgetSpent: it would have to be run, and the budget is spent.
        """
        known = self.known.get(fork.key)
        if known is not None:
            return known
        if self.run >= self.budget:
            raise BudgetSpent
        outcome = self.oracle.run(fork)
        self.run += 1
        self.seconds += outcome.seconds
        self.known[fork.key] = outcome
        if self.log is not None:
            line = json.dumps({"key": fork.key, "stage": self.stage, **outcome.as_dict()})
            with self.log.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._torn else "") + line + "\n")
            self._torn = False
        if self.tell is not None:
            self.tell(Told(self.stage, fork, outcome, self.run, self.budget))
        return outcome

    def all(self, forks: Sequence[Fork]) -> list[Outcome]:
        """The outcomes of several forks, side by side where the oracle can (`prepare`)."""
        prepare = getattr(self.oracle, "prepare", None)
        if prepare is not None:
            missing = [f for f in dict.fromkeys(forks) if f.key not in self.known]
            prepare(missing[: self.budget - self.run])
        return [self(fork) for fork in forks]


def read_log(log: Path | None) -> dict[str, Outcome]:
    """The answers that a log holds, by the key of their question; none where there is no log."""
    if log is None or not log.exists():
        return {}
    known = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            known[record["key"]] = Outcome.from_dict(record)
        except (ValueError, KeyError, TypeError):
            continue  # a torn line: that fork is run again
    return known
