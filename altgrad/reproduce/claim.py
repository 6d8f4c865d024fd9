"""What a published claim is here: its source and statement, how it is tried, and what would count, written before the run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from altgrad.quantization import NUMERICS_VERSION

Facts = Mapping[str, Any]
Values = Mapping[str, float]
TUNING_SEEDS = (1001,)
"""Seeds that learning rates are tuned on; they never count."""
MOST_SEEDS = 1000
"""That may be asked for, all below the seeds of tuning; a power analysis that asks for more says so."""


def only(arms: Mapping[str, Values]) -> Values:
    """The values of a protocol with one arm are its quantities."""
    (values,) = arms.values()
    return values


@dataclass(frozen=True)
class Protocol:
    """How a claim is tried: every arm with every seed, so that what is compared is paired.

    Args:
        says: what is done, in sentences that a reader can repeat by other means.
        measure: (an arm's facts, seed, quick) -> named values; deterministic in them. `quick` does a small part, to show
            that it runs.
        arms: name -> facts; data only (numbers, texts, lists). An arm with several "rates" gets its "lr" from the one
            with the least `tuned_by` over `TUNING_SEEDS`.
        quantities: (name of an arm -> its values) of one seed -> what criteria speak of.
        seeds: how many, from 0 on, unless asked otherwise.
        version: raised when `measure` changes what it does; trials of other versions are made anew.
        before: what arms that got another name were called; records under the old names stay valid.
    """

    says: str
    measure: Callable[[Facts, int, bool], Values]
    arms: Mapping[str, Facts] = field(default_factory=lambda: {"all": {}})
    quantities: Callable[[Mapping[str, Values]], Values] = only
    seeds: int = 5
    tuned_by: str = ""
    version: int = 1
    before: Mapping[str, str] = field(default_factory=dict)

    @property
    def digested(self) -> Mapping[str, Facts]:
        """The arms by the names that records are known by."""
        return {self.before.get(arm, arm): facts for arm, facts in self.arms.items()}

    def arm_of(self, recorded: str) -> str:
        """What an arm of a record is called today."""
        return next((arm for arm, once in self.before.items() if once == recorded), recorded)


@dataclass(frozen=True)
class Criterion:
    """A quantity, and the bounds that its mean over seeds must lie between; without bounds it is only told.

    Args:
        quantity: a name that the protocol's `quantities` gives.
        says: what it is, with its unit.
    """

    quantity: str
    says: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def decides(self) -> bool:
        """Whether the verdict rests on it."""
        return self.low > -math.inf or self.high < math.inf


@dataclass(frozen=True)
class Claim:
    """One published claim.

    Args:
        name: what the command calls it.
        number: its row in the list of claims; several rows may try parts of one.
        paper: arXiv number, or where else it stands.
        statement: what is claimed, in a sentence of our own.
        criteria: from before the run.
        minutes: on two cores, two trials at a time: an estimate, in whose place a whole record has the measured ones.
        secondary: figures of the statement are from a reading of the paper by others.
        watch: what a reader should know of the protocol's limits.
        protocol: None: it cannot be tried at this size and stays unresolved; `needs` says what it would take.
    """

    name: str
    number: str
    paper: str
    statement: str
    criteria: tuple[Criterion, ...]
    minutes: float
    protocol: Protocol | None
    secondary: bool = False
    watch: str = ""
    needs: str = ""

    @property
    def url(self) -> str:
        """Where the paper is; empty for other sources."""
        first = self.paper.split(",")[0].split(" ")[0]
        return f"https://arxiv.org/abs/{first}" if first[:4].isdigit() and "." in first else ""

    def protocol_digest(self, quick: bool) -> str:
        """Changes with what is done: trials of another digest do not count."""
        assert self.protocol is not None
        facts = [
            self.name,
            self.protocol.digested,
            self.protocol.tuned_by,
            self.protocol.version,
            NUMERICS_VERSION,
            quick,
        ]
        return _digest(facts)

    @property
    def criteria_digest(self) -> str:
        """Changes with what would count: a record says when its first trial was made under another."""
        return _digest([[c.quantity, c.low, c.high] for c in self.criteria if c.decides])


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
