"""The questions of the search, asked of one window of steps: role screen, layer split, confirmation, mechanism."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from altgrad.autopsy import mechanism
from altgrad.autopsy.damage import FLOOR, Band, Share, closed, share
from altgrad.autopsy.forks import Forks
from altgrad.autopsy.split import Groups, groups
from altgrad.autopsy.verdict import (
    Effect,
    Intervention,
    Verdict,
)
from altgrad.autopsy.window import Window


@dataclass(frozen=True)
class Settings:
    """How hard to look.

    draws: of the null band and of the confirmation. most_draws: of a single question of the search that stands near its
    threshold. matters: share of the damage from which a set of cells matters. longest: steps of the longest horizon.
    most_groups: groups after which damage counts as diffuse. placebos: innocent sets rescued as a control.
    """

    draws: int = 8
    most_draws: int = 4
    matters: float = 0.25
    longest: int = 400
    most_groups: int = 4
    placebos: int = 3


class Search:
    """The state of one autopsy: the forks, the window once it is known, and what has been concluded."""

    def __init__(
        self, forks: Forks, settings: Settings, prior: Mapping[Any, float], ceiling: float, so_far: Verdict
    ) -> None:
        self.forks, self.settings, self.ceiling = forks, settings, ceiling
        self.cells = tuple(forks.oracle.cells)
        self.everything = frozenset(self.cells)
        self.prior = dict(prior)
        self.window: Window
        self.so_far = so_far  # what is concluded when the budget ends

    # -- questions ------------------------------------------------------------------------------------------------

    def band(self, low: frozenset, draws: Sequence[int], **more) -> Band:
        """Damage of a set of low cells over several draws."""
        outcomes = self.forks.all([self.window.fork(low, draw=k, **more) for k in draws])
        return Band(tuple(self.window.yardstick.damage(o) for o in outcomes if o.refused is None))

    def damaged(self, low: frozenset) -> bool:
        """Whether these cells, low alone, do a share of the damage that matters; more draws where it is close."""
        if not low:
            return False
        null, values = self.window.null, []
        limit = null.high.mean + max(self.settings.matters * null.damage, FLOOR)
        for draw in range(self.settings.most_draws):
            values += self.band(low, [draw]).values
            distance = abs(float(np.mean(values)) - limit)
            if distance > 2.5 * null.noise / math.sqrt(len(values)):
                break
        return float(np.mean(values)) > limit

    def effect(self, cells: frozenset, draws: Sequence[int]) -> Effect:
        """Rescue and sufficiency of a set."""
        null = self.window.null
        rescue = closed(self.band(self.everything - cells, draws), null)
        alone = share(self.band(cells, draws), null)
        return Effect(names(cells), rescue, alone, _p_none(rescue, alone))

    # -- stages ---------------------------------------------------------------------------------------------------

    def order(self, roles: Sequence[Effect]) -> list:
        """Cells, the most suspect first: of roles that matter, then by the prior, then in the model's order."""
        weight = {name: max(e.rescue.value, e.alone.value) for e in roles for name in e.cells if e.rescue and e.alone}
        place = {cell: i for i, cell in enumerate(self.cells)}
        return sorted(self.cells, key=lambda c: (-round(weight.get(str(c), 0.0), 1), -self.prior.get(c, 0.0), place[c]))

    def screen(self) -> list[Effect]:
        """Each role of each GEMM, rescued everywhere and low alone."""
        self.forks.stage = "roles"
        kinds: dict[tuple, set] = {}
        for cell in self.cells:
            kinds.setdefault((getattr(cell, "gemm", None), cell.role), set()).add(cell)
        return [self.effect(frozenset(kind), [0]) for kind in kinds.values()]

    def split(self, roles: Sequence[Effect]) -> Groups:
        """The minimal damaging sets."""
        self.forks.stage = "layers"
        return groups(self.order(roles), self.damaged, self.settings.most_groups)

    def confirm(self, found: Groups) -> tuple[Effect, list[Effect], list[Effect], list[Effect]]:
        """(whole set, groups, members by leaving one out, placebos), each over several draws."""
        self.forks.stage = "confirm"
        draws, few = range(self.settings.draws), range(2)
        whole = self.effect(found.union, draws)
        parts = [self.effect(one, few) for one in found.sets] if len(found.sets) > 1 else []
        members = (
            [self.effect(frozenset([cell]), few) for cell in sorted(found.union, key=str)]
            if len(found.union) > 1
            else []
        )
        random, outside = Random(0), sorted(self.everything - found.union, key=str)
        size = min(len(found.union), max(1, len(outside) // 2))
        sets = {frozenset(random.sample(outside, size)) for _ in range(self.settings.placebos)} if outside else set()
        placebos = [
            Effect(names(one), closed(self.band(self.everything - one, few), self.window.null))
            for one in sorted(sets, key=names)
        ]
        return whole, parts, members, placebos

    def mechanisms(self, cells: frozenset) -> list[Intervention]:
        """Every intervention on the cells found."""
        self.forks.stage = "mechanism"
        made = []
        for change in mechanism.CHANGES:
            slow = change.name == "half_lr"
            more: dict[str, Any] = {"lr_factor": 0.5} if slow else {"change": change.name, "changed": cells}
            forks = [self.window.fork(self.everything, draw=k, **more) for k in range(2)]
            outcomes = self.forks.all(forks)
            refused = next((o.refused for o in outcomes if o.refused is not None), None)
            band = Band(tuple(self.window.yardstick.damage(o) for o in outcomes)) if refused is None else None
            result = None if band is None else closed(band, self.window.null)
            made.append(Intervention(change.name, change.says, result, change.bits, refused))
        return made


def names(cells) -> tuple[str, ...]:
    """Texts of cells, sorted."""
    return tuple(sorted(map(str, cells)))


def _p_none(rescue: Share, alone: Share) -> float:
    """Chance of a share as far from zero if the set had no effect in either direction."""
    zs = [abs(one.value) / max((one.high - one.low) / 3.92, 1e-12) for one in (rescue, alone)]
    return min(1.0, 2 * math.erfc(max(zs) / math.sqrt(2)))
