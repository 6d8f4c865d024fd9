"""From a number to a case: faults are drawn until one does damage, and what counts as right is written down before the case runs.

Damage is measured by training alone, with and without the fault, from several jittered initial states on the same batches; the
autopsy is not asked. A fault that does none becomes a stronger one, or is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from random import Random

import numpy as np

from altgrad.errors import ConfigError
from altgrad.randomness import seed_of
from benchmarks.autopsy_calibration.faults import KINDS, NULLS, Case, Fault, draw_decoys, draw_fault, width_of
from benchmarks.autopsy_calibration.loop import STEPS, build, losses_of

LEAST = 0.02
"""Nats over the run's last quarter, four standard errors from none, from which a fault counts as one."""
HARMLESS = 0.005
"""Nats below which cells count as harmless."""
SHARE = 0.5
"""Share of the damage that each cell of a redundant pair must do alone."""
DRAWS = 2
FAULTS, RUNS = 40, 20
"""Faults tried in one run before another run, of other weights, batches and decoys, takes its place; runs before none
is found."""


@dataclass
class Truth:
    """Trainings of one case without its fault, which those with it are compared to."""

    case: Case
    draws: int = DRAWS
    base: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        loop = build(self.case, None)
        self.base = [self._end(losses_of(loop, draw)) for draw in range(self.draws)]
        loop.put(loop.recipe.only([], loop.model))
        loop.ring.keep(0, loop.capture())
        self.float32 = self._end(losses_of(loop, 0))

    @property
    def scatter(self) -> float:
        """Standard deviation of the run without the fault."""
        return _sd(self.base)

    def damage(self, fault: Fault, cells: tuple[str, ...] | None = None, draws: int = DRAWS) -> tuple[float, float]:
        """(nats, standard error) that the fault does over the last quarter, or some of its cells alone.

        Against the run without it or the float32 one, whichever is worse: what only one of them shows is no damage.
        """
        loop = build(self.case, fault, cells)
        ends = [self._end(losses_of(loop, draw)) for draw in range(draws)]
        without = max(float(np.mean(self.base)), self.float32)
        scatter = math.hypot(_sd(ends), self.scatter)
        return float(np.mean(ends)) - without, scatter / math.sqrt(draws)

    def _end(self, losses: list[float]) -> float:
        ceiling = losses[0] if math.isfinite(losses[0]) else math.log(256)
        last = losses[-STEPS // 4 :]
        return float(np.mean([min(x, ceiling) if math.isfinite(x) else ceiling for x in last]))


def _sd(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def fault_case(seed: int, number: int) -> Case:
    """Case `number` of the faults of a set's seed."""
    random = Random(seed_of(seed, "calibration", number))
    width = width_of(number)
    tried: list[str] = []
    for _ in range(RUNS):
        case = _with_decoys(Case(f"fault-{number:03d}", _own_seed(random)), random)
        truths: dict[bool, Truth] = {}
        for fault in islice(_ladder(random, width), FAULTS):
            shown = replace(case, fault=fault)
            moments = fault.kind == "second moment"
            if moments not in truths:
                truths[moments] = Truth(shown)
            found = _judged(shown, fault, truths[moments])
            if found is not None:
                return replace(found, tried=tuple(tried))
            tried.append(f"{fault.kind}/{fault.rung} in {' and '.join(fault.cells)} from {fault.onset}")
    raise _endless(case)


def _endless(case: Case) -> ConfigError:
    return ConfigError(f"{case.name}: none of {FAULTS} faults in each of {RUNS} runs fits; give another --seed")


def _ladder(random: Random, width: str) -> Iterator[Fault]:
    """Faults as they are drawn, each followed by its stronger ones."""
    while True:
        fault: Fault | None = draw_fault(random, width)
        while fault is not None:
            yield fault
            fault = fault.stronger()


def _judged(case: Case, fault: Fault, truth: Truth) -> Case | None:
    """The case with what counts as right; None where the fault does no damage, or is no redundant pair though it is to be one."""
    if truth.damage(fault, draws=1)[0] < LEAST / 2:
        return None
    if fault.width == "pair":
        for cell in fault.cells:
            if truth.damage(fault, (cell,), draws=1)[0] < LEAST / 2:
                return None
    damage, error = truth.damage(fault)
    if damage < LEAST or damage < 4 * error:
        return None
    alone: dict[str, float] = {}
    if len(fault.cells) > 1:
        alone = {cell: truth.damage(fault, (cell,), draws=2)[0] for cell in fault.cells}
        if fault.width == "pair" and min(alone.values()) < SHARE * damage:
            return None
    return replace(
        case,
        damage=damage,
        error=error,
        alone=alone,
        acceptable=acceptable(fault, damage, alone),
        mechanisms=KINDS[fault.kind].mechanisms,
    )


def acceptable(fault: Fault, damage: float, alone: dict[str, float]) -> tuple[tuple[str, ...], ...]:
    """The sets of cells that count as right: all cells that have the fault; of a tensor's two uses also the one that does most
    of the damage, where the other does less than half of it."""
    sets = [fault.cells]
    if fault.width == "tensor":
        for cell, other in (fault.cells, fault.cells[::-1]):
            if alone[cell] >= damage / 2 > alone[other]:
                sets.append((cell,))
    return tuple(sets)


def null_case(seed: int, number: int) -> Case:
    """Null `number` of a set's seed."""
    random = Random(seed_of(seed, "calibration null", number))
    name = NULLS[number % len(NULLS)]
    case = Case(f"null-{number:03d}", _own_seed(random), null=name)
    if name in STRENGTHS:
        return replace(case, strength=random.choice(STRENGTHS[name]))
    if name != "harmless cells":
        return _with_decoys(case, random)
    for _ in range(RUNS):
        case = _with_decoys(case, random)
        harmless = _harmless(case, random)
        if harmless is not None:
            return harmless
        case = replace(case, seed=_own_seed(random), decoys=())
    raise _endless(case)


def _harmless(case: Case, random: Random) -> Case | None:
    """The case with a fault that does nothing; None where the run itself scatters too much to tell, or no fault tried fits."""
    truth = Truth(case)
    if truth.scatter / math.sqrt(DRAWS) >= HARMLESS / 2:
        return None
    for fault in islice(_ladder(random, "single"), FAULTS):
        if fault.kind in ("second moment", "IEEE overflow"):
            continue
        if abs(truth.damage(fault, draws=1)[0]) > HARMLESS:
            continue
        damage, error = truth.damage(fault)
        if abs(damage) < HARMLESS and error < HARMLESS / 2:
            return replace(case, fault=fault, damage=damage, error=error)
    return None


STRENGTHS = {
    "high learning rate": (10.0, 30.0, 100.0, 300.0),
    "scrambled batches": (1.0,),
    "label noise": (0.3, 0.6, 1.0),
    "large initial weights": (3.0, 10.0, 30.0),
}


def _own_seed(random: Random) -> int:
    return random.randrange(1, 2**31)


def _with_decoys(case: Case, random: Random) -> Case:
    """The case with decoys that do no harm: the run with them ends within `HARMLESS` of the run without, else it has none."""
    decoys = draw_decoys(random)
    if not decoys:
        return case
    there, bare = (Truth(one, draws=1).base[0] for one in (replace(case, decoys=decoys), case))
    return replace(case, decoys=decoys) if abs(there - bare) < HARMLESS else case
