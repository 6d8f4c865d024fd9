"""Damage in nats: how far a fork's losses lie above those of the float32 twin on the same batches.

    damage(fork) = mean over the horizon's second half of min(loss, ceiling) - min(twin's loss, ceiling)

(of its last quarter, where the damage grows so slowly that only the end of the run shows it).

The ceiling is the largest loss of an untrained model: a dead fork, whose losses are NaN, counts as one that knows
nothing, and no fork counts as worse. Pairing by batch removes the batches' noise; what remains is the noise of one
draw of the rounding, which the null band measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from altgrad.autopsy.fork import Outcome

FLOOR = 0.01
"""Damage in nats below which nothing is called damage, however small the noise..."""
FLOOR_SHARE = 1 / 500
"""...and as a share of the ceiling, for losses that are small in themselves, such as squared errors."""
DEAD_NOISE = 2
"""Standard deviation, in floors, assumed of draws that all died: they have the same ceiling, so they show none."""
LEAST_NOISE = 1 / 20
"""Standard deviation, in floors, below which that of draws that live is not believed: a few of them do not show it."""


def floor_of(ceiling: float) -> float:
    """Damage below which nothing is called damage where the losses of an untrained model are `ceiling`."""
    return min(FLOOR, FLOOR_SHARE * ceiling)


@dataclass(frozen=True)
class Yardstick:
    """What damage is measured against: the twin's losses over the same steps, and the ceiling.

    late: only the last quarter of the steps counts, and not their second half.
    """

    twin: tuple[float, ...]
    ceiling: float
    late: bool = False

    @property
    def first(self) -> int:
        """Index of the first step that counts."""
        return (3 * len(self.twin) if self.late else 2 * len(self.twin)) // 4

    @property
    def floor(self) -> float:
        """Damage below which nothing is called damage."""
        return floor_of(self.ceiling)

    def band(self, outcomes: Sequence[Outcome]) -> Band:
        """The draws of one question."""
        ran = [o for o in outcomes if o.refused is None]
        dead = bool(ran) and all(self._capped(loss) == self.ceiling for o in ran for loss in o.losses[-LAST:])
        return Band(tuple(self.damage(o) for o in ran), self.floor, dead)

    def damage(self, outcome: Outcome) -> float:
        """Damage in nats of a fork of the twin's horizon; of one that was stopped early, over what it saw last."""
        taken = len(outcome.losses)
        return self.over(outcome.losses, self.first if taken >= self.first + LAST else max(0, taken - LAST))

    def over(self, losses: Sequence[float], first: int) -> float:
        """Mean damage of the steps from index `first` on."""
        pairs = zip(losses[first:], self.twin[first : len(losses)], strict=True)
        return float(np.mean([self._capped(loss) - self._capped(twin) for loss, twin in pairs]))

    def curve(self, losses: Sequence[float]) -> np.ndarray:
        """Damage step by step."""
        return np.array([self._capped(a) - self._capped(b) for a, b in zip(losses, self.twin, strict=False)])

    def _capped(self, loss: float) -> float:
        return min(loss, self.ceiling) if math.isfinite(loss) else self.ceiling


@dataclass(frozen=True)
class Band:
    """Draws of one question: their mean damage and how far single draws scatter.

    dead: all of them ended at the ceiling.
    """

    values: tuple[float, ...]
    floor: float = FLOOR
    dead: bool = False

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def sd(self) -> float:
        """Standard deviation of one draw; that of dead draws, which all sit at the ceiling, or of a single one is assumed."""
        if self.dead or len(self.values) < 2:
            return DEAD_NOISE * self.floor
        return max(float(np.std(self.values, ddof=1)), LEAST_NOISE * self.floor)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.sd / math.sqrt(len(self.values))


