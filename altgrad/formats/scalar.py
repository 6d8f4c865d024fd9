"""What a number format is: its bits, bias and special codes are stated, every other number is derived from them.

A code is a sign bit above an exponent field of `exponent_bits` above a significand field of `mantissa_bits`. Codes that
are not special stand for

    (-1)^sign * (2^M + f) * 2^(E - bias - M)   for exponent field E > 0   (normal)
    (-1)^sign * f * 2^(1 - bias - M)           for exponent field E = 0   (zero and subnormals)

A format without exponent bits (`E0M7`) is all "subnormal": f * 2^-M, a uniform grid. The grid spacing at x, its ULP, is
2^(max(floor(log2|x|), emin) - M) with emin = 1 - bias (0 for E0 formats): every kernel works from emin, M and max alone.
This module does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache, cached_property
from typing import Any

import numpy as np

from altgrad.errors import FormatError
from altgrad.report.notebook import notebook_table

CARRIER_MAX = (2.0 - 2.0**-23) * 2.0**127
CARRIER_MIN_SUBNORMAL = 2.0**-149
LISTED_BITS = 18  # beside the sign, of formats whose values are listed in a table


class Specials(Enum):
    """Which codes are not finite numbers."""

    NONE = "none"  # every code is a number
    NAN_ONLY = "nan_only"  # OCP "FN": the all-ones code of each sign is NaN
    IEEE = "ieee"  # the all-ones exponent field holds inf and NaNs
    FNUZ = "fnuz"  # the code that would be -0 is the one NaN
    P3109 = "p3109"  # the code that would be -0 is the one NaN; the largest code of each sign is inf


@dataclass(frozen=True)
class FloatFormat:
    """A scalar number format; frozen, hashable, comparable by its facts.

    Args:
        name: the format's name, unique in the registry.
        exponent_bits: width of the exponent field; 0 makes a uniform (fixed-point) grid.
        mantissa_bits: width of the significand field, the implicit bit not counted.
        bias: exponent bias; None exactly for formats without exponent bits.
        specials: which codes are inf or NaN.
        has_subnormals: False reads every code with exponent field 0 as zero.
        signed: False drops the sign bit (`E8M0`).
        has_zero: False makes exponent field 0 an ordinary exponent (`E8M0`).
        twos_complement: codes are two's complement integers (`INT8`); the values are those of the symmetric range.
        source: the paper, standard or file that the row follows.
        aliases: other names that mean this row (matched case-insensitively).
        note: what a reader should know, such as where standards disagree.

    Raises:
        FormatError: a field is malformed, or the largest or smallest value is not exact in float32.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int | None
    specials: Specials = Specials.NONE
    has_subnormals: bool = True
    signed: bool = True
    has_zero: bool = True
    twos_complement: bool = False
    source: str = field(default="", compare=False)
    aliases: tuple[str, ...] = field(default=(), compare=False)
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.exponent_bits < 0 or self.mantissa_bits < 0 or self.exponent_bits + self.mantissa_bits < 1:
            raise FormatError(
                f"{self.name}: {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits; both must be >= 0, one > 0"
            )
        if (self.bias is None) != (self.exponent_bits == 0):
            raise FormatError(f"{self.name}: bias {self.bias}; give a bias exactly when there are exponent bits")
        if self.mantissa_bits > 23:
            raise FormatError(f"{self.name}: {self.mantissa_bits} mantissa bits; the float32 carrier holds at most 23")
        if self.exponent_bits > 8:
            raise FormatError(f"{self.name}: {self.exponent_bits} exponent bits; the float32 carrier holds at most 8")
        if self._largest_code < (1 if self.has_zero else 0):
            raise FormatError(f"{self.name}: no code is left for a nonzero finite number")
        for what, exponent in (("largest", self.emax), ("smallest", self.emin - self.mantissa_bits)):
            if not -149 <= exponent <= 127:
                raise FormatError(
                    f"{self.name}: its {what} value is about 2^{exponent}, not exact in the float32 carrier "
                    "(2^-149 to 2^127); use fewer exponent bits or another bias"
                )

    # -- widths ---------------------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Width of a code in bits, the sign included."""
        return self.exponent_bits + self.mantissa_bits + (1 if self.signed else 0)

    @property
    def magnitude_bits(self) -> int:
        """Width of a code without its sign bit."""
        return self.exponent_bits + self.mantissa_bits

    @property
    def significant_bits(self) -> int:
        """Bits between the leading and the last bit of any value, both included."""
        return self.mantissa_bits + (0 if self.bias is None else 1)

    @property
    def has_inf(self) -> bool:
        """Whether a code stands for infinity."""
        return self.specials in (Specials.IEEE, Specials.P3109)

    @property
    def has_nan(self) -> bool:
        """Whether a code stands for NaN."""
        return self.specials is not Specials.NONE

    @property
    def has_negative_zero(self) -> bool:
        """Whether -0 has a code of its own."""
        return (
            self.signed
            and self.has_zero
            and not self.twos_complement
            and self.specials not in (Specials.FNUZ, Specials.P3109)
        )

    # -- range and spacing ----------------------------------------------------------------------------------------

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number; below it the spacing stays 2^(emin - mantissa_bits)."""
        if self.bias is None:
            return 0
        return 1 - self.bias if self.has_zero else -self.bias

    @cached_property
    def _largest_code(self) -> int:
        """Magnitude code of the largest finite number."""
        all_ones = 2**self.magnitude_bits - 1
        if self.specials is Specials.IEEE:
            return ((2**self.exponent_bits - 1) << self.mantissa_bits) - 1
        if self.specials in (Specials.NAN_ONLY, Specials.P3109):
            return all_ones - 1
        return all_ones

    @cached_property
    def emax(self) -> int:
        """floor(log2(max))."""
        significand, exponent = self._parts(self._largest_code)
        return significand.bit_length() - 1 + exponent

    def _parts(self, magnitude_code: int) -> tuple[int, int]:
        """(significand, exponent) with value = significand * 2^exponent."""
        m = self.mantissa_bits
        exponent_field, fraction = magnitude_code >> m, magnitude_code & (2**m - 1)
        if self.bias is None:
            return magnitude_code, -m
        if not self.has_zero:
            return 2**m + fraction, exponent_field - self.bias - m
        if exponent_field == 0:
            return (fraction if self.has_subnormals else 0), self.emin - m
        return 2**m + fraction, exponent_field - self.bias - m

    def magnitude(self, magnitude_code: int) -> float:
        """Value of a non-negative, finite magnitude code (0 .. the code of `max`)."""
        if not 0 <= magnitude_code <= self._largest_code:
            raise FormatError(f"{self.name}: magnitude code {magnitude_code} is outside 0..{self._largest_code}")
        significand, exponent = self._parts(magnitude_code)
        return math.ldexp(significand, exponent)

    @cached_property
    def max(self) -> float:
        """Largest finite value."""
        return self.magnitude(self._largest_code)

    @property
    def max_representable_value(self) -> float:
        """Same as `max`."""
        return self.max

    @property
    def min_normal(self) -> float:
        """Smallest positive value of full precision, 2^emin; for a uniform grid its step."""
        return self.min_subnormal if self.bias is None else math.ldexp(1.0, self.emin)

    @cached_property
    def min_subnormal(self) -> float:
        """Smallest positive value; without subnormals (`E7M0`) that is `min_normal`."""
        if self.has_zero and self.mantissa_bits > 0 and self.has_subnormals:
            return math.ldexp(1.0, self.emin - self.mantissa_bits)
        return math.ldexp(1.0, self.emin)

    def ulp(self, x) -> Any:
        """Grid spacing at x, 2^(max(floor(log2|x|), emin) - M), for |x| up to max and as if unbounded beyond.

        Args:
            x: a number, or an array of numbers (then an array of the same shape is returned).

        Edge values: at 0 the spacing of the smallest binade; NaN for NaN and inf. Without subnormals the spacing
        below `min_normal` is `min_normal`.
        """
        array = np.asarray(x, dtype=np.float64)
        exponent = np.frexp(np.abs(array))[1] - 1  # frexp is exact next to powers of two, where log2 is not
        exponent = np.where(array == 0, self.emin, exponent)
        steps = np.ldexp(1.0, np.maximum(exponent, self.emin) - self.mantissa_bits)
        if self.bias is None:
            steps = np.full_like(steps, math.ldexp(1.0, -self.mantissa_bits))
        elif not self.has_subnormals or not self.has_zero:
            steps = np.where(exponent < self.emin, self.min_normal, steps)
        steps = np.where(np.isfinite(array), steps, np.nan)
        return float(steps) if np.ndim(x) == 0 else steps

    # -- enumeration ----------------------------------------------------------------------------------------------

    @cached_property
    def _magnitudes(self) -> np.ndarray:
        """Value of each finite magnitude code, indexed by the code; read-only float64."""
        if self.magnitude_bits > LISTED_BITS:
            raise FormatError(f"{self.name}: 2^{self.bits} values are too many to list; use ulp() and neighbours()")
        codes = np.arange(self._largest_code + 1)
        exponent_field, fraction = codes >> self.mantissa_bits, codes & (2**self.mantissa_bits - 1)
        if self.bias is None:
            table = np.ldexp(codes.astype(np.float64), -self.mantissa_bits)
        else:
            normal = np.ldexp(2.0**self.mantissa_bits + fraction, exponent_field - self.bias - self.mantissa_bits)
            below = np.ldexp(fraction * float(self.has_subnormals), self.emin - self.mantissa_bits)
            table = np.where((exponent_field == 0) & self.has_zero, below, normal)
        table.setflags(write=False)
        return table

    def magnitudes(self) -> np.ndarray:
        """Values of the finite magnitude codes in code order (ascending), float64, read-only."""
        return self._magnitudes

    def values(self) -> np.ndarray:
        """All distinct finite values, sorted ascending, float64; +0 and -0 count once."""
        both = np.concatenate([-self._magnitudes, self._magnitudes]) if self.signed else self._magnitudes
        return np.unique(both) + 0.0  # the one zero is +0

    @property
    def number_of_values(self) -> int:
        """Number of distinct finite values."""
        return len(self.values())

    def index_of(self, value: float) -> int:
        """Ordered code index of a value on the grid: sign * magnitude code, 0 for both zeros.

        Raises:
            FormatError: `value` is not finite or not on the grid.
        """
        magnitude = abs(float(value))
        step = self.ulp(magnitude)
        on_grid = math.isfinite(magnitude) and magnitude <= self.max and (self.signed or value >= 0)
        if not on_grid or math.fmod(magnitude, step) != 0 or (magnitude == 0 and not self.has_zero):
            raise FormatError(f"{value} is not a finite value of {self.name}; quantize it first")
        significand = int(magnitude / step)
        if not self.has_zero:
            index = (
                (math.frexp(magnitude)[1] - 1 - self.emin << self.mantissa_bits) + significand - 2**self.mantissa_bits
            )
        elif self.bias is None or magnitude < self.min_normal:
            index = significand
        else:
            exponent_field = math.frexp(magnitude)[1] - 1 + self.bias
            index = (exponent_field << self.mantissa_bits) + significand - 2**self.mantissa_bits
        return -index if value < 0 else index

    def next_up(self, value: float) -> float:
        """Smallest value greater than `value` (which need not be on the grid); inf above `max`."""
        return self._next(float(value))

    def next_down(self, value: float) -> float:
        """Largest value less than `value` (which need not be on the grid); -inf below the smallest value."""
        if not self.signed:
            smaller = self.values()[self.values() < value]
            return float(smaller[-1]) if len(smaller) else -math.inf
        return -self._next(-float(value)) + 0.0

    def neighbours(self, value: float) -> tuple[float, float]:
        """(next_down(value), next_up(value))."""
        return self.next_down(value), self.next_up(value)

    def _next(self, value: float) -> float:
        if math.isnan(value):
            return math.nan
        if value < (-self.max if self.signed else self.min_subnormal if not self.has_zero else 0.0):
            return -self.max if self.signed else float(self._magnitudes[0])
        if value >= self.max:
            return math.inf
        step = self.ulp(value)
        if value < 0 and math.frexp(-value)[0] == 0.5 and -value > self.min_normal:
            step = self.ulp(-value * 0.75)  # below a power of two the spacing is that of the lower binade
        if 0 <= value < self.min_subnormal:
            return self.min_subnormal
        if self.min_subnormal >= -value > 0:
            return 0.0
        candidate = math.floor(value / step) * step + step
        return candidate + 0.0

    # -- variants, identity ---------------------------------------------------------------------------------------

    def without_subnormals(self) -> FloatFormat:
        """This format with one gap between 0 and `min_normal`; itself if it has no subnormals to lose."""
        if self.bias is None:
            raise FormatError(
                f"{self.name}: a uniform grid is all subnormals; leave them on, or use a format with exponent bits"
            )
        if not self.has_subnormals or self.mantissa_bits == 0 or not self.has_zero:
            return self
        return replace(self, name=f"{self.name}-nosub", has_subnormals=False)

    @cached_property
    def spec(self) -> str:
        """Canonical one-line form of the facts; `format_from_spec` reads it back."""
        bias = "none" if self.bias is None else self.bias
        flags = "".join(str(int(f)) for f in (self.has_subnormals, self.signed, self.has_zero, self.twos_complement))
        return f"{self.name}|{self.exponent_bits}|{self.mantissa_bits}|{bias}|{self.specials.value}|{flags}"

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"FloatFormat({self.spec})"

    def _repr_html_(self) -> str:
        bias = "none: a uniform grid" if self.bias is None else self.bias
        widths = f"{self.bits}: {self.exponent_bits} exponent, {self.mantissa_bits} mantissa"
        shown = [("bits", widths), ("bias", bias), ("specials", self.specials.value), ("max", f"{self.max:g}")]
        smallest = [("min normal", f"{self.min_normal:g}"), ("min subnormal", f"{self.min_subnormal:g}")]
        return notebook_table(self.name, [*shown, *smallest, ("source", self.source)])


FP8Format = FloatFormat


@cache
def format_from_spec(spec: str) -> FloatFormat:
    """The format that `FloatFormat.spec` describes (without source, aliases and note)."""
    try:
        name, e, m, bias, specials, flags = spec.split("|")
        subnormals, signed, zero, twos = (c == "1" for c in flags)
        return FloatFormat(
            name,
            int(e),
            int(m),
            None if bias == "none" else int(bias),
            Specials(specials),
            has_subnormals=subnormals,
            signed=signed,
            has_zero=zero,
            twos_complement=twos,
        )
    except ValueError as error:
        raise FormatError(f"malformed format spec {spec!r}; pass FloatFormat.spec as it is ({error})") from None
