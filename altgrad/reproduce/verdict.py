"""From the values of paired seeds to a verdict: what holds, what fails, what these seeds leave open and how many would do.

A criterion holds if the 95% interval of its mean lies within its bounds, fails if it lies outside of them altogether, and is
open otherwise. A claim is reproduced if every criterion holds (all must, so that no correction is due), not reproduced
if any fails (at a level divided by the number of criteria), and else unresolved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from altgrad.analysis.statistics import CONFIDENCE, Estimate, estimate
from altgrad.reproduce.claim import MOST_SEEDS, Claim, Criterion

REPRODUCED, NOT_REPRODUCED, UNRESOLVED = "reproduced", "not reproduced", "unresolved"
NOT_RUN, QUICK = "not run yet", "quick: proves nothing"


@dataclass(frozen=True)
class Finding:
    """What the seeds say of one criterion: "holds", "fails", "open"; "told" where nothing rests on it.

    Args:
        needed: seeds at which the interval of such values, with this mean and spread, would no longer straddle a bound;
            None where nothing is open, or more than `MOST_SEEDS`.
    """

    criterion: Criterion
    estimate: Estimate | None
    outcome: str
    needed: int | None = None
    nonfinite: int = 0


@dataclass(frozen=True)
class Verdict:
    """A claim's verdict with its findings; `kind` is one of this module's five words."""

    kind: str
    findings: Sequence[Finding] = field(default_factory=tuple)

    @property
    def open(self) -> list[Finding]:
        """The findings that more seeds may settle."""
        return [finding for finding in self.findings if finding.outcome == "open"]


def judge(claim: Claim, by_seed: Mapping[int, Mapping[str, float]], quick: bool = False) -> Verdict:
    """The verdict on `by_seed`, quantities of each seed; no seed: not run yet, or unresolved where it cannot be run here."""
    if not by_seed:
        return Verdict(NOT_RUN if claim.protocol else UNRESOLVED)
    deciding = sum(criterion.decides for criterion in claim.criteria)
    findings = [_finding(criterion, by_seed, max(1, deciding)) for criterion in claim.criteria]
    outcomes = {finding.outcome for finding in findings}
    kind = NOT_REPRODUCED if "fails" in outcomes else UNRESOLVED if "open" in outcomes else REPRODUCED
    return Verdict(QUICK if quick else kind, findings)


def _finding(criterion: Criterion, by_seed: Mapping[int, Mapping[str, float]], deciding: int) -> Finding:
    known = {seed: values[criterion.quantity] for seed, values in by_seed.items()}
    finite = {seed: value for seed, value in known.items() if math.isfinite(value)}
    lost = len(known) - len(finite)
    if not finite:
        return Finding(criterion, None, "open" if criterion.decides else "told", None, lost)
    found = estimate(list(finite.values()), list(finite))
    if not criterion.decides:
        return Finding(criterion, found, "told", None, lost)
    if found.low is None or found.high is None or lost:
        return Finding(criterion, found, "open", None, lost)
    if criterion.low <= found.low and found.high <= criterion.high:
        return Finding(criterion, found, "holds")
    strict = estimate(list(finite.values()), list(finite), confidence=1 - (1 - CONFIDENCE) / deciding)
    assert strict.low is not None
    assert strict.high is not None
    if strict.high < criterion.low or strict.low > criterion.high:
        return Finding(criterion, found, "fails")
    return Finding(criterion, found, "open", seeds_needed(found, criterion))


def seeds_needed(found: Estimate, criterion: Criterion) -> int | None:
    """The least number of seeds whose t interval, at the mean and spread found, reaches none of the bounds; None: too many."""
    from scipy import special

    bounds = [bound for bound in (criterion.low, criterion.high) if math.isfinite(bound)]
    distance = min(abs(found.mean - bound) for bound in bounds)
    if not found.sd:
        return found.n
    low, high = 2, MOST_SEEDS
    reaches = lambda n: special.stdtrit(n - 1, 0.5 + CONFIDENCE / 2) * found.sd / math.sqrt(n) > distance  # noqa: E731
    if reaches(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if reaches(middle) else (low, middle)
    return max(low, found.n + 1)
