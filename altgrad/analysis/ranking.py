"""Ranks settings by their loss, and says "unresolved" where the data cannot tell two of them apart.

Two settings are told apart by the paired differences of the seeds they share (t-test, Holm's correction over all pairs);
without at least two common seeds, by intervals that do not overlap. A setting's rank is then a range: one more than the
number of settings that are certainly better, up to the number that are not certainly worse. Settings of which some run
collapsed are not ranked by the survivors' mean, which would reward collapsing: they stand below, with their count.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from altgrad.analysis.statistics import Comparison, Estimate, estimate, holm, paired, paired_p
from altgrad.report.numbers import listing

ALPHA = 0.05


@dataclass(frozen=True)
class Contender:
    """A setting: its final loss by seed (finite ones), and how many of its runs collapsed."""

    name: str
    losses: Mapping[Hashable, float]
    collapsed: int = 0
    runs: int = 0


@dataclass(frozen=True)
class Ranked:
    """A contender's place. `best`..`worst` are the ranks it may have; None for contenders that are not ranked."""

    name: str
    estimate: Estimate | None
    against_baseline: Comparison | None
    p_adjusted: float | None
    """Of the difference from the baseline, Holm-corrected over all contenders."""
    best: int | None
    worst: int | None
    unresolved_with: tuple[str, ...]
    collapsed: int
    runs: int

    @property
    def resolved(self) -> bool:
        return self.best is not None and self.best == self.worst

    @property
    def place(self) -> str:
        """ "1", or "2 to 4, unresolved", or why there is none."""
        if self.best is None:
            return f"collapsed in {self.collapsed} of {self.runs}" if self.collapsed else "no final loss"
        return str(self.best) if self.resolved else f"{self.best} to {self.worst}, unresolved"

    def unresolved_words(self, most: int = 4) -> str:
        names = list(self.unresolved_with)
        return listing(names[:most] + ([f"{len(names) - most} more"] if len(names) > most else []))


def rank(contenders: Sequence[Contender], baseline: Contender | None = None, *, alpha: float = ALPHA) -> list[Ranked]:
    """Best first; contenders with collapses or without a loss come last. The baseline itself is not among them."""
    standing = [c for c in contenders if not c.collapsed and c.losses]
    fallen = [c for c in contenders if c.collapsed or not c.losses]
    estimates = {c.name: estimate(list(c.losses.values()), tuple(c.losses)) for c in contenders if c.losses}
    better = certainly_better(standing, estimates, alpha)
    compared = {c.name: paired(c.losses, baseline.losses) if baseline and c.losses else None for c in contenders}
    tested = [c.name for c in standing if (found := compared[c.name]) is not None and found.p is not None]
    adjusted = dict(zip(tested, holm([compared[name].p for name in tested]), strict=True))  # type: ignore[union-attr]
    out = []
    for c in sorted(standing, key=lambda c: estimates[c.name].mean):
        above = sum((other.name, c.name) in better for other in standing)
        below = sum((c.name, other.name) in better for other in standing)
        open_with = [o.name for o in standing if o is not c and not {(o.name, c.name), (c.name, o.name)} & better]
        out.append(
            Ranked(
                c.name,
                estimates[c.name],
                compared[c.name],
                adjusted.get(c.name),
                above + 1,
                len(standing) - below,
                tuple(open_with),
                0,
                c.runs,
            )
        )
    for c in sorted(fallen, key=lambda c: (c.collapsed / max(1, c.runs), c.name)):
        out.append(Ranked(c.name, estimates.get(c.name), compared[c.name], None, None, None, (), c.collapsed, c.runs))
    return out


def certainly_better(
    contenders: Sequence[Contender], estimates: Mapping[str, Estimate], alpha: float = ALPHA
) -> set[tuple[str, str]]:
    """Pairs (a, b) of which a's loss is certainly lower: by Holm-corrected paired tests, or by disjoint intervals."""
    tests: list[tuple[str, str, float, float]] = []
    found: set[tuple[str, str]] = set()
    for a, b in combinations(contenders, 2):
        common = [seed for seed in a.losses if seed in b.losses]
        if len(common) >= 2:
            differences = np.array([a.losses[seed] - b.losses[seed] for seed in common])
            tests.append((a.name, b.name, float(differences.mean()), paired_p(differences) or 0.0))
        elif not estimates[a.name].overlaps(estimates[b.name]):
            lower = (a, b) if estimates[a.name].mean < estimates[b.name].mean else (b, a)
            found.add((lower[0].name, lower[1].name))
    for (a, b, mean, _), p in zip(tests, holm([p for *_, p in tests]), strict=True):
        if p < alpha and mean != 0:
            found.add((a, b) if mean < 0 else (b, a))
    return found
