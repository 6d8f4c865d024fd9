"""The questions of the search, asked of one window of steps: role screen, layer split, confirmation, mechanism."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

import numpy as np

from altgrad.autopsy import mechanism
from altgrad.autopsy.damage import Band, Settled, Share, closed, share
from altgrad.autopsy.fork import LOW, TWIN
from altgrad.autopsy.forks import Forks
from altgrad.autopsy.split import groups, minimal
from altgrad.autopsy.verdict import (
    Effect,
    Intervention,
    Verdict,
)
from altgrad.autopsy.window import CLEAR, Window
from altgrad.report.verdicts import CONTRIBUTED

Prior = Callable[[int, Sequence[Any]], Mapping[Any, float]]
"""(step of the captured state, cells) -> suspicion of each cell."""


@dataclass(frozen=True)
class Settings:
    """How hard to look.

    draws: of the null band. confirm: of the confirmation. most_draws: of a single question that stands near its threshold.
    matters: share of the damage from which a set of cells matters. longest: steps of the longest horizon. most_groups:
    groups after which damage counts as diffuse. placebos: innocent sets rescued as a control.
    """

    draws: int = 8
    confirm: int = 4
    most_draws: int = 4
    matters: float = CONTRIBUTED
    longest: int = 400
    most_groups: int = 4
    placebos: int = 3


@dataclass(frozen=True)
class Found:
    """The cells that did the damage, and the minimal sets among them.

    sets: disjoint sets that each do damage alone. cells: their union, or all cells of the roles that did it where the
    layers of these roles share the damage. spread: neither layers nor roles could be told apart.
    """

    sets: tuple[frozenset, ...]
    cells: frozenset
    spread: bool

    @property
    def whole_roles(self) -> bool:
        """Whether the damage is of roles as a whole and not of the sets alone."""
        return not self.spread and self.cells != frozenset().union(*self.sets)


MANY = 8
"""Cells beyond which members are asked about by layer."""
BEHIND = 0.1
"""Share of the damage that may be left where the cells found are rescued, without further ones being looked for."""
MOST_BEHIND = 2
"""Cells of a set that may come of what is left: more is the sum of many small effects."""


def kinds_of(cells: Sequence[Any]) -> dict[tuple, frozenset]:
    """Cells by (GEMM, role)."""
    kinds: dict[tuple, set] = {}
    for cell in cells:
        kinds.setdefault((getattr(cell, "gemm", None), cell.role), set()).add(cell)
    return {kind: frozenset(members) for kind, members in kinds.items()}


def expected_forks(cells: Sequence[Any], captures: int, settings: Settings) -> dict[str, int]:
    """Forks by stage of a typical autopsy, which finds one cell or two."""
    search = math.ceil(math.log2(max(2, len(cells))))
    return {
        "null band": settings.draws + settings.draws // 2 + 1,
        "bounds": 2 + math.ceil(math.log2(max(2, captures))),
        "roles": 2 * len(kinds_of(cells)),
        "layers": 2 + search,
        "proof": 2,
        "confirm": 2 * settings.confirm + settings.placebos,
        "mechanism": len(mechanism.CHANGES),
    }


class Search:
    """The state of one autopsy: the forks, the window once it is known, and what has been concluded."""

    def __init__(self, forks: Forks, settings: Settings, prior: Prior, ceiling: float, so_far: Verdict) -> None:
        self.forks, self.settings, self.ceiling = forks, settings, ceiling
        self.cells = tuple(forks.oracle.cells)
        self.everything = frozenset(self.cells)
        self.prior = prior
        self.suspicion: dict[Any, float] = {}  # of the cells that were looked at one by one
        self.window: Window
        self.so_far = so_far  # what is concluded when the budget ends

    # -- questions ------------------------------------------------------------------------------------------------

    def band(self, low: frozenset, draws: Sequence[int], **more) -> Band:
        """Damage of a set of low cells over several draws."""
        outcomes = self.forks.all([self.window.fork(low, draw=k, **more) for k in draws])
        return self.window.yardstick.band(outcomes)

    def damaged(self, low: frozenset) -> bool:
        """Whether these cells, low alone, do a share of the damage that matters; more draws where it is close."""
        return self._beyond(low, self._rule)

    def _beyond(self, low: frozenset, stop: Settled, path: str = LOW) -> bool:
        """Whether these cells, low alone, do more damage than the rule's limit, from the run's state or its twin's."""
        if not low:
            return False
        values = []
        draws = [self.window.fork(low, path, draw=draw) for draw in range(self.settings.most_draws)]
        for draw, fork in enumerate(draws):
            if draw:
                self.forks.ahead(draws[draw:], stop)
            outcome = self.forks(fork, stop)
            values.append(stop.yardstick.damage(outcome))
            distance = abs(float(np.mean(values)) - stop.limit)
            if distance > 2.5 * self.window.null.noise / math.sqrt(len(values)):
                break
        return float(np.mean(values)) > stop.limit

    @property
    def _rule(self) -> Settled:
        null = self.window.null
        least = min(null.low.floor, null.damage / 2)  # little damage has no cells that do more of it than there is
        return self._rule_at(null.high.mean + max(self.settings.matters * null.damage, least))

    def _rule_at(self, limit: float) -> Settled:
        return Settled(self.window.yardstick, limit, self.window.null.step_noise, self._shown(limit))

    def _shown(self, limit: float) -> int:
        """Steps of the window from which on the run itself stays half way from the limit to all of its damage, or further."""
        yardstick, null = self.window.yardstick, self.window.null
        own, first = self.forks(self.window.fork(self.everything)).losses, yardstick.first
        clear = (limit + null.low.mean) / 2
        short = [n for n in range(first + 1, len(own)) if yardstick.over(own[:n], first) < clear]
        return max(short, default=first) + 1

    def _from_twin(self, low: frozenset, least: float) -> bool:
        """Whether these cells do more than `least` nats of damage from the state that the twin has at the window's start.

        Where they do damage from the run's state and none from the twin's, it is the state that carries it.
        """
        window = self.window
        if window.start == 0:
            return True  # it is the same state
        losses = list(self.forks.oracle.history(TWIN))[window.start : window.start + window.horizon]
        yardstick = replace(window.yardstick, twin=tuple(losses))
        rule = Settled(yardstick, least, window.null.step_noise, window.horizon)
        return self._beyond(low, rule, TWIN)

    def _carried(self, sets: Sequence[frozenset]) -> bool:
        """Whether the run's state carries the damage at the window's start, so that rescues there cannot tell cells apart.

        One of several sets then does no damage from the twin's state, with the cells outside of all, and from the run's does.
        """
        if len(sets) < 2:
            return False
        null, union = self.window.null, frozenset().union(*sets)
        least = max(self.settings.matters * null.damage, null.low.floor)
        return any(not self._from_twin(self.everything - union | one, least) for one in sets)

    def ahead(self, sets: Sequence[frozenset], stop: Settled | None = None) -> None:
        """Try sets that `damaged` (or `_beyond` with `stop`) may be asked about next, where there are idle hands."""
        self.forks.ahead([self.window.fork(low) for low in sets], stop or self._rule)

    def gather(self, sets: Sequence[frozenset], draws: Sequence[int]) -> None:
        """Run what the effects of these sets will ask for, side by side."""
        both = [low for cells in sets for low in (self.everything - cells, cells)]
        self.forks.all([self.window.fork(low, draw=k) for low in both for k in draws])

    def effect(self, cells: frozenset, draws: Sequence[int]) -> Effect:
        """Rescue and sufficiency of a set."""
        null = self.window.null
        rescue = closed(self.band(self.everything - cells, draws), null)
        alone = share(self.band(cells, draws), null)
        return Effect(names(cells), rescue, alone, _p_none(rescue, alone))

    # -- stages ---------------------------------------------------------------------------------------------------

    def order(self, cells: Sequence[Any]) -> list:
        """Cells, the most suspect first, by the prior; then in the model's order."""
        start = self.window.start
        if len(cells) > 1:
            self.suspicion |= self.prior(start, cells)
        place = {cell: i for i, cell in enumerate(self.cells)}
        return sorted(cells, key=lambda c: (-self.suspicion.get(c, 0.0), place[c]))

    def screen(self) -> list[Effect]:
        """Each role of each GEMM, rescued everywhere and low alone."""
        self.forks.stage = "roles"
        kinds = list(kinds_of(self.cells).values())
        self.gather(kinds, [0])
        return [self.effect(kind, [0]) for kind in kinds]

    def split(self, roles: Sequence[Effect]) -> Found | None:
        """Which roles do the damage, and which cells of them; None: an earlier state has to be asked, since this one
        carries damage."""
        self.forks.stage = "layers"
        weight = {name: max(e.rescue.value, e.alone.value) for e in roles for name in e.cells if e.rescue and e.alone}
        kinds = sorted(kinds_of(self.cells).values(), key=lambda kind: -weight.get(str(min(kind, key=str)), 0.0))
        guilty = groups(kinds, lambda some: self.damaged(frozenset().union(*some)), len(kinds))
        if self._carried([frozenset().union(*some) for some in guilty.sets]):
            return None
        suspects = frozenset().union(*guilty.union)
        within = self.order([cell for cell in self.cells if cell in suspects])
        found = groups(within, self.damaged, self.settings.most_groups, self.ahead)
        if self._carried(found.sets):
            return None
        if found.complete and found.sets and not self.damaged(self.everything - found.union):
            return Found(found.sets, found.union, spread=False)
        if suspects == self.everything or not guilty.complete or self.damaged(self.everything - suspects):
            return Found(found.sets, found.union, spread=True)
        return Found(found.sets, suspects, spread=False)

    def behind(self, found: Found) -> Found:
        """With the cells that what is left of the damage comes from when those found are rescued.

        What is below the share that matters may still be a cause: while rescuing all cells found leaves more than `BEHIND` of the
        damage and more than the floor, the smallest set is sought that does half of what is left alone, and not less than the
        floor, and whose rescue besides closes half of it. None is sought for what the state carries, nor two cells that do
        weak damage together only.
        """
        if found.spread or found.whole_roles:
            return found
        self.forks.stage = "what is left"
        null, draws = self.window.null, range(self.settings.confirm)
        sets, cells = list(found.sets), found.cells
        while len(sets) < self.settings.most_groups:
            outside = self.everything - cells
            left = self.band(outside, draws).mean - null.high.mean
            if left < max(null.low.floor, BEHIND * null.damage, 4 * null.noise / math.sqrt(len(draws))):
                break
            if not self._from_twin(outside, left / 2):
                break
            half, least = (self._rule_at(null.high.mean + nats) for nats in (left / 2, max(left / 2, null.low.floor)))
            if not self._beyond(outside, least):
                break
            suspects = self.order([c for c in self.cells if c in outside])
            most = MOST_BEHIND if left >= CLEAR * null.low.floor else 1
            asked = partial(self._beyond, stop=least)
            one = minimal(suspects, asked, ahead=partial(self.ahead, stop=least), most=most)
            if one is None or self._beyond(outside - one, half):
                break
            sets.append(one)
            cells |= one
        return Found(tuple(sets), cells, spread=False)

    def confirm(self, found: Found) -> tuple[Effect, list[Effect], list[Effect], list[Effect]]:
        """(whole set, groups, members by leaving one out, placebos), each over several draws."""
        self.forks.stage = "confirm"
        draws, once = range(self.settings.confirm), [0]
        parts = list(found.sets) if len(found.sets) > 1 else []
        members = [frozenset([cell]) for cell in sorted(found.cells, key=str)] if len(found.cells) > 1 else []
        if len(members) > MANY:  # every layer of whole roles: one question for each layer
            layers = dict.fromkeys(cell.layer for cell in self.cells if cell in found.cells)
            members = [frozenset(c for c in found.cells if c.layer == layer) for layer in layers]
        members = [one for one in members if one not in parts]
        random, outside = Random(0), sorted(self.everything - found.cells, key=str)
        size = min(len(found.cells), max(1, len(outside) // 2))
        sets = {frozenset(random.sample(outside, size)) for _ in range(self.settings.placebos)} if outside else set()
        self.gather([found.cells], draws)
        self.gather([*parts, *members], once)
        return (
            self.effect(found.cells, draws),
            [self.effect(one, once) for one in parts],
            [self.effect(one, once) for one in members],
            [
                Effect(names(one), closed(self.band(self.everything - one, once), self.window.null))
                for one in sorted(sets, key=names)
            ],
        )

    def mechanisms(self, cells: frozenset) -> list[Intervention]:
        """Every intervention on the cells found; a second draw where the first is near the threshold of saving."""
        self.forks.stage = "mechanism"
        null, made = self.window.null, []
        asked = {}
        for change in mechanism.CHANGES:
            more: dict[str, Any] = {"change": change.name, "changed": cells}
            asked[change] = {"lr_factor": 0.5} if change.name == "half_lr" else more
        self.forks.all([self.window.fork(self.everything, **more) for more in asked.values()])
        for change, more in asked.items():
            outcome = self.forks(self.window.fork(self.everything, **more))
            if outcome.refused is not None:
                made.append(Intervention(change.name, change.says, None, change.bits, outcome.refused))
                continue
            result = closed(self.band(self.everything, [0], **more), null)
            if result.low < mechanism.SAVES < result.high:
                result = closed(self.band(self.everything, [0, 1], **more), null)
            made.append(Intervention(change.name, change.says, result, change.bits))
        return made


def names(cells) -> tuple[str, ...]:
    """Texts of cells, sorted."""
    return tuple(sorted(map(str, cells)))


def _p_none(rescue: Share, alone: Share) -> float:
    """Chance of a share as far from zero if the set had no effect in either direction."""
    zs = [abs(one.value) / max((one.high - one.low) / 3.92, 1e-12) for one in (rescue, alone)]
    return min(1.0, 2 * math.erfc(max(zs) / math.sqrt(2)))
