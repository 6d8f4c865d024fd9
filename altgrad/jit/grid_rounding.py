"""Rounding, codes and random words as branch-free arithmetic on the bits of one element, for Numba loops.

Every function is written once and serves uint32 (float32 arithmetic) and uint64 (float64). `Grid` holds the facts of
one format under one rounding mode and policy as bit patterns; `jit.grid_table.py` fills it.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from altgrad.jit.grid_table import GRID_FIELDS
from altgrad.jit.machine import (
    add,
    band,
    below,
    bits_of,
    bor,
    bxor,
    float_of,
    low_word,
    mul,
    pick,
    shl,
    shr,
    small_integer,
    sub,
    truncated,
)
from altgrad.jit.memory import table_reader
from altgrad.jit.template import inlined
from altgrad.randomness import MULTIPLIERS

Grid = namedtuple("Grid", GRID_FIELDS)

_MOVED = {"emin_field": "exponent", "min_normal_bits": "bits", "max_bits": "bits"}
_move = f"Grid({', '.join(f'add(grid.{f}, {_MOVED[f]})' if f in _MOVED else f'grid.{f}' for f in GRID_FIELDS)})"
_namespace: dict = {"Grid": Grid, "add": add}
exec(f"def moved_grid(grid, exponent, bits):\n    return {_move}\n", _namespace)  # Numba has no loop over fields
_moved_grid = inlined(_namespace["moved_grid"])
read_grid = table_reader(Grid, alike=True)


@inlined
def scaled_grid(grid, s):
    """The grid whose values are s times as large, s a power of two; for what `jit.grid_table.settles_plainly`."""
    one = bits_of(s / s)
    exponent = sub(shr(bits_of(s), grid.significand_width), shr(one, grid.significand_width))
    return _moved_grid(grid, exponent, sub(bits_of(s), one))


@inlined
def nearest_even(magnitude, grid):
    """(magnitude bits, code) on the grid, ties to even, by adding C = 2^(e + width - M) and taking it away again.

    Next to C floats are 2^(e - M) apart, which is the grid spacing at e: the machine's addition rounds, and the sum's
    fraction is the number of grid steps.
    """
    field = shr(magnitude, grid.significand_width)
    exponent = field if below(grid.emin_field, field) else grid.emin_field
    pivot = float_of(shl(add(exponent, grid.dropped_bits), grid.significand_width))
    sum_ = float_of(magnitude) + pivot
    steps = band(bits_of(sum_), grid.fraction_mask)
    return bits_of(sum_ - pivot), add(shl(sub(exponent, grid.emin_field), grid.mantissa_bits), steps)


@inlined
def by_short_chance(magnitude, word, grid):
    """(magnitude bits, code), rounded stochastically in 32-bit fixed point with 24 bits after the point.

    For grids of at most 7 significant bits and R = 24; the same results as `by_chance`. Dividing by the grid spacing is
    exact, as it is a power of two; the carry out of the fraction is the step up. Float32 arithmetic only.
    """
    binade = band(magnitude, grid.inf_bits)
    binade = binade if below(grid.min_normal_bits, binade) else grid.min_normal_bits
    fixed = truncated(grid.zero, float_of(magnitude) * float_of(sub(grid.fixed_point, binade)))
    drawn = low_word(grid.zero, shr(word, np.uint32(8)))
    steps = shr(add(fixed, drawn), low_word(grid.zero, np.uint32(24)))
    spacing = float_of(sub(binade, grid.mantissa_field))
    value = bits_of(small_integer(grid.zero, steps) * spacing)
    return value, add(shr(sub(binade, grid.min_normal_bits), grid.dropped_bits), steps)


@inlined
def grid_position(magnitude, grid):
    """(significand, shift, exponent field): the grid spacing is `shift` bits above the significand's last bit."""
    field = shr(magnitude, grid.significand_width)
    subnormal = field == grid.zero
    fraction = band(magnitude, grid.fraction_mask)
    significand = fraction if subnormal else bor(fraction, grid.implicit_bit)
    own = grid.one if subnormal else field
    quantum = own if own > grid.emin_field else grid.emin_field
    shift = add(sub(quantum, own), grid.dropped_bits)
    shift = add(shift, grid.lost_below_normal) if field < grid.emin_field else shift
    return significand, shift, own


@inlined
def stepped(magnitude, remainder, away, shift, own, grid):
    """Magnitude bits after dropping the remainder and, if `away`, adding one grid step."""
    beyond = below(grid.significand_width, shift)  # the whole number is below one grid step
    base = grid.zero if beyond else sub(magnitude, remainder)
    field = sub(add(own, shift), grid.significand_width)
    step = shl(field, grid.significand_width) if beyond else shl(grid.one, shift if not beyond else grid.zero)
    return add(base, step) if away else base


@inlined
def by_rule(magnitude, negative, grid):
    """Magnitude bits rounded to the grid by any deterministic mode, from the masks that define it."""
    significand, shift, own = grid_position(magnitude, grid)
    capped = shift if shift < grid.shift_limit else grid.shift_limit
    full = shl(grid.one, capped)
    remainder = band(significand, sub(full, grid.one))
    odd = band(shr(significand, capped), grid.one)
    directed = grid.away_negative if negative else grid.away_positive
    directed = bor(directed, band(grid.to_odd, sub(odd, grid.one)))
    counted = band(add(remainder, remainder), bor(grid.nearest, directed))
    nudge = bor(bor(band(odd, grid.tie_to_even), grid.tie_away), band(sub(full, grid.one), directed))
    return stepped(magnitude, remainder, add(counted, nudge) > full, shift, own, grid)


