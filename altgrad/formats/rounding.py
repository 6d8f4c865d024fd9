"""Rounding modes and overflow policies: their names and definitions.

With ulp the grid spacing at x and k a signed integer, rounding picks the result k * ulp from the two neighbours of
x / ulp. Overflow is decided afterwards, as if the exponent were unbounded: a result beyond the format's max overflows.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from altgrad.errors import OptionError


class Rounding(str, Enum):
    """How x / ulp becomes an integer k."""

    NEAREST_EVEN = "nearest_even"  # nearest; ties to even k (IEEE 754 roundTiesToEven)
    NEAREST_AWAY = "nearest_away"  # nearest; ties away from zero (roundTiesToAway)
    TOWARD_ZERO = "toward_zero"  # truncation (roundTowardZero)
    UP = "up"  # toward +inf (roundTowardPositive)
    DOWN = "down"  # toward -inf (roundTowardNegative)
    ODD = "odd"  # exact stays, inexact goes to the neighbour with odd k (Boldo and Melquiond 2008)
    STOCHASTIC = "stochastic"  # away from zero with probability frac(|x| / ulp), on `random_bits` bits


class Overflow(str, Enum):
    """What a result beyond the format's max becomes."""

    NATIVE = "native"  # formats with inf: IEEE 754-2019 7.4 (by rounding mode inf or max); all others saturate
    SATURATE = "saturate"  # +-max, also for an input of +-inf
    SATURATE_FINITE = "saturate_finite"  # +-max for finite inputs, also where the format has inf; +-inf stays
    INF = "inf"  # +-inf, also where the format has no code for it
    NAN = "nan"  # NaN, also for an input of +-inf and where the format has no code for it


_Option = TypeVar("_Option", bound=Enum)


def as_option(kind: type[_Option], value: _Option | str) -> _Option:
    """`value` as a member of the enum `kind`.

    Raises:
        OptionError: no such member (the valid names are listed).
    """
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(str(member.value) for member in kind)
        raise OptionError(f"{kind.__name__.lower()} {value!r} is not one of {names}") from None
