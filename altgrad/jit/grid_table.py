"""One format under one rounding mode and policy, as the table of bit patterns that compiled kernels read.

The table is a row of 64-bit words in the order of `GRID_FIELDS`; for float32 arithmetic the kernels take the low 32
bits. No Numba: the same facts serve any compiled kernel.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache

import numpy as np

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat, Specials

NAN_PROBLEM, INF_PROBLEM = 1, 1 << 20  # threads add their flags, so each has room to be counted

GRID_FIELDS = (
    "zero",
    "one",
    "significand_width",  # 23 or 52
    "fraction_mask",
    "implicit_bit",
    "magnitude_mask",  # all bits but the sign
    "sign_mask",
    "inf_bits",
    "emin_field",  # exponent field of the format's emin in the arithmetic's own encoding
    "mantissa_bits",
    "dropped_bits",  # significand_width - M
    "lost_below_normal",  # M where there are no subnormals, else 0
    "shift_limit",  # a shift at which every significand lies below half a grid step
    "last_shift",  # largest defined shift
    "clamp_bits",  # magnitudes are limited to this before rounding
    "max_bits",
    "min_normal_bits",  # 2^emin
    "overflow_positive",
    "overflow_negative",
    "zero_sign",  # sign mask if -0 is kept, else 0
    "zero_addend",  # added to results: -0 keeps the sign of zero, +0 drops it
    "below_kept",  # kept_from - 1
    "kept_from",  # input magnitudes from here on pass through: inf and NaN, or NaN alone
    "kept_or",  # or-ed into those: turns inf into NaN under the nan policy
    "counted_below",  # input magnitudes that may count as overflow
    "nearest",
    "tie_to_even",
    "tie_away",
    "away_positive",
    "away_negative",
    "to_odd",
    "random_bits",
    "random_mask",
    "random_drop",  # 32 - random_bits
    "fixed_point",  # less the bits of 2^e: those of 2^(24 + M - e), which turns magnitudes into 24-bit fixed point steps
    "mantissa_field",  # taken from the bits of 2^e: those of 2^(e - M)
    "max_code",
    "overflow_code",
    "first_signed",  # smallest magnitude code that takes a sign: 1 where -0 has no code
    "code_sign_shift",
    "inf_sign",
    "code_base",
    "code_base_small",
    "inf_code",
    "nan_code",
    "inf_problem",
    "nan_problem",
    "code_sign",
    "complement_mask",  # 2^bits - 1 for two's complement codes, else 0
)


def float32_arithmetic_suffices(fmt: FloatFormat) -> bool:
    """Whether the grid can be worked on float32's bits; grids that reach into its subnormals go by float64's."""
    return fmt.emin >= -126


def addition_rounds(fmt: FloatFormat, wide: bool) -> bool:
    """Whether nearest-even can be done by one addition (see `jit.grid_rounding.nearest_even`)."""
    if (not fmt.has_subnormals and fmt.mantissa_bits > 0) or fmt.twos_complement:
        return False
    return wide or (fmt.mantissa_bits <= 22 and fmt.emax + 1 + 23 - fmt.mantissa_bits <= 127)


def settles_plainly(fmt: FloatFormat, rounding: Rounding, overflow: Overflow) -> bool:
    """Whether finite values beyond max become max, as well before rounding as after, and -0 stays -0."""
    to_max = overflow is not Overflow.NAN and overflow_to_inf(fmt, rounding, overflow) == (False, False)
    return to_max and fmt.has_negative_zero


def short_chance_suffices(fmt: FloatFormat, random_bits: int, wide: bool, plain: bool) -> bool:
    """Whether stochastic rounding fits 31-bit fixed point (see `jit.grid_rounding.by_short_chance`)."""
    steps_bits = fmt.mantissa_bits + (0 if plain and fmt.bias is None else 1)  # of everything below the roof
    return (
        not wide
        and steps_bits <= 7
        and random_bits == 24
        and addition_rounds(fmt, wide)
        and fmt.emin - fmt.mantissa_bits >= -103  # 2^(24 + M - emin) is a float32
    )


class Family(IntEnum):
    """Which rounding arithmetic a loop is compiled with."""

    BY_ADDITION = 0  # nearest-even in two additions
    BY_RULE = 1  # any deterministic mode
    BY_CHANCE = 2  # stochastic
    BY_SHORT_CHANCE = 3  # stochastic for at most 7 significant bits


SETTLED_ALIKE = (Family.BY_ADDITION, Family.BY_SHORT_CHANCE)  # need `jit.grid_rounding.settled_alike` only
DRAWING = (Family.BY_CHANCE, Family.BY_SHORT_CHANCE)  # take random words


def family_of(
    fmt: FloatFormat, rounding: Rounding, overflow: Overflow, random_bits: int, wide: bool, plain: bool = False
) -> Family:
    """The cheapest arithmetic that is exact for these options; `plain`: see `settles_plainly`."""
    stochastic = rounding is Rounding.STOCHASTIC
    # The general arithmetic alone turns inputs of inf into NaN, and knows that an overflow may have no code.
    if overflow is not Overflow.NAN and not (overflow is Overflow.INF and not fmt.has_inf):
        if rounding is Rounding.NEAREST_EVEN and addition_rounds(fmt, wide):
            return Family.BY_ADDITION
        if stochastic and short_chance_suffices(fmt, random_bits, wide, plain):
            return Family.BY_SHORT_CHANCE
    return Family.BY_CHANCE if stochastic else Family.BY_RULE


def special_codes(fmt: FloatFormat) -> tuple[int, int]:
    """(code of +inf, canonical NaN code), -1 where the format has none."""
    all_ones = 2**fmt.magnitude_bits - 1
    if fmt.specials is Specials.IEEE:
        inf = all_ones >> fmt.mantissa_bits << fmt.mantissa_bits
        return inf, inf + 2 ** (fmt.mantissa_bits - 1) if fmt.mantissa_bits else -1
    if fmt.specials is Specials.NAN_ONLY:
        return -1, all_ones
    if fmt.specials is Specials.FNUZ:
        return -1, all_ones + 1
    if fmt.specials is Specials.P3109:
        return all_ones, all_ones + 1
    return -1, -1


def overflow_to_inf(fmt: FloatFormat, rounding: Rounding, overflow: Overflow) -> tuple[bool, bool]:
    """Whether a (positive, negative) overflow becomes inf rather than max; the nan policy is the caller's."""
    if overflow is Overflow.INF:
        return True, True
    if overflow is not Overflow.NATIVE or not fmt.has_inf:
        return False, False
    if rounding in (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY, Rounding.STOCHASTIC):
        return True, True
    return rounding is Rounding.UP, rounding is Rounding.DOWN


