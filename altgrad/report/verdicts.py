"""How a run ended, in words that a terminal's table and every page share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from altgrad.report.numbers import count, listing, number, percent

PAST_TENSE = {
    "freeze": "froze",
    "divergence": "diverged",
    "nonfinite": "went non-finite",
    "no_learning": "never learned",
    "stalled": "stalled",
    "far_above": "ended far above its FP32 twin",
}
COMPLETED = "completed"
ON_PAR, BEHIND, BARELY_LEARNED = "on par", "behind", "barely learned"
PAR, BARELY = 0.05, 0.5
"""Parts of what FP32 gained, from its first evaluation to its last: so close to it is on par; so far below it is barely
learned."""
GRADES = (
    f"On par: within {PAR:.0%} of what FP32 gained. Behind: further below it. Barely learned: less than "
    f"{1 - BARELY:.0%} of what FP32 gained."
)
CONTRIBUTED, CAUSED = 0.25, 2 / 3
"""Shares of the gap from which a set of cells contributed to the damage, and from which it can have caused it: what others have a
part in is then less than half of what it does."""
_IN_A_CELL = {"far_above": "far above FP32"}


def grade(gap: float, gained: float) -> str | None:
    """How a completed run did beside its FP32 twin; None where the twin gained nothing to be compared with.

    Args:
        gap: its final loss minus the twin's. gained: by how much the twin's loss fell.
    """
    if not (math.isfinite(gap) and gained > 0):
        return None
    return ON_PAR if gap <= PAR * gained else BEHIND if gap <= BARELY * gained else BARELY_LEARNED


def past_tense(kind: str | None) -> str:
    """What a run of that verdict did; "collapsed" for a kind of another version."""
    return PAST_TENSE.get(kind or "", "collapsed")


def remarks_in_words(remarks: Sequence[Mapping[str, Any]]) -> str:
    """What a run is remarked for, each with its first step, such as "stalled (from step 81)"; "" for nothing."""
    return listing([past_tense(r.get("kind")) + _step(r.get("onset_step"), " (from step {})") for r in remarks])


def ending(
    status: str,
    verdict: Mapping[str, Any] | None,
    remarks: Sequence[Mapping[str, Any]] = (),
    graded: str | None = None,
) -> str:
    """A table's cell: "froze, step 81"; "on par"; "behind; stalled, step 12"; "completed" without a twin; else the status.

    Args:
        status: as in a result. verdict: of a collapse. remarks: what is no collapse but should be known.
        graded: of a completed run (`grade`), which says what a remark on its distance from FP32 would say again.
    """
    if status == "collapsed":
        return _in_a_cell(verdict or {})
    if status != "completed":
        return status
    return "; ".join([graded or COMPLETED, *map(_in_a_cell, remarks_beside(remarks, graded))])


def remarks_beside(remarks: Sequence[Mapping[str, Any]], graded: str | None) -> list[Mapping[str, Any]]:
    """The remarks that are left to be said: a grade says the distance from FP32, and what froze has stalled."""
    said = {"far_above"} if graded else set()
    if any(r.get("kind") == "freeze" for r in remarks):
        said.add("stalled")
    return [r for r in remarks if r.get("kind") not in said]


def evidence_words(metric: str, value: float | None, threshold: float | None) -> str:
    """The number that a verdict rests on: "stall rate 99.4%, threshold 95%"."""
    show = percent if metric.endswith("_rate") else number
    limit = "" if threshold is None else f", threshold {show(threshold)}"
    return f"{metric.replace('_', ' ')} {show(value)}{limit}"


def _in_a_cell(verdict: Mapping[str, Any]) -> str:
    kind, onset = verdict.get("kind"), verdict.get("onset_step")
    onset = verdict.get("detected_step") if onset is None else onset
    return _IN_A_CELL.get(str(kind), past_tense(kind)) + _step(onset, ", step {}")


def _step(step: Any, form: str) -> str:
    return form.format(count(step)) if isinstance(step, int | float) and math.isfinite(step) else ""
