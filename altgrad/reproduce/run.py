"""Makes a claim's trials, one after another or side by side, and keeps each as it ends, so that the same command goes on.

A record is one document, `<out>/<name>/record.json` (`<name>-quick` for quick ones), or the same inside a pack. Its verdict
is computed from the trials whenever it is asked for.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from altgrad.errors import OptionError, ReportError
from altgrad.records.documents import read_json, sealed
from altgrad.records.files import write_bytes
from altgrad.records.lock import RunLock
from altgrad.records.machine import MOST_THREADS, circumstances
from altgrad.records.schema import as_number
from altgrad.reproduce.claim import MOST_SEEDS, TUNING_SEEDS, Claim, Facts, Protocol
from altgrad.reproduce.rows import find_claim
from altgrad.reproduce.verdict import Verdict, judge

RECORD = "record.json"
QUICK = "-quick"  # after a claim's name, of quick trials
QUICK_SEEDS = 2
CORES = 2  # that minutes are told for
_PACKAGE = Path(__file__).parents[1]
_PACK = Path("experiments", "results", "claims.tar.xz")
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trial:
    """One arm with one seed: named values, and the processor seconds that they took."""

    arm: str
    seed: int
    values: Mapping[str, float]
    seconds: float
    rate: float | None = None
    """The learning rate, where the arm is tried at several."""


@dataclass(frozen=True)
class Record:
    """What is known of a claim.

    Args:
        criteria: digest of the criteria as they stood when the first trial was made.
        environment: where the first trial was made.
    """

    claim: Claim
    quick: bool = False
    trials: Sequence[Trial] = ()
    criteria: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def moved(self) -> bool:
        """Whether the criteria are others than before the run."""
        return bool(self.trials) and self.criteria != self.claim.criteria_digest

    @property
    def seconds(self) -> float:
        """Of the processor, all trials together."""
        return sum(trial.seconds for trial in self.trials)

    @property
    def measured(self) -> bool:
        """Whether all the seeds that the protocol asks for are there, so that its cost is known."""
        return self.claim.protocol is not None and len(self.by_seed) >= self.claim.protocol.seeds

    @property
    def minutes(self) -> float:
        """On two cores, two trials at a time: half of the processor's time where it was measured, else the estimate."""
        return self.seconds / 60 / CORES if self.measured else self.claim.minutes

    @cached_property
    def rates(self) -> Mapping[str, float]:
        """The learning rate that each tuned arm goes on with; an arm without all of its tuning trials is left out."""
        protocol = self.claim.protocol
        found: dict[str, float] = {}
        if protocol is None:
            return found
        for arm, facts in protocol.arms.items():
            if "rates" not in facts:
                continue
            tried: dict[float, list[float]] = {}
            for trial in self.trials:
                if trial.arm == arm and trial.seed in TUNING_SEEDS and trial.rate is not None:
                    tried.setdefault(trial.rate, []).append(trial.values[protocol.tuned_by])
            if all(len(tried.get(rate, ())) == len(TUNING_SEEDS) for rate in facts["rates"]):
                found[arm] = min(facts["rates"], key=lambda rate: sum(tried[rate]))
        return found

    @cached_property
    def by_seed(self) -> Mapping[int, Mapping[str, float]]:
        """Quantities of each seed that has all arms."""
        protocol = self.claim.protocol
        if protocol is None:
            return {}
        arms: dict[int, dict[str, Mapping[str, float]]] = {}
        for trial in self.trials:
            if trial.seed not in TUNING_SEEDS and trial.rate == self.rates.get(trial.arm):
                arms.setdefault(trial.seed, {})[trial.arm] = trial.values
        whole = {seed: found for seed, found in sorted(arms.items()) if len(found) == len(protocol.arms)}
        return {seed: dict(protocol.quantities(found)) for seed, found in whole.items()}

    @cached_property
    def verdict(self) -> Verdict:
        """By the criteria of today."""
        return judge(self.claim, self.by_seed, self.quick)


def reproduce(
    claim: Claim,
    out: str | Path = "runs/claims",
    *,
    seeds: int | None = None,
    jobs: int = 1,
    quick: bool = False,
    tell: Tell = lambda what, done, of: None,
) -> Record:
    """Make the trials that are missing, and return the whole record; its verdict is `record.verdict`.

    Args:
        out: folder of records; an interrupted claim goes on there, a finished one is read.
        seeds: how many, from 0 on; None: as many as the protocol says. Seeds that are there stay.
        jobs: trials at a time, each on one thread.
        quick: a small part of every trial, with two seeds, to see that it runs. It proves nothing.
        tell: is called with (stage, done, of).

    Raises:
        OptionError: the claim cannot be tried here, or seeds or jobs are none or too many.
        ReportError: the record there is damaged. RunBusyError: another process is at it.
    """
    protocol = claim.protocol
    if protocol is None:
        raise OptionError(f"{claim.name} cannot be tried here: {claim.needs}")
    if seeds is not None and not 1 <= seeds <= MOST_SEEDS:
        raise OptionError(f"{seeds} seeds are none, or too many; use 1 to {MOST_SEEDS}")
    if not 1 <= jobs <= MOST_THREADS:
        raise OptionError(f"{jobs} trials at a time are none, or too many; use 1 to {MOST_THREADS}")
    count = seeds if seeds is not None else QUICK_SEEDS if quick else protocol.seeds
    folder = Path(out) / f"{claim.name}{QUICK if quick else ''}"
    if Path(out).exists() and not Path(out).is_dir():
        raise OptionError(f"{out} is a file; choose a folder for the records with --out")
    with RunLock.acquire(folder, "give another folder with --out"):
        record = read_record(claim, folder, quick=quick)
        for stage in ("tuning", "trials"):
            record = _make(record, list(_missing(record, stage, count)), folder, jobs, stage, tell)
    return record


