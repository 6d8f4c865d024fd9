"""A format for every operand under a budget: the least predicted damage for the bits that a person names.

Damages add up, so each operand offers a list of (bits, damage) and the choice is a knapsack: start from the fewest bits
everywhere and take, of all upgrades along the operands' convex hulls, the one that saves most damage per bit as long as
there is room. That is the optimum but for what the last upgrade that did not fit would have saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from altgrad.errors import ConfigError
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.report.numbers import plural

HARDWARE: Mapping[str, tuple[str, ...]] = {
    "any8": ("E1M6", "E2M5", "E3M4", "E4M3", "E5M2"),  # every way to split eight bits that trains with a scale
    "any6": ("E1M4", "E2M3", "E3M2", "E4M1"),
    "hopper": ("E4M3", "E5M2"),  # NVIDIA H100 tensor cores (Hopper architecture whitepaper, 2022)
    "blackwell": (
        "E4M3",
        "E5M2",
        "MXFP8",
        "MXFP6",
        "MXFP6_E3M2",
        "MXFP4",
        "NVFP4",
    ),  # PTX ISA 8.7, mma kinds mxf8f6f4, mxf4nvf4
    "mi300": ("E4M3FNUZ", "E5M2FNUZ"),  # AMD CDNA3 ISA, 2023
    "mx": ("MXFP8", "MXFP8_E5M2", "MXFP6", "MXFP6_E3M2", "MXFP4", "MXINT8"),  # OCP MX 1.0
}
"""Named sets of formats."""

TIE_DB = 0.5
"""Options whose predicted damage differs by less are ties, where the prediction's own error is not larger."""


@dataclass(frozen=True)
class Budget:
    """What a recipe may cost.

    Args:
        bits: average bits over the values that a step quantizes (inputs, weights, gradients of outputs); None: no limit.
        high_layers: how many layers may have operands in `high`; None: as many as the bits allow.
        formats: that may be used; or `hardware`, a name in `HARDWARE`.
        high: the format of what must stay high.
        storage: master (float32 weights quantized at use) or grid (weights stored in their format).

    Raises:
        ConfigError, FormatError: contradictory or unknown.
    """

    bits: float | None = 8.5
    high_layers: int | None = None
    formats: tuple[str, ...] = ()
    hardware: str | None = None
    high: str = "BF16"
    storage: str = "master"

    def __post_init__(self) -> None:
        if self.hardware is not None and self.formats:
            raise ConfigError(
                f"hardware {self.hardware!r} and formats {', '.join(self.formats)} both name formats; drop one"
            )
        if self.hardware is not None and self.hardware not in HARDWARE:
            raise ConfigError(f"hardware {self.hardware!r} is not one of {', '.join(HARDWARE)}; or name formats")
        if self.storage not in ("master", "grid"):
            raise ConfigError(f"storage {self.storage!r} is not one of master, grid")
        if self.high_layers is not None and self.high_layers < 0:
            raise ConfigError(f"high_layers {self.high_layers} is below 0")
        if isinstance(self.formats, str):
            raise ConfigError(f"formats are {self.formats!r}; write a tuple of names, such as ('E4M3', 'E5M2')")
        names = self.formats or HARDWARE[self.hardware or "any8"]
        object.__setattr__(self, "formats", tuple(dict.fromkeys(get_format(name).name for name in names)))
        object.__setattr__(self, "high", get_format(self.high).name)
        if self.storage == "grid" and (blocks := [n for n in self.formats if isinstance(get_format(n), BlockFormat)]):
            raise ConfigError(
                f"weights cannot be stored on the grid of {blocks[0]}, whose blocks find their own scales; use master"
            )
        if not isinstance(self.bits, int | float | None):
            raise ConfigError(f"bits are {self.bits!r}; write a number, such as 8.5, or None for no limit")
        least = min(bits_of(name) for name in self.formats)
        if self.bits is not None and not self.bits >= least:  # NaN, too
            raise ConfigError(
                f"{plural(self.bits, 'bit')} on average are fewer than the {least:g} of the narrowest format; allow more, or a narrower format"
            )

    @property
    def block_shapes(self) -> tuple[int | tuple[int, int], ...]:
        """Blocks that a trace must count."""
        found = (get_format(name) for name in self.formats)
        return tuple(dict.fromkeys(one.block for one in found if isinstance(one, BlockFormat)))


@dataclass(frozen=True)
class Option:
    """A format for an operand. damage: predicted relative squared error across the gradient."""

    format: str
    bits: float
    damage: float


