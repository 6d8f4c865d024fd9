"""Faults that a number format can have, as rows, and cases drawn from a seed: what is broken, where, how strongly, since when.

A row gives the specs of a cell that has the fault, weakest first, and the mechanisms that count as right, fixed here before
any case runs. Scales are told against the operand's own amax: `up` 8 is a scale 2^8 times the one that its amax asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any

from altgrad.autopsy.mechanism import BIAS, LOST_UPDATES, OUTLIERS, OVERFLOW, RANGE, RESOLUTION, SCALE
from altgrad.formats.catalog import get_format
from altgrad.formats.rounding import Rounding
from altgrad.nn.recipe.cells import Cell
from altgrad.nn.recipe.spec import OperandSpec, StorageSpec
from altgrad.quantization import NoScaling, StaticScaling

BASE = "E4M3"
MAX = get_format(BASE).max
LAYERS = {"first": ("hidden.0",), "middle": ("hidden.1", "hidden.2"), "last": ("hidden.3",), "head": ("head",)}
OPERANDS = (
    ("forward", "input"),
    ("forward", "weight"),
    ("input_grad", "grad_output"),
    ("input_grad", "weight"),
    ("weight_grad", "grad_output"),
    ("weight_grad", "input"),
)
STORED = (("storage", "storage"),)
MOMENTS = (("moments", "exp_avg_sq"),)

Spec = OperandSpec | StorageSpec | str
Amaxes = dict[str, float]
"""Largest absolute value of "input", "weight" and "grad_output" of a layer, in the run without the fault; "early" ones too."""


def _static(scale: float, fmt: str = BASE, **options: Any) -> OperandSpec:
    return OperandSpec(fmt, scaling=StaticScaling(scale), **options)


def _bias_shifted(amax: float, binades: int) -> OperandSpec:
    """E4M3 without a scale whose exponent bias puts its max `binades` below the operand's amax."""
    bias = 7 + math.ceil(math.log2(MAX / amax)) + binades
    return OperandSpec(f"E4M3b{bias}", scaling=NoScaling())


