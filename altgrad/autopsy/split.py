"""Which cells, by recursive minimisation: the smallest sets that do damage when they alone are low.

`minimal` finds one such set. Cells are tried in the order of the prior: the shortest prefix that does damage is found by
doubling and bisection, its last cell is needed and joins the background, and the search goes on among the cells before
it, until the background does the damage by itself (QuickXplain, Junker 2004; the prefix search makes a right prior cost
two forks). Then every member is left out once, so that the result is minimal also where damage is not monotone.

`groups` repeats that with the cells found removed, until what remains is harmless (rddmin, as in Verrou): redundant
causes, which no single rescue shows, come out as several groups; an interaction comes out as one group of several cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Damaged = Callable[[frozenset], bool]
Ahead = Callable[[Sequence[frozenset]], None]
"""Told which sets may be asked about next, the likeliest first, so that they can be tried side by side."""


def _alone(sets: Sequence[frozenset]) -> None:
    """Nothing is tried ahead."""


def minimal(
    cells: Sequence[Any],
    damaged: Damaged,
    background: frozenset = frozenset(),
    ahead: Ahead = _alone,
    most: float = math.inf,
) -> frozenset | None:
    """A minimal set of `cells` that does damage together with `background`; all of them together must.

    Args:
        cells: in the order of suspicion, the most suspect first.
        damaged: whether a set of cells, low alone, does damage; asked about 2 log2(n) times for each member.
        most: members after which the search is given up, with None, as soon as one more is needed.
    """
    found = background
    candidates = list(cells)
    while candidates and not damaged(found):
        if len(found - background) >= most:
            return None
        size = _shortest(candidates, damaged, found, ahead)
        found |= {candidates[size - 1]}
        candidates = candidates[: size - 1]
    members = sorted(found - background, key=str)
    if len(found) > 1:
        ahead([found - {cell} for cell in members])
    for cell in members:
        if len(found) > 1 and damaged(found - {cell}):
            found -= {cell}
    return found - background


def _shortest(candidates: list, damaged: Damaged, background: frozenset, ahead: Ahead) -> int:
    """Length of the shortest prefix that does damage with the background; the whole is taken for granted."""

    def prefix(size: int) -> frozenset:
        return background | frozenset(candidates[:size])

    low, high = 0, 1
    while high < len(candidates):
        ahead([prefix(size) for size in (high, 2 * high) if size < len(candidates)])
        if damaged(prefix(high)):
            break
        low, high = high, 2 * high
    high = min(high, len(candidates))
    while high - low > 1:
        middle = (low + high) // 2
        ahead(
            [prefix(size) for size in dict.fromkeys((middle, (low + middle) // 2, (middle + high) // 2)) if size > low]
        )
        if damaged(prefix(middle)):
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True)
class Groups:
    """Minimal damaging sets, in the order found, and whether the cells outside all of them are harmless."""

    sets: tuple[frozenset, ...]
    complete: bool

    @property
    def union(self) -> frozenset:
        """All cells of all groups."""
        return frozenset().union(*self.sets)


def groups(cells: Sequence[Any], damaged: Damaged, most: int = 4, ahead: Ahead = _alone) -> Groups:
    """Minimal damaging sets of `cells`, disjoint, until the rest is harmless or `most` sets are found."""
    rest, sets = list(cells), []
    while len(sets) < most and rest and damaged(frozenset(rest)):
        one = minimal(rest, damaged, ahead=ahead)
        assert one is not None
        sets.append(one)
        rest = [cell for cell in rest if cell not in one]
    return Groups(tuple(sets), complete=not rest or not damaged(frozenset(rest)))
