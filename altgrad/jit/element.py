"""The rounding of one element as a part of compiled loops: what every kernel that rounds to a grid shares."""

# ruff: noqa: F821  (names are bound to the template)
from __future__ import annotations

from typing import Any, NamedTuple

from altgrad.jit.grid_rounding import (
    by_chance,
    by_rule,
    by_short_chance,
    code_alike,
    code_of,
    nearest_even,
    settled,
    settled_alike,
)
from altgrad.jit.grid_table import DRAWING, SETTLED_ALIKE, Family
from altgrad.jit.machine import bits_of, bxor, float_of, widened
from altgrad.jit.template import part


class Arithmetic(NamedTuple):
    """How an element is rounded: the constants of the template."""

    FAMILY: int = int(Family.BY_ADDITION)
    WIDE: bool = False  # on float64's bits
    PLAIN: bool = False  # what lies beyond max becomes max before it is rounded, and -0 stays


def _rounded(v, y, word, grid):
    """(payload bits, overflowed, code, problem) of v from its quotient y by the scale and, where DRAWS, a random word."""
    x_bits = bits_of(widened(v, WIDE))
    y_bits = bits_of(widened(y, WIDE))
    magnitude = bits_of(abs(float_of(y_bits)))
    sign = bxor(y_bits, magnitude)
    roof = grid.max_bits if PLAIN else grid.clamp_bits
    magnitude = magnitude if magnitude < roof else roof
    if ALIKE:
        rounded, steps = by_short_chance(magnitude, word, grid) if DRAWS else nearest_even(magnitude, grid)
        payload, over = settled_alike(rounded, x_bits, sign, grid, PLAIN)
        code, problem = code_alike(steps, x_bits, sign, grid, PLAIN)
    else:
        rounded = by_chance(magnitude, word, grid) if DRAWS else by_rule(magnitude, sign != grid.zero, grid)
        payload, over = settled(rounded, x_bits, sign, grid)
        code, problem = code_of(payload, grid)
    return payload, over, code, problem


def rounding_of(arithmetic: Arithmetic) -> Any:
    """The arithmetic of one element (see `_rounded`) for other compiled loops."""
    return part(_rounded, arithmetic, ALIKE=arithmetic.FAMILY in SETTLED_ALIKE, DRAWS=arithmetic.FAMILY in DRAWING)