@dataclass
class Choice:
    """formats: by (layer, role). ties: other formats that are as good for no more bits. bits: the average."""

    formats: dict[tuple[str, str], str]
    ties: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    bits: float = 0.0
    damage: float = 0.0


def bits_of(name: str) -> float:
    """Bits per value, a block's share of its scale included."""
    fmt = get_format(name)
    return fmt.bits_per_value if isinstance(fmt, BlockFormat) else float(fmt.bits)


def choose(
    options: Mapping[tuple[str, str], Sequence[Option]],
    values: Mapping[tuple[str, str], int],
    budget: Budget,
    tie_db: float = TIE_DB,
) -> Choice:
    """The choice of least damage.

    Args:
        options: of each operand, those in `budget.high` included.
        values: elements of each operand in a step.

    Raises:
        ConfigError: an operand has no option, or the bits do not suffice for the narrowest.
    """
    for cell, offered in options.items():
        if not offered:
            raise ConfigError(f"no format of the budget can be predicted for {cell[1]} of {cell[0]}")
    total = sum(values.values())
    room = math.inf if budget.bits is None else budget.bits * total
    capped = budget.high_layers is not None
    lowest = {
        cell: [o for o in offered if o.format != budget.high] or list(offered) for cell, offered in options.items()
    }
    hulls = {cell: _hull(lowest[cell] if capped else list(offered)) for cell, offered in options.items()}
    at = dict.fromkeys(hulls, 0)
    spent = sum(values[cell] * hull[0].bits for cell, hull in hulls.items())
    if spent > room * (1 + 1e-9):
        raise ConfigError(
            f"the narrowest formats take {spent / total:.2f} bits on average, more than {budget.bits:g}; allow more"
        )
    while True:
        steps = []
        for cell, hull in hulls.items():
            if at[cell] + 1 < len(hull):
                now, then = hull[at[cell]], hull[at[cell] + 1]
                cost = values[cell] * (then.bits - now.bits)
                if spent + cost <= room * (1 + 1e-12):
                    steps.append(((now.damage - then.damage) / max(cost, 1e-12), cell, cost))
        if not steps:
            break
        _, cell, cost = max(steps, key=lambda step: (step[0], -step[2]))
        at[cell] += 1
        spent += cost
    chosen = {cell: hull[at[cell]] for cell, hull in hulls.items()}
    if capped:
        spent = _raise_layers(chosen, options, values, budget, spent, room)
    ties = {cell: found for cell in chosen if (found := _ties(chosen[cell], options[cell], tie_db))}
    return Choice(
        {cell: one.format for cell, one in chosen.items()},
        ties,
        spent / total if total else 0.0,
        sum(one.damage for one in chosen.values()),
    )


def _raise_layers(chosen, options, values, budget: Budget, spent: float, room: float) -> float:
    """Put up to `high_layers` layers in the high format, those first that save most; what is then spent."""
    saved: dict[str, list] = {}
    for cell, offered in options.items():
        high = next((o for o in offered if o.format == budget.high), None)
        if high is not None:
            entry = saved.setdefault(cell[0], [0.0, 0.0, {}])
            entry[0] += chosen[cell].damage - high.damage
            entry[1] += values[cell] * (high.bits - chosen[cell].bits)
            entry[2][cell] = high
    left = budget.high_layers or 0
    for gain, cost, cells in sorted(saved.values(), key=lambda entry: -entry[0]):
        if left and gain > 0 and spent + cost <= room * (1 + 1e-12):
            chosen.update(cells)
            spent, left = spent + cost, left - 1
    return spent


def _hull(offered: list[Option]) -> list[Option]:
    """The lower convex hull of damage over bits, fewest bits first; of equal bits the least damage."""
    best: dict[float, Option] = {}
    for one in offered:
        if one.bits not in best or one.damage < best[one.bits].damage:
            best[one.bits] = one
    hull: list[Option] = []
    for one in sorted(best.values(), key=lambda option: option.bits):
        if hull and one.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], one):
            hull.pop()
        hull.append(one)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (b.damage - a.damage) / (b.bits - a.bits)


def _ties(chosen: Option, offered: Sequence[Option], tie_db: float) -> list[str]:
    """Formats of no more bits whose damage is within `tie_db` of the chosen one's."""
    limit = 10 ** (tie_db / 10)
    return [
        one.format
        for one in offered
        if one.format != chosen.format and one.bits <= chosen.bits and one.damage <= chosen.damage * limit
    ]
