"""How the codes of a format become values by arithmetic on their bits: the row of words that loops read, and the reading.

Codes of more than a byte, and of the few formats whose small codes are no multiples of one step, are looked up in a table
of values instead.
"""

from __future__ import annotations

from collections import namedtuple
from enum import IntEnum
from functools import cache

import numpy as np

from altgrad.formats.scalar import FloatFormat, Specials
from altgrad.jit.machine import add, band, below, bits_of, bor, float_of, pick, shl, small_integer, sub
from altgrad.jit.memory import table_reader
from altgrad.jit.template import inlined

CODE_FIELDS = (
    "magnitude_mask",  # bits of a code below its sign
    "sign_mask",  # sign of a float32, 0 where codes have none
    "sign_shift",  # from the code's sign to it
    "dropped_bits",  # 23 - M
    "normal_base",  # what makes float32 bits of a shifted code
    "raised_base",  # the same for codes below min normal: one binade higher, of which its lower end is taken away
    "first_normal",  # magnitude codes from here on are normal numbers
    "first_special",  # magnitude codes from here on are no numbers
    "special_code",  # a code that is none either, or more than a byte
    "step",  # bits of the float32 that two's complement codes are multiples of
)


class Decoding(IntEnum):
    """How a code becomes a value."""

    BY_TABLE = 0
    BY_FIELDS = 1  # exponent and mantissa of the code are those of the value
    BY_INTEGER = 2  # the code is an integer in two's complement


def decoding_of(fmt: FloatFormat) -> Decoding:
    """The cheapest decoding that is exact for a format."""
    if fmt.bits > 8 or not fmt.has_zero or fmt.emin < -126 or not (fmt.has_subnormals or fmt.mantissa_bits == 0):
        return Decoding.BY_TABLE
    if fmt.twos_complement:
        return Decoding.BY_INTEGER if fmt.bits == 8 else Decoding.BY_TABLE
    return Decoding.BY_FIELDS


@cache
def code_table(fmt: FloatFormat) -> np.ndarray:
    """The facts as uint64 words in the order of `CODE_FIELDS`; read-only, kept for the life of the process."""
    magnitudes = fmt.magnitudes()
    lowest = 127 + (fmt.emin if fmt.bias is not None else 0)
    marks_nan = fmt.signed and fmt.specials in (Specials.FNUZ, Specials.P3109)
    facts = {
        "magnitude_mask": 2**fmt.magnitude_bits - 1,
        "sign_mask": 2**31 if fmt.signed else 0,
        "sign_shift": 31 - fmt.magnitude_bits,
        "dropped_bits": 23 - fmt.mantissa_bits,
        "normal_base": (lowest - 1) << 23,
        "raised_base": lowest << 23,
        "first_normal": 2**fmt.mantissa_bits,
        "first_special": len(magnitudes),
        "special_code": 2**fmt.magnitude_bits if marks_nan else 2**16,
        "step": int(np.float32(magnitudes[1]).view(np.uint32)),
    }
    table = np.array([facts[name] for name in CODE_FIELDS], dtype=np.uint64)
    table.setflags(write=False)
    return table


Codes = namedtuple("Codes", CODE_FIELDS)
read_codes = table_reader(Codes, alike=True)


@inlined
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


@inlined
def by_integer(code, facts):
    """As `by_fields` for a byte in two's complement; all are numbers."""
    negative = below(np.uint32(127), code)
    magnitude = small_integer(code, pick(negative, sub(np.uint32(256), code), code))
    value = magnitude * float_of(facts.step)
    return pick(negative, -value, value), np.uint32(0)
