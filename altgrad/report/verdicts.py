"""How a run ended, in words that a terminal's table and every page share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from altgrad.report.numbers import count, listing

PAST_TENSE = {
    "freeze": "froze",
    "divergence": "diverged",
    "nonfinite": "went non-finite",
    "no_learning": "never learned",
    "stalled": "stalled",
    "far_above": "ended far above its FP32 twin",
}
COMPLETED = "no collapse"
_IN_A_CELL = {"far_above": "far above FP32"}


def past_tense(kind: str | None) -> str:
    """What a run of that verdict did; "collapsed" for a kind of another version."""
    return PAST_TENSE.get(kind or "", "collapsed")


def remarks_in_words(remarks: Sequence[Mapping[str, Any]]) -> str:
    """What a run is remarked for, each with its first step, such as "stalled (from step 81)"; "" for nothing."""
    return listing([past_tense(r.get("kind")) + _step(r.get("onset_step"), " (from step {})") for r in remarks])


def ending(status: str, verdict: Mapping[str, Any] | None, remarks: Sequence[Mapping[str, Any]] = ()) -> str:
    """A table's cell: "froze, step 81"; "no collapse"; "stalled, step 12; far above FP32, step 30"; else the status.

    Args:
        status: as in a result. verdict: of a collapse. remarks: what is no collapse but should be known.
    """
    if status == "completed" and not remarks:
        return COMPLETED
    told = [verdict or {}] if status == "collapsed" else remarks if status == "completed" else ()
    return "; ".join(_in_a_cell(item) for item in told) or status


def _in_a_cell(verdict: Mapping[str, Any]) -> str:
    kind, onset = verdict.get("kind"), verdict.get("onset_step")
    onset = verdict.get("detected_step") if onset is None else onset
    return _IN_A_CELL.get(str(kind), past_tense(kind)) + _step(onset, ", step {}")


def _step(step: Any, form: str) -> str:
    return form.format(count(step)) if isinstance(step, int | float) and math.isfinite(step) else ""
