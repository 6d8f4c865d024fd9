"""What a block format is: an element format, a block shape, and the format and rule of the scale that each block shares.

A block of values v_i is stored as a scale X and elements P_i with v_i = X * P_i. The scale follows from the block's
amax, the largest finite magnitude in it, written amax = m * 2^e with 1 <= m < 2:

    E8M0 scales    X = 2^(e - emax + up), clamped to 2^-127 .. 2^127, with emax = floor(log2(element max)) and
        floor      up = 0                                  OCP MX 1.0, 6.3: the largest element may saturate
        ceil       up = 1 if amax > max * 2^(e - emax)     the smallest X at which nothing saturates
        nearest    up = 1 if m >= 3/2                      2^e as the power of two nearest to amax
        even       up = 1 if m rounds to 2 at the element's precision
    FP32 scales    X = amax / max
    other scales   X = amax / max, rounded to nearest even in the scale format, between its smallest and largest values
    two levels     as above with amax / max / T, where T = tensor amax / (element max * scale max) is a float32; X is T
                   times the rounded quotient

The element keeps its own rounding. This module does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, cached_property

from altgrad.errors import FormatError
from altgrad.formats.scalar import FloatFormat, format_from_spec
from altgrad.report.notebook import notebook_table

LARGEST_BLOCK_SIDE = 1 << 20


class ScaleRule(str, Enum):
    """How an amax becomes a scale (the module docstring has the formulas)."""

    FLOOR = "floor"
    CEIL = "ceil"
    NEAREST = "nearest"
    EVEN = "even"


@dataclass(frozen=True)
class BlockFormat:
    """A block format; frozen, hashable, comparable by its facts.

    Args:
        name: catalog name, or the generic name that the facts spell (`block_format` finds it).
        element: format of each element.
        block: number of consecutive elements along one axis that share a scale, or (rows, columns) of a tile.
        scale_format: format of the scale: E8M0 (powers of two), FP32, or any format with a zero, such as E4M3.
        rule: how the scale follows from the amax; everything but E8M0 rounds to nearest.
        tensor_scale: a float32 scale of the whole tensor above the blocks' scales (NVFP4).
        source, aliases, note: as in `FloatFormat`.

    Raises:
        FormatError: a field is malformed, or the parts do not fit together.
    """

    name: str
    element: FloatFormat
    block: int | tuple[int, int]
    scale_format: FloatFormat
    rule: ScaleRule
    tensor_scale: bool = False
    source: str = field(default="", compare=False)
    aliases: tuple[str, ...] = field(default=(), compare=False)
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for side in self.tile:
            if not 1 <= side <= LARGEST_BLOCK_SIDE:
                raise FormatError(f"{self.name}: block side {side} is outside 1..{LARGEST_BLOCK_SIDE}")
        if not self.element.has_zero or not self.element.signed:
            raise FormatError(f"{self.name}: element {self.element} has no zero or no sign; it is a scale format")
        if self.element.bits > 16:
            raise FormatError(f"{self.name}: element {self.element} has {self.element.bits} bits; use at most 16")
        if not self.power_of_two and self.rule is not ScaleRule.NEAREST:
            raise FormatError(
                f"{self.name}: rule {self.rule.value} needs an E8M0 scale; {self.scale_format} takes nearest"
            )
        if not self.power_of_two and not self.scale_format.has_zero:
            raise FormatError(f"{self.name}: {self.scale_format} cannot hold a scale; use E8M0, E4M3 or FP32")
        if self.tensor_scale and (self.power_of_two or self.has_float_scale):
            raise FormatError(f"{self.name}: a tensor scale above {self.scale_format} scales has no use; leave it out")
        _ = (
            self.spec,
            self.element_emax,
            self.element.max,
            self.scale_format.max,
        )  # computed now: compilers trace users

    # -- derived facts --------------------------------------------------------------------------------------------

    @property
    def power_of_two(self) -> bool:
        """Whether scales are powers of two (E8M0)."""
        return self.scale_format.name == "E8M0"

    @property
    def has_float_scale(self) -> bool:
        """Whether scales are plain float32 numbers."""
        return self.scale_format.name == "FP32"

    @property
    def is_tile(self) -> bool:
        """Whether a block spans two axes."""
        return isinstance(self.block, tuple)

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns) of a block; a block along one axis has one row."""
        return self.block if isinstance(self.block, tuple) else (1, self.block)

    @property
    def block_elements(self) -> int:
        """Number of elements that share a scale."""
        return self.tile[0] * self.tile[1]

    @property
    def bits_per_value(self) -> float:
        """Storage per element, its share of the scale included; a tensor scale is not counted."""
        return self.element.bits + self.scale_format.bits / self.block_elements

    @property
    def max(self) -> float:
        """Largest finite value of a block of its own choosing: element max times scale max, within float32."""
        return min(self.element.max * self.scale_format.max, (2.0 - 2.0**-23) * 2.0**127)

    @property
    def max_representable_value(self) -> float:
        """Same as `max`."""
        return self.max

    @property
    def has_inf(self) -> bool:
        """Whether an element can be infinite."""
        return self.element.has_inf

    @property
    def has_nan(self) -> bool:
        """Whether NaN can be stored: by the element, else by the scale (then the whole block is NaN)."""
        return self.element.has_nan or self.scale_format.has_nan

    @cached_property
    def element_emax(self) -> int:
        """floor(log2(element max)), the emax of OCP MX 1.0, 6.3."""
        return math.frexp(self.element.max)[1] - 1

    def round_up_from(self, fraction_bits: int) -> int:
        """Smallest fraction field f (m = 1 + f / 2^fraction_bits) for which `up` is 1; 2^fraction_bits for never.

        With f the fraction field of a float32 (23 bits) or float64 (52 bits) amax, the E8M0 rule is one comparison.
        """
        one = 2**fraction_bits
        if self.rule is ScaleRule.FLOOR:
            return one
        if self.rule is ScaleRule.CEIL:
            return int((math.ldexp(self.element.max, -self.element_emax) - 1) * one) + 1
        if self.rule is ScaleRule.NEAREST:
            return one // 2
        half_step = math.ldexp(self.element.ulp(self.element.max) / 2, -self.element_emax)
        return int((1 - half_step) * one)

    @cached_property
    def spec(self) -> str:
        """Canonical one-line form of the facts; `block_format_from_spec` reads it back."""
        rows, columns = self.tile
        shape = f"{rows}x{columns}" if self.is_tile else str(columns)
        parts = (
            self.name,
            self.element.spec,
            shape,
            self.scale_format.spec,
            self.rule.value,
            str(int(self.tensor_scale)),
        )
        return ";".join(parts)

    def facts(self) -> list[tuple[str, str]]:
        """(label, text) pairs that say all there is to know about the format."""
        down, across = self.tile
        shape = f"{down} x {across} tile of the last two axes" if self.is_tile else f"{across} along one axis"
        scale = self.scale_format
        rows = [
            (
                "element",
                f"{self.element} ({self.element.bits} bits, max {self.element.max:g}, emax {self.element_emax})",
            ),
            ("block", f"{shape}, {self.block_elements} elements share a scale"),
            (
                "scale",
                f"{scale} ({scale.bits} bits)" + (", under a float32 scale per tensor" if self.tensor_scale else ""),
            ),
            ("scale rule", f"{self.rule.value}: {self._rule_text()}"),
            ("bits per value", f"{self.bits_per_value:g}"),
            ("largest value", f"{self.element.max:g} times the scale"),
            ("NaN", self._nan_text()),
            ("inf", "kept by the element" if self.has_inf else "kept by quantize, no code"),
            ("finite overflow", "saturates at the element's max"),
        ]
        if self.aliases:
            rows.append(("also named", ", ".join(self.aliases)))
        rows.append(("source", self.source))
        if self.note:
            rows.append(("note", self.note))
        return rows

    def _rule_text(self) -> str:
        if not self.power_of_two:
            return "amax / element max" + ("" if self.has_float_scale else f" rounded to {self.scale_format}")
        return {
            ScaleRule.FLOOR: f"2^(floor(log2 amax) - {self.element_emax})",
            ScaleRule.CEIL: f"the smallest power of two >= amax / {self.element.max:g}",
            ScaleRule.NEAREST: f"2^-{self.element_emax} times the power of two nearest to amax",
            ScaleRule.EVEN: f"2^(floor(log2(amax rounded to the element's precision)) - {self.element_emax})",
        }[self.rule]

    def _nan_text(self) -> str:
        if self.element.has_nan:
            return "kept by the element"
        return "makes the scale NaN, and with it the block"

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"BlockFormat({self.spec})"

    def _repr_html_(self) -> str:
        return notebook_table(self.name, self.facts())


@cache
def block_format_from_spec(spec: str) -> BlockFormat:
    """The block format that `BlockFormat.spec` describes (without source, aliases and note)."""
    try:
        name, element, shape, scale, rule, tensor_scale = spec.split(";")
        rows, _, columns = shape.rpartition("x")
        block = (int(rows), int(columns)) if rows else int(columns)
        facts = (format_from_spec(element), block, format_from_spec(scale), ScaleRule(rule), tensor_scale == "1")
        return BlockFormat(name, *facts)
    except ValueError as error:
        raise FormatError(f"malformed block format spec {spec!r}; pass BlockFormat.spec as it is ({error})") from None
