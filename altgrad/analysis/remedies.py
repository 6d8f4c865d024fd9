"""Why a run was damaged, as its autopsy found, and which other run of the same report shows a setting that saves it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altgrad.analysis.comparison import IGNORED_KEYS, flatten
from altgrad.analysis.outcome import Outcome
from altgrad.records.documents import read_json
from altgrad.records.run import Run
from altgrad.report.verdicts import BARELY_LEARNED, BEHIND

SAVES = 0.5
"""A run that closes this part of the gap to FP32 shows what saves another."""
MOST_SETTINGS = 2
"""Runs that differ in more settings than this are two experiments."""


@dataclass(frozen=True)
class Cause:
    """What an autopsy of a run concluded: its sentence and its page."""

    sentence: str
    page: Path


@dataclass(frozen=True)
class Remedy:
    """Another run of the report that shows what saves one: the settings that it changes, and the command that runs them."""

    saved: Outcome
    settings: Mapping[str, Any]
    command: str


def is_damaged(outcome: Outcome) -> bool:
    """Whether it collapsed, fell behind FP32 or barely learned."""
    return outcome.collapsed or outcome.grade in (BEHIND, BARELY_LEARNED)


def damaged(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The damaged of these runs, the worst first; worst of all is one whose loss is NaN or not known."""
    return sorted(filter(is_damaged, outcomes), key=lambda outcome: -_gap(outcome))


def _gap(outcome: Outcome) -> float:
    """Above FP32, inf where it is NaN or not known."""
    return math.inf if outcome.gap is None or math.isnan(outcome.gap) else outcome.gap


def cause_of(run: Run) -> Cause | None:
    """What `altgrad autopsy` wrote into the run's folder; None before there is one."""
    folder = run.path / "autopsy"
    found = read_json(folder / "verdict.json").content
    sentence = found.get("sentence")
    if not (isinstance(sentence, str) and sentence):
        return None
    return Cause(sentence, folder / "autopsy.html")


def remedy_of(outcome: Outcome, outcomes: Sequence[Outcome]) -> Remedy | None:
    """Of the runs of the same format and seed that differ in a setting or two, the one that comes closest to FP32.

    None for a run that is not damaged or not above FP32, and where no such run closes half of the gap.
    """
    gap = _gap(outcome)
    if not is_damaged(outcome) or gap <= 0:
        return None
    found = []
    for other in outcomes:
        same = other.run.format == outcome.run.format and other.run.seed == outcome.run.seed
        if other is outcome or not same or other.collapsed or math.isinf(_gap(other)):
            continue
        settings = _changes(outcome.run, other.run)
        if 1 <= len(settings) <= MOST_SETTINGS and _gap(other) <= (1 - SAVES) * gap:
            found.append((_gap(other), Remedy(other, settings, _command(outcome.run, settings))))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _changes(run: Run, other: Run) -> dict[str, Any]:
    """Settings of `other` that are not the run's."""
    own, its = flatten(run.config), flatten(other.config)
    return {
        key: its.get(key)
        for key in dict.fromkeys([*own, *its])
        if key.split(".")[0] not in IGNORED_KEYS and own.get(key) != its.get(key)
    }


def _command(run: Run, settings: Mapping[str, Any]) -> str:
    given = (f"{key}={'null' if value is None else value}" for key, value in settings.items())
    return shlex.join(["altgrad", "run", str(run.path / "config.yaml"), *given])