@inlined
def by_chance(magnitude, word, grid):
    """Magnitude bits rounded away iff floor(frac * 2^R) + r >= 2^R, with r the upper R bits of the 32-bit word."""
    significand, shift, own = grid_position(magnitude, grid)
    capped = shift if shift < grid.shift_limit else grid.shift_limit
    remainder = band(significand, sub(shl(grid.one, capped), grid.one))
    above = shift if shift > grid.random_bits else grid.random_bits
    lower = sub(above, grid.random_bits)
    lower = lower if lower < grid.last_shift else grid.last_shift
    chance = shr(shl(remainder, sub(above, shift)), lower)
    drawn = shr(low_word(grid.zero, word), grid.random_drop)
    return stepped(magnitude, remainder, chance > sub(grid.random_mask, drawn), shift, own, grid)


@inlined
def settled_alike(rounded, x_bits, sign, grid, plain):
    """`settled` where both signs overflow to the same value and NaN and inf pass through unchanged.

    `plain` (a constant, see `jit.grid_table.settles_plainly`): `rounded` is at most max, and overflow is not told.
    """
    x_magnitude = bits_of(abs(float_of(x_bits)))
    special = below(grid.below_kept, x_magnitude)
    if plain:
        return pick(special, x_bits, bor(rounded, sign)), False
    over = below(grid.max_bits, rounded)
    magnitude = grid.overflow_positive if over else rounded
    payload = bits_of(float_of(bor(magnitude, sign)) + float_of(grid.zero_addend))
    counts = (over | (x_magnitude == grid.inf_bits)) & below(x_magnitude, grid.counted_below)
    return x_bits if special else payload, counts


@inlined
def code_alike(steps, x_bits, sign, grid, plain):
    """(code, problem) from a magnitude code that may lie beyond max, under the conditions of `settled_alike`."""
    code = steps if plain else (grid.overflow_code if below(grid.max_code, steps) else steps)
    code_sign = shr(sign, grid.code_sign_shift)
    signed = code if below(code, grid.first_signed) else bor(code, code_sign)
    x_magnitude = band(x_bits, grid.magnitude_mask)
    special = below(grid.below_kept, x_magnitude)
    is_nan = below(grid.inf_bits, x_magnitude)
    special_code = grid.nan_code if is_nan else bor(grid.inf_code, band(code_sign, grid.inf_sign))
    problem = grid.nan_problem if is_nan else grid.inf_problem
    return (special_code if special else signed), (problem if special else grid.zero)


@inlined
def settled(rounded, x_bits, sign, grid):
    """(payload bits, overflowed): overflow policy, sign of zero, NaN and inf put in place."""
    over = rounded > grid.max_bits
    beyond = grid.overflow_negative if sign != grid.zero else grid.overflow_positive
    magnitude = beyond if over else rounded
    kept_sign = band(sign, grid.zero_sign) if magnitude == grid.zero else sign
    x_magnitude = band(x_bits, grid.magnitude_mask)
    special = x_magnitude >= grid.kept_from
    payload = bor(x_bits, grid.kept_or) if special else bor(magnitude, kept_sign)
    counts = (over | (x_magnitude == grid.inf_bits)) & below(x_magnitude, grid.counted_below)
    return payload, counts


@inlined
def code_of(payload, grid):
    """(code, problem) of payload bits on the grid; problem is nonzero where NaN or inf has no code (then code 0)."""
    magnitude = band(payload, grid.magnitude_mask)
    sign = bxor(payload, magnitude)
    small = magnitude < grid.min_normal_bits
    shifted = bits_of(float_of(magnitude) + float_of(grid.min_normal_bits)) if small else magnitude
    code = sub(shr(shifted, grid.dropped_bits), grid.code_base_small if small else grid.code_base)
    code = (grid.inf_code if magnitude == grid.inf_bits else grid.nan_code) if magnitude >= grid.inf_bits else code
    problem = grid.inf_problem if magnitude == grid.inf_bits else grid.zero
    problem = grid.nan_problem if magnitude > grid.inf_bits else problem
    signed = (sign != grid.zero) & (magnitude <= grid.inf_bits) & (problem == grid.zero)
    flipped = (
        band(sub(grid.zero, code), grid.complement_mask)
        if grid.complement_mask != grid.zero
        else bor(code, grid.code_sign)
    )
    return (flipped if signed else code), problem


@inlined
def random_word(index, before, between):
    """32 random bits of element `index` (modulo 2^32) under two key words; all uint32. `altgrad.randomness` says why."""
    return mixed_word(mul(bxor(index, before), np.uint32(MULTIPLIERS[0])), between)


@inlined
def mixed_word(x, between):
    """What `random_word` makes of its first product."""
    x = bxor(bxor(x, shr(x, np.uint32(11))), between)
    x = mul(x, np.uint32(MULTIPLIERS[1]))
    x = bxor(x, shr(x, np.uint32(15)))
    x = mul(x, np.uint32(MULTIPLIERS[2]))
    return bxor(x, shr(x, np.uint32(14)))


@inlined
def mixed64(x):
    """SplitMix64's output for a uint64 input, as `randomness.splitmix64`."""
    z = add(x, np.uint64(0x9E3779B97F4A7C15))
    z = mul(bxor(z, shr(z, np.uint64(30))), np.uint64(0xBF58476D1CE4E5B9))
    z = mul(bxor(z, shr(z, np.uint64(27))), np.uint64(0x94D049BB133111EB))
    return bxor(z, shr(z, np.uint64(31)))


@inlined
def key_words(seed, stream, block):
    """(before, between), as `randomness.key_words`, from uint64 seed, stream and block."""
    mixed = mixed64(bxor(mixed64(bxor(mixed64(seed), stream)), block))
    return low_word(np.uint32(0), mixed), low_word(np.uint32(0), shr(mixed, np.uint64(32)))