@cache
def grid_table(
    fmt: FloatFormat, rounding: Rounding, overflow: Overflow, clamp: bool, random_bits: int, wide: bool
) -> np.ndarray:
    """The facts as uint64 words in the order of `GRID_FIELDS`; read-only, kept for the life of the process."""
    width, bias, total = (52, 1023, 64) if wide else (23, 127, 32)
    ones = 2**total - 1
    sign = 2 ** (total - 1)
    inf_bits = sign - 2**width

    def pattern(value: float) -> int:
        return int(np.array(value, np.float64 if wide else np.float32).view(np.uint64 if wide else np.uint32))

    quiet_nan = inf_bits + 2 ** (width - 1)
    beyond = [inf_bits if to_inf else pattern(fmt.max) for to_inf in overflow_to_inf(fmt, rounding, overflow)]
    if overflow is Overflow.NAN:
        beyond = [quiet_nan, quiet_nan]
    family = family_of(fmt, rounding, overflow, random_bits, wide)
    limited = family in SETTLED_ALIKE
    roof = (fmt.emax + 1 + bias) << width if limited else inf_bits
    counts_inf = overflow in (Overflow.SATURATE, Overflow.NAN)
    inf_code, nan_code = special_codes(fmt)
    m = fmt.mantissa_bits
    facts = {
        "zero": 0,
        "one": 1,
        "significand_width": width,
        "fraction_mask": 2**width - 1,
        "implicit_bit": 2**width,
        "magnitude_mask": sign - 1,
        "sign_mask": sign,
        "inf_bits": inf_bits,
        "emin_field": fmt.emin + bias,
        "mantissa_bits": m,
        "dropped_bits": width - m,
        "lost_below_normal": 0 if fmt.has_subnormals else m,
        "shift_limit": width + 2,
        "last_shift": total - 1,
        "clamp_bits": pattern(fmt.max) if clamp else roof,
        "max_bits": pattern(fmt.max),
        "min_normal_bits": (fmt.emin + bias) << width,
        "overflow_positive": beyond[0],
        "overflow_negative": beyond[1],
        "zero_sign": sign if fmt.has_negative_zero else 0,
        "zero_addend": sign if fmt.has_negative_zero else 0,
        "below_kept": inf_bits if overflow is Overflow.SATURATE else inf_bits - 1,
        "kept_from": inf_bits + 1 if overflow is Overflow.SATURATE else inf_bits,
        "kept_or": 2 ** (width - 1) if overflow is Overflow.NAN else 0,
        "counted_below": inf_bits + 1 if counts_inf else inf_bits,
        "nearest": ones if rounding in (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY) else 0,
        "tie_to_even": int(rounding is Rounding.NEAREST_EVEN),
        "tie_away": int(rounding is Rounding.NEAREST_AWAY),
        "away_positive": ones if rounding is Rounding.UP else 0,
        "away_negative": ones if rounding is Rounding.DOWN else 0,
        "to_odd": ones if rounding is Rounding.ODD else 0,
        "random_bits": random_bits,
        "random_mask": 2**random_bits - 1,
        "random_drop": 32 - random_bits,
        "fixed_point": (2 * bias + 24 + m) << width,
        "mantissa_field": m << width,
        "max_code": fmt.index_of(fmt.max),
        "overflow_code": max(inf_code, 0) if beyond[0] == inf_bits else fmt.index_of(fmt.max),
        "first_signed": 0 if fmt.has_negative_zero else 1,
        "code_sign_shift": total - 1 - fmt.magnitude_bits,
        "inf_sign": 2**fmt.magnitude_bits if inf_code >= 0 else 0,
        "code_base": (fmt.emin + bias - 1) << m,
        "code_base_small": (fmt.emin + bias) << m,
        "inf_code": max(inf_code, 0),
        "nan_code": max(nan_code, 0),
        "inf_problem": INF_PROBLEM if inf_code < 0 else 0,
        "nan_problem": NAN_PROBLEM if nan_code < 0 else 0,
        "code_sign": 2**fmt.magnitude_bits if fmt.signed else 0,
        "complement_mask": 2**fmt.bits - 1 if fmt.twos_complement else 0,
    }
    assert tuple(facts) == GRID_FIELDS
    table = np.array([facts[name] for name in GRID_FIELDS], dtype=np.uint64)
    table.setflags(write=False)
    return table