def _stored_or_used(amax: float, fmt: str, **options: Any) -> Spec:
    """A rounding of an operand, or of a stored weight, which has no amax of its own here."""
    return OperandSpec(fmt, **options) if amax else StorageSpec(fmt, **options)


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    family: as the report groups them. mechanisms: those that count as right. rungs: strengths, weakest first. spec: (amax of the
    operand, rung, amaxes of its layer) -> spec of the broken cell. places: (GEMM, role) where it can be. weight: how often it
    is drawn. late: whether it can begin after the first step.
    """

    family: str
    mechanisms: tuple[str, ...]
    rungs: tuple[Any, ...]
    spec: Callable[[float, Any, Amaxes], Spec]
    places: tuple[tuple[str, str], ...] = OPERANDS
    weight: int = 2
    late: bool = True


_RANGE = (RANGE, SCALE)
KINDS: dict[str, Kind] = {
    "scale up": Kind("range", _RANGE, (10, 13, 16, 18, 20), lambda amax, k, _: _static(amax / MAX * 2**k), weight=3),
    "scale down": Kind("range", _RANGE, (2, 3, 5, 7, 9), lambda amax, k, _: _static(amax / MAX / 2**k), weight=3),
    "stale scale": Kind(
        "range", _RANGE, (0, 1, 2, 4, 6), lambda amax, k, all_: _static(all_["early"] / MAX / 2**k), late=False
    ),
    "bias shift": Kind("range", _RANGE, (2, 3, 5, 7), lambda amax, k, _: _bias_shifted(amax, k)),
    "IEEE overflow": Kind(
        "range",
        (OVERFLOW, RANGE, SCALE),
        (1, 2, 4),
        lambda amax, k, _: _static(amax / 57344.0 / 2**k, "E5M2", overflow="native"),
        weight=1,
    ),
    "fewer mantissa bits": Kind(
        "resolution", (RESOLUTION,), ("E4M1", "E4M0"), lambda amax, fmt, _: OperandSpec(fmt), weight=3
    ),
    "truncation": Kind(
        "bias",
        (BIAS, LOST_UPDATES),
        ("E4M3", "E4M2", "E4M1", "E4M0"),
        lambda amax, fmt, _: _stored_or_used(amax, fmt, rounding=Rounding.TOWARD_ZERO),
        (*OPERANDS, *6 * STORED),
    ),
    "rounding up": Kind(
        "bias",
        (BIAS,),
        ("E4M3", "E4M2", "E4M1", "E4M0"),
        lambda amax, fmt, _: OperandSpec(fmt, rounding=Rounding.UP),
        weight=3,
    ),
    "few random bits": Kind(
        "bias",
        (BIAS, LOST_UPDATES),
        (("E4M3", 2), ("E4M2", 2), ("E4M1", 2), ("E4M1", 1), ("E4M0", 1)),
        lambda amax, of, _: _stored_or_used(amax, of[0], rounding=Rounding.STOCHASTIC, random_bits=of[1]),
        (*OPERANDS, *6 * STORED),
    ),
    "flushed subnormals": Kind(
        "zeroing", _RANGE, (10, 12, 14, 16, 18), lambda amax, k, _: _static(amax / MAX * 2**k, subnormals=False)
    ),
    "floor block scale": Kind(
        "zeroing",
        (RESOLUTION, RANGE, OUTLIERS),
        ("E2M1/32:E8M0:floor", "E1M1/32:E8M0:floor"),
        lambda amax, fmt, _: OperandSpec(fmt),
        weight=1,
    ),
    "stalled storage": Kind(
        "state",
        (LOST_UPDATES,),
        ("E4M3", "E5M2", "E4M1", "E4M0"),
        lambda amax, fmt, _: StorageSpec(fmt),
        STORED,
        weight=4,
    ),
    "second moment": Kind(
        "state",
        (LOST_UPDATES, RANGE, RESOLUTION),
        ("BF16", "E5M2", "E4M3"),
        lambda amax, fmt, _: fmt,
        MOMENTS,
        weight=2,
        late=False,
    ),
    "scale of the other operand": Kind(
        "wiring", _RANGE, (0,), lambda amax, _, all_: _static(all_["other"] / MAX), weight=3
    ),
}
"""Not here, since no recipe expresses them: a reused rounding seed, a lost residual of error feedback, a transposed
block axis."""

ONSETS = {"first step": (0, 0), "middle": (32, 44), "late": (58, 68)}


@dataclass(frozen=True)
class Fault:
    """A drawn fault, before it is known what damage it does.

    kind, rung: a row of `KINDS`, and the index of its strength. cells: where. width: "single", "tensor" (both products that a
    tensor has a part in) or "pair". onset: steps that the run takes without it.
    """

    kind: str
    rung: int
    cells: tuple[str, ...]
    width: str
    onset: int

    def stronger(self) -> Fault | None:
        """The next rung; None at the top."""
        last = self.rung + 1 >= len(KINDS[self.kind].rungs)
        return None if last else replace(self, rung=self.rung + 1)


PAIRED = ("scale up", "scale down", "stale scale", "bias shift", "flushed subnormals", "IEEE overflow")
"""Kinds that a redundant pair can have: those that can take a whole operand away, so that another loss is no further one."""


def draw_fault(random: Random, width: str) -> Fault:
    """A fault of a width: kind, layer, role, starting strength and onset."""
    names = {
        "single": list(KINDS),
        "tensor": [name for name, kind in KINDS.items() if OPERANDS[0] in kind.places],
        "pair": list(PAIRED),
    }[width]
    name = random.choices(names, [KINDS[n].weight for n in names])[0]
    kind = KINDS[name]
    onset = random.randint(*ONSETS[random.choice(list(ONSETS))]) if kind.late else 0
    weakest = len(kind.rungs) // 2 if width == "pair" else 0
    return Fault(name, random.randrange(weakest, len(kind.rungs)), _cells(random, kind, width), width, onset)


def _cells(random: Random, kind: Kind, width: str) -> tuple[str, ...]:
    if kind.places is MOMENTS:
        return ("optimizer.moments.exp_avg_sq",)
    if width == "pair":  # the forward's operands twice out of three, which every later layer depends on
        places = random.choice((OPERANDS[:2], OPERANDS[:2], OPERANDS))
        both: set[str] = set()
        while len(both) < 2:
            both.add(str(Cell(_layer(random), *random.choice(places))))
        return tuple(sorted(both))
    layer, place = _layer(random), random.choice(OPERANDS if width == "tensor" else kind.places)
    if width == "single":
        return (str(Cell(layer, *place)),)
    return tuple(sorted(str(Cell(layer, gemm, role)) for gemm, role in OPERANDS if role == place[1]))


def _layer(random: Random) -> str:
    return random.choice(LAYERS[random.choice(list(LAYERS))])


def draw_decoys(random: Random) -> tuple[str, ...]:
    """Up to three cells with one mantissa bit, whose signal-to-noise ratio is the worst of all innocent ones."""
    count = random.choice((0, 0, 1, 2, 3))
    return tuple(sorted({str(Cell(_layer(random), *random.choice(OPERANDS))) for _ in range(count)}))


# -- nulls ------------------------------------------------------------------------------------------------------------------

NULLS = (
    "no fault",
    "harmless cells",
    "high learning rate",
    "scrambled batches",
    "label noise",
    "large initial weights",
)


@dataclass(frozen=True)
class Case:
    """One case of a set: a fault, or a null.

    name: in its set. seed: of weights, batches and draws. decoys: coarse cells that do no harm. null, strength: which, and how
    strong. damage, error: nats that the fault does by the run's end, measured by training with and without it before the case
    runs; alone: those of each of its cells. acceptable: the sets of cells that count as right. mechanisms: those that do.
    tried: faults drawn before this one, which did no damage.
    """

    name: str
    seed: int
    decoys: tuple[str, ...] = ()
    fault: Fault | None = None
    null: str | None = None
    strength: float = 0.0
    damage: float | None = None
    error: float | None = None
    alone: dict[str, float] = field(default_factory=dict)
    acceptable: tuple[tuple[str, ...], ...] = ()
    mechanisms: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, which `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Case:
        fault = data["fault"] and Fault(**{**data["fault"], "cells": tuple(data["fault"]["cells"])})
        lists = {name: tuple(data[name]) for name in ("decoys", "mechanisms", "tried")}
        return cls(**{**data, **lists, "fault": fault, "acceptable": tuple(map(tuple, data["acceptable"]))})


def width_of(number: int) -> str:
    """Every sixth case is a redundant pair, every sixth a whole tensor, the others are single cells."""
    return {5: "pair", 2: "tensor"}.get(number % 6, "single")
