"""What an autopsy concludes, as one value: the cause, the evidence for and against it, and what it could not decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from altgrad.autopsy.damage import Share
from altgrad.report.numbers import listing, plural

CAUSE = "cause"
NOT_PRECISION = "not precision"
NO_DAMAGE = "no damage in the window"
INCONCLUSIVE = "inconclusive"
REFUSED = "refused"

LEVELS = ("phenomenon", "bound", "boundary", "cause", "repair")
"""How far an autopsy came: damage shown; onset bounded; roles told apart; cells confirmed; an intervention that saves."""


@dataclass(frozen=True)
class Effect:
    """What one set of cells does: the share of the gap that rescuing it closes, and the damage that it does alone."""

    cells: tuple[str, ...]
    rescue: Share | None = None
    alone: Share | None = None
    p: float | None = None  # Holm-corrected, of no effect at all


@dataclass(frozen=True)
class Intervention:
    """A change of the formats of the cells found, and the share of the gap that it closes."""

    name: str
    says: str
    closed: Share | None
    cost_bits: float | None = None  # bits per value that it adds on the cells it alters
    refused: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The conclusion of an autopsy.

    kind: `CAUSE`, `NOT_PRECISION`, `NO_DAMAGE`, `INCONCLUSIVE` or `REFUSED`. sentence: the same in one sentence.
    cells: the cause, as texts of cells; empty for the other kinds. structure: "single", "redundant" (each group does
    the damage alone, so no single rescue shows it), "interacting" (only together), "cumulative", or "spread" (over all
    layers of the roles named).
    onset: step from which there is damage; acts_from: from which the cells found were at work, which may be long before.
    no_return, symptom: steps; None where unknown. recovery: steps of float32 that do not save the run after
    `no_return`. damage: nats, of the run over its twin in the window.
    over_run: what the rescue closes from the window's start to the run's end, where the window is shorter.
    alone_over_run: what the cells do alone there, where they do less than two thirds alone in the window.
    first: cells that did the damage in a shorter window, where they are not those that did it in the end.
    confidence: chance that the set of cells is right, by the calibration; None before there is one.
    """

    kind: str
    sentence: str
    cells: tuple[str, ...] = ()
    structure: str | None = None
    mechanism: str | None = None
    level: str | None = None
    confidence: float | None = None
    damage: float | None = None
    noise: float | None = None
    window: tuple[int, int] | None = None
    onset: int | None = None
    acts_from: int | None = None
    no_return: int | None = None
    recovery: int | None = None
    symptom: int | None = None
    rescue: Share | None = None
    alone: Share | None = None
    over_run: Share | None = None
    alone_over_run: Share | None = None
    first: tuple[str, ...] = ()
    groups: tuple[Effect, ...] = ()
    members: tuple[Effect, ...] = ()
    roles: tuple[Effect, ...] = ()
    placebos: tuple[Effect, ...] = ()
    interventions: tuple[Intervention, ...] = ()
    gates: tuple[str, ...] = ()
    prior: Mapping[str, float] = field(default_factory=dict)
    forks: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for verdict.json; a suspicion without bound (storage, a gradient that was not finite) is null."""
        prior = {cell: value if math.isfinite(value) else None for cell, value in self.prior.items()}
        return {"version": 1, **asdict(self), "prior": prior}


def joined(cells: tuple[str, ...], most: int = 4) -> str:
    """Cells in a sentence."""
    more = [f"{len(cells) - most} more"] if len(cells) > most else []
    return listing([*cells[:most], *more])


def whole_roles(cells: tuple[str, ...]) -> str:
    """Cells of whole roles in a sentence: "storage in 17 layers"."""
    roles: dict[str, int] = {}
    for cell in cells:
        parts = cell.split(".")
        role = parts[-1] if parts[-1] == "storage" else ".".join(parts[-2:])
        roles[role] = roles.get(role, 0) + 1
    return listing([f"{role} in {plural(count, 'layer')}" for role, count in roles.items()])
