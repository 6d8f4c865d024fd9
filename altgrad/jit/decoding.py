"""The value of one code by arithmetic on its bits, for Numba loops; `jit.code_table` has the facts."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import njit

from altgrad.jit.code_table import CODE_FIELDS
from altgrad.jit.machine import add, band, below, bits_of, bor, float_of, pick, shl, small_integer, sub
from altgrad.jit.memory import load_word
from altgrad.jit.template import table_reader

Codes = namedtuple("Codes", CODE_FIELDS)
read_codes = table_reader(Codes, lambda i, _: f"load_word(like, table, {i})", load_word=load_word)

_inline = njit(forceinline=True, error_model="numpy")


@_inline
def by_fields(code, facts):
    """(value, 1 if it is no number and the value void, else 0) of a uint32 code, by the fields of the code.

    A code below the first normal one counts steps from zero. As a mantissa one binade higher it is exact, and so is
    taking that binade's lower end away.
    """
    magnitude = band(code, facts.magnitude_mask)
    shifted = shl(magnitude, facts.dropped_bits)
    raised = float_of(add(shifted, facts.raised_base)) - float_of(facts.raised_base)
    bits = pick(below(magnitude, facts.first_normal), bits_of(raised), add(shifted, facts.normal_base))
    sign = band(shl(code, facts.sign_shift), facts.sign_mask)
    special = (below(magnitude, facts.first_special) == False) | (code == facts.special_code)  # noqa: E712
    return float_of(bor(bits, sign)), pick(special, np.uint32(1), np.uint32(0))


@_inline
def by_integer(code, facts):
    """As `by_fields` for a byte in two's complement; all are numbers."""
    negative = below(np.uint32(127), code)
    magnitude = small_integer(code, pick(negative, sub(np.uint32(256), code), code))
    value = magnitude * float_of(facts.step)
    return pick(negative, -value, value), np.uint32(0)