@dataclass(frozen=True)
class Null:
    """The null band: draws of the damaged run and draws of its twin, from one state on the same batches.

    wobble: standard error of the damage by its scatter from step to step, which draws that hardly part do not show.
    """

    low: Band
    high: Band
    wobble: float = 0.0

    @property
    def damage(self) -> float:
        """Mean damage of the run in nats, noise removed."""
        return self.low.mean - self.high.mean

    @property
    def noise(self) -> float:
        """Standard deviation of the difference of one draw from the mean."""
        return max(self.low.sd, self.high.sd)

    @property
    def step_noise(self) -> float:
        """Deviation of one draw's mean, its scatter from step to step included, by which the mean of fewer steps is judged."""
        return math.hypot(self.noise, self.wobble)

    @property
    def z(self) -> float:
        """Damage in standard errors."""
        return self.damage / math.hypot(self.low.error, self.high.error)

    @property
    def damaged(self) -> bool:
        """Whether there is damage: beyond the floor, and four standard errors from none, three by its steps."""
        return self.damage > self.low.floor and self.z > 4.0 and self.damage > 3 * self.wobble


def wobble(gap: Sequence[float] | np.ndarray) -> float:
    """Standard error of a mean of step-by-step damage whose neighbours go along in pairs; a steady trend counts as none."""
    steps = np.asarray(gap, dtype=float)
    return float(np.std(np.diff(steps)) / math.sqrt(len(steps))) if len(steps) > 2 else 0.0


@dataclass(frozen=True)
class Settled:
    """The rule by which a fork stops early: its losses have left the band around `limit` for good, on one side of it.

    Harmless: from the first step that counts on, and from where the run itself has shown its damage, the mean damage so far lies
    four of its deviations below the limit. Harmful: the same above it, or, before that step, every one of the last
    steps lies far above. A fork that is dead, not finite in all of the last steps, is harmful.

    noise: deviation of one draw's mean over the steps that count; the mean of fewer steps scatters more.
    shown: steps after which the run's own damage stands clear of the limit: it may begin late in the window.
    """

    yardstick: Yardstick
    limit: float
    noise: float
    shown: int = 0

    def __call__(self, losses: Sequence[float]) -> bool:
        first, taken = self.yardstick.first, len(losses)
        if taken < 2 * LAST or taken % 2:  # looked at every other step
            return False
        last = self.yardstick.curve(losses)[-LAST:]
        if taken < first + LAST:
            return bool(np.all(last > max(4 * self.limit, self.limit + 10 * self.noise)))
        scatter = self.noise * math.sqrt(max(1, len(self.yardstick.twin) - first) / (taken - first))
        above = self.yardstick.over(losses, first) - self.limit
        return above > 4 * scatter or (taken >= self.shown and above < -4 * scatter)


LAST = 4
"""Steps that a fork must stay outside the band before it stops."""


@dataclass(frozen=True)
class Share:
    """Part of the damage, 1 for all of it, with a 95% interval and the draws behind it."""

    value: float
    low: float
    high: float
    draws: int

    def __str__(self) -> str:
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"


def share(part: Band, null: Null) -> Share:
    """Mean damage of `part` as a share of the run's, by the delta method; the noise of a single draw is the null band's."""
    value = (part.mean - null.high.mean) / null.damage
    draw = part.sd if len(part.values) > 2 else null.noise
    own = draw / math.sqrt(len(part.values))
    error = math.hypot(own, value * null.low.error, (1 - value) * null.high.error) / abs(null.damage)
    return Share(value, value - 1.96 * error, value + 1.96 * error, len(part.values))


def closed(part: Band, null: Null) -> Share:
    """The share of the gap that an intervention closes: 1 minus the damage that remains."""
    rest = share(part, null)
    return Share(1 - rest.value, 1 - rest.high, 1 - rest.low, rest.draws)


def saturating(shares: Sequence[float]) -> float:
    """1 - prod(1 - a): what independent shares make together, as damage saturates at the ceiling."""
    kept = 1.0
    for one in shares:
        kept *= 1 - min(max(one, 0.0), 1.0)
    return 1 - kept
