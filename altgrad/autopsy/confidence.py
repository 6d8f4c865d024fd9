"""How sure a verdict is, by the calibration: the share of right cell sets among calibrated cases that looked alike.

Until a calibration has been run the confidence is None, and pages say "not calibrated".
"""

from __future__ import annotations

from altgrad.autopsy.verdict import Verdict


def confidence(verdict: Verdict) -> float | None:
    """Chance that the verdict's set of cells is right; None where there is no calibration."""
    return None