@dataclass(frozen=True)
class _Task:
    arm: str
    seed: int
    rate: float | None
    quick: bool


def _missing(record: Record, stage: str, count: int) -> Iterator[_Task]:
    """What is to be tried in a stage, all arms of the first seed first."""
    claim = record.claim
    assert claim.protocol is not None
    made = {(trial.arm, trial.seed, trial.rate) for trial in record.trials}
    for seed in TUNING_SEEDS if stage == "tuning" else range(count):
        for arm, facts in claim.protocol.arms.items():
            rates: Iterable[float | None] = [record.rates.get(arm)]
            if stage == "tuning":
                rates = facts.get("rates", ())
            for rate in rates:
                if (arm, seed, rate) not in made:
                    yield _Task(arm, seed, rate, record.quick)


def _make(record: Record, tasks: list[_Task], folder: Path, jobs: int, stage: str, tell: Tell) -> Record:
    made = sum((trial.seed in TUNING_SEEDS) == (stage == "tuning") for trial in record.trials)
    for done, trial in enumerate(_trials(record.claim, tasks, min(jobs, len(tasks))), made + 1):
        if not record.trials:
            environment = circumstances(torch.device("cpu"), 1)
            record = Record(record.claim, record.quick, (), record.claim.criteria_digest, environment)
        record = Record(record.claim, record.quick, [*record.trials, trial], record.criteria, record.environment)
        write_bytes(folder / RECORD, document_bytes(record))
        tell(f"{record.claim.name}: {stage}", done, made + len(tasks))
    return record


def _trials(claim: Claim, tasks: Sequence[_Task], jobs: int) -> Iterator[Trial]:
    if jobs <= 1:
        yield from (_answer(claim, task) for task in tasks)
        return
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(_answer_by_name, claim.name, task) for task in tasks]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _answer_by_name(name: str, task: _Task) -> Trial:
    """In a process of its own, to which functions of a row cannot be sent."""
    return _answer(find_claim(name), task)


def _answer(claim: Claim, task: _Task) -> Trial:
    """Measure one arm with one seed on one thread: sums then have one order on every machine."""
    protocol = claim.protocol
    assert protocol is not None
    facts: Facts = protocol.arms[task.arm]
    if task.rate is not None:
        facts = {**{key: value for key, value in facts.items() if key != "rates"}, "lr": task.rate}
    before, begun = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)
    try:
        values = {name: float(value) for name, value in protocol.measure(facts, task.seed, task.quick).items()}
    finally:
        torch.set_num_threads(before)
    return Trial(task.arm, task.seed, values, time.process_time() - begun, task.rate)


def document_of(record: Record) -> dict[str, Any]:
    """The record as data."""
    trials = [
        {"arm": t.arm, "seed": t.seed, "rate": t.rate, "seconds": round(t.seconds, 3), "values": dict(t.values)}
        for t in record.trials
    ]
    return {
        "claim": record.claim.name,
        "quick": record.quick,
        "protocol": record.claim.protocol_digest(record.quick),
        "criteria": record.criteria,
        "environment": dict(record.environment),
        "trials": trials,
    }


def document_bytes(record: Record) -> bytes:
    """The file of a record."""
    return (json.dumps(sealed(document_of(record)), indent=2, allow_nan=False) + "\n").encode()


def read_record(claim: Claim, folder: Path, *, quick: bool = False) -> Record:
    """The record in a folder, or inside a pack; one of another protocol, or none, is a record without trials.

    Raises:
        ReportError: it is damaged.
    """
    document = read_json(folder / RECORD)
    content, problem = document.content, document.problem
    if problem is None and content and claim.protocol is not None:
        if content.get("protocol") != claim.protocol_digest(quick):
            return Record(claim, quick)
        try:
            trials = [_trial(entry, claim.protocol) for entry in content["trials"]]
            return Record(claim, quick, trials, str(content["criteria"]), dict(content["environment"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            problem = "its trials are not what a claim writes"
    if problem is not None:
        raise ReportError(f"{folder / RECORD} is damaged ({problem}); delete it and run the same command again")
    return Record(claim, quick)


def _trial(entry: Mapping[str, Any], protocol: Protocol) -> Trial:
    values = {str(name): as_number(value) for name, value in entry["values"].items()}
    seconds, rate = as_number(entry["seconds"]), entry["rate"]
    if seconds is None or type(entry["seed"]) is not int or any(value is None for value in values.values()):
        raise ValueError("no number")
    arm = protocol.arm_of(str(entry["arm"]))
    return Trial(arm, entry["seed"], values, seconds, None if rate is None else float(rate))  # type: ignore[arg-type]


def committed_records() -> Path | None:
    """The pack of records that comes with AltGrad; None where it is not there."""
    places = (_PACKAGE / _PACK, _PACKAGE.parent / _PACK)
    return next((place for place in places if place.is_file()), None)


def last_record(claim: Claim, out: str | Path) -> Record:
    """The record of one's own in `out`, else the committed one; without trials where there is neither."""
    record = read_record(claim, Path(out) / claim.name)
    pack = committed_records()
    if record.trials or pack is None:
        return record
    return read_record(claim, pack / claim.name)
