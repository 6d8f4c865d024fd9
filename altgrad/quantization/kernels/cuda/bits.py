"""Rounding, policies, codes and random words on the bits of elements, as Triton functions.

The same definitions as `jit.grid_rounding.py` and the same tables (`jit.grid_table.py`), written for Triton: magnitudes
are unsigned integers of the arithmetic's own width (uint32, or uint64 where WIDE), a table's facts are scalars that a
program reads once. The issue of instructions, not memory, limits these kernels, so the casts of training
(`launch.is_lean`) have arithmetic of their own: a quotient by a reciprocal and its remainder, a rounding of two fused
additions, and no select that only another format or policy needs. `benchmarks.cuda_instructions` counts what is left
for each element.

Integer arguments may be Python numbers: Triton makes constants of those that are 1. `tl.cast` takes both.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from altgrad.formats.rounding import Rounding

ADDITION, NEAREST_EVEN, NEAREST_AWAY, TOWARD_ZERO, UP, DOWN, ODD, STOCHASTIC, SHORT_CHANCE = (
    tl.constexpr(i) for i in range(9)
)
MODES = {
    Rounding.NEAREST_EVEN: NEAREST_EVEN.value,
    Rounding.NEAREST_AWAY: NEAREST_AWAY.value,
    Rounding.TOWARD_ZERO: TOWARD_ZERO.value,
    Rounding.UP: UP.value,
    Rounding.DOWN: DOWN.value,
    Rounding.ODD: ODD.value,
    Rounding.STOCHASTIC: STOCHASTIC.value,
}


class Grid(NamedTuple):
    """One format under one rounding mode and policy: the fields of `GRID_FIELDS` that the functions below use."""

    emin_field: tl.tensor
    dropped_bits: tl.tensor
    lost_below_normal: tl.tensor
    clamp_bits: tl.tensor
    max_bits: tl.tensor
    min_normal_bits: tl.tensor
    overflow_positive: tl.tensor
    overflow_negative: tl.tensor
    zero_sign: tl.tensor
    kept_from: tl.tensor
    kept_or: tl.tensor
    counted_below: tl.tensor
    code_base: tl.tensor
    code_base_small: tl.tensor
    inf_code: tl.tensor
    nan_code: tl.tensor
    inf_problem: tl.tensor
    nan_problem: tl.tensor
    code_sign: tl.tensor
    complement_mask: tl.tensor
    code_sign_shift: tl.tensor
    fixed_point: tl.tensor
    mantissa_field: tl.tensor


@triton.jit
def fact(table, index: tl.constexpr, WIDE: tl.constexpr):
    """Entry of a table as uint32, or uint64 where WIDE."""
    value = tl.load(table + index)
    return value.to(tl.uint64, bitcast=True) if WIDE else value.to(tl.uint32)


@triton.jit
def read_grid(table, WIDE: tl.constexpr):
    """All facts of a table."""
    return Grid(
        fact(table, 0, WIDE),
        fact(table, 1, WIDE),
        fact(table, 2, WIDE),
        fact(table, 3, WIDE),
        fact(table, 4, WIDE),
        fact(table, 5, WIDE),
        fact(table, 6, WIDE),
        fact(table, 7, WIDE),
        fact(table, 8, WIDE),
        fact(table, 9, WIDE),
        fact(table, 10, WIDE),
        fact(table, 11, WIDE),
        fact(table, 12, WIDE),
        fact(table, 13, WIDE),
        fact(table, 14, WIDE),
        fact(table, 15, WIDE),
        fact(table, 16, WIDE),
        fact(table, 17, WIDE),
        fact(table, 18, WIDE),
        fact(table, 19, WIDE),
        fact(table, 20, WIDE),
        fact(table, 21, WIDE),
        fact(table, 22, WIDE),
    )


@triton.jit
def bits_of(x, WIDE: tl.constexpr):
    """Bit patterns of floats."""
    return x.to(tl.uint64, bitcast=True) if WIDE else x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits, WIDE: tl.constexpr):
    """Floats of bit patterns."""
    return bits.to(tl.float64, bitcast=True) if WIDE else bits.to(tl.float32, bitcast=True)


@triton.jit
def widen(v):
    """Loaded elements as float32 (float64 stays); bf16 by its bits, so that subnormals come through everywhere."""
    if v.dtype == tl.bfloat16:
        wide = (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif v.dtype == tl.float64:
        wide = v
    else:
        wide = v.to(tl.float32)
    return wide


# Triton's interpreter cuts float32 to bf16, where a GPU's conversion rounds to nearest even.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(r, dtype: tl.constexpr):
    """Results in the stored dtype, rounded once to nearest even; subnormals stay."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = r.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        kept = tl.where(r == r, rounded, bits | 0x400000)
        stored = (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        stored = r.to(dtype)
    return stored


@triton.jit
def round_magnitude(magnitude, negative, word, random_bits, grid, MODE: tl.constexpr, WIDE: tl.constexpr):
    """Magnitude bits rounded to the grid by the mode; `word` holds 32 random bits for STOCHASTIC."""
    W: tl.constexpr = 52 if WIDE else 23
    field = magnitude >> W
    if MODE == ADDITION:  # nearest even: next to the pivot floats are one grid step apart
        exponent = tl.where(field > grid.emin_field, field, grid.emin_field)
        pivot = float_of((exponent + grid.dropped_bits) << W, WIDE)
        return bits_of((float_of(magnitude, WIDE) + pivot) - pivot, WIDE)
    one = magnitude * 0 + 1
    fraction = magnitude & ((1 << W) - 1)
    significand = tl.where(field == 0, fraction, fraction | (1 << W))
    own = tl.where(field == 0, one, field)
    quantum = tl.where(own > grid.emin_field, own, grid.emin_field)
    shift = quantum - own + grid.dropped_bits
    shift = tl.where(field < grid.emin_field, shift + grid.lost_below_normal, shift)
    capped = tl.where(shift < W + 2, shift, one * (W + 2))
    full = one << capped
    rest = significand & (full - 1)
    odd = (significand >> capped) & 1
    if MODE == NEAREST_EVEN:
        away = rest + rest + odd > full
    elif MODE == NEAREST_AWAY:
        away = rest + rest >= full
    elif MODE == TOWARD_ZERO:
        away = magnitude != magnitude
    elif MODE == UP:
        away = (rest > 0) & (negative == 0)
    elif MODE == DOWN:
        away = (rest > 0) & (negative != 0)
    elif MODE == ODD:
        away = (rest > 0) & (odd == 0)
    else:
        wide_shift = shift.to(tl.uint64)
        draw = tl.cast(random_bits, tl.uint64)
        above = tl.where(wide_shift > draw, wide_shift, draw)
        lower = above - draw
        lower = tl.where(lower < 63, lower, lower * 0 + 63)
        chance = (rest.to(tl.uint64) << (above - wide_shift)) >> lower
        drawn = word.to(tl.uint64) >> (32 - draw)
        away = chance + drawn >= (drawn * 0 + 1) << draw
    beyond = shift > W  # the whole number is below one grid step
    base = tl.where(beyond, magnitude * 0, magnitude - rest)
    step = tl.where(beyond, (own + shift - W) << W, one << tl.where(beyond, shift * 0, shift))
    return tl.where(away, base + step, base)


@triton.jit
def pulled_apart(scale, low, high):
    """(2^p, m) of a float32 scale m * 2^p: 1 <= m < 2 unless p is clamped to low .. high."""
    exponent = ((scale.to(tl.uint32, bitcast=True) >> 23) & 0xFF).to(tl.int32) - 127
    exponent = tl.minimum(tl.maximum(exponent, tl.cast(low, tl.int32)), tl.cast(high, tl.int32))
    down = tl.where(exponent < 127, (127 - exponent) << 23, 0x400000).to(
        tl.float32, bitcast=True
    )  # 2^-127 is subnormal
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True), scale * down


@triton.jit
def balanced(a, b):
    """Two positive factors of the same product, exactly, whose exponents differ by one at most.

    Sums multiplied by one after the other then overflow, or leave the normal numbers, only where the result does.
    """
    moved = ((b.to(tl.int32, bitcast=True) >> 23) - (a.to(tl.int32, bitcast=True) >> 23)) >> 1
    moved = tl.minimum(tl.maximum(moved, -126), 126)
    up = ((127 + moved) << 23).to(tl.float32, bitcast=True)
    return a * up, b * ((127 - moved) << 23).to(tl.float32, bitcast=True)


@triton.jit
def finite_bits(v):
    """Magnitude bits (uint32) of float32 numbers, 0 for inf and NaN: compared as integers, their maximum is in any order."""
    bits = v.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits < 0x7F800000, bits, bits * 0)


@triton.jit
def settle(rounded, x_bits, sign, grid, WIDE: tl.constexpr):
    """(payload bits, overflowed): overflow policy, sign of zero, NaN and inf put in place."""
    INF: tl.constexpr = 0x7FF0000000000000 if WIDE else 0x7F800000
    MAGNITUDE: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    over = rounded > grid.max_bits
    magnitude = tl.where(over, tl.where(sign != 0, grid.overflow_negative, grid.overflow_positive), rounded)
    kept_sign = tl.where(magnitude == 0, sign & grid.zero_sign, sign)
    x_magnitude = x_bits & MAGNITUDE
    payload = tl.where(x_magnitude >= grid.kept_from, x_bits | grid.kept_or, magnitude | kept_sign)
    return payload, (over | (x_magnitude == INF)) & (x_magnitude < grid.counted_below)


@triton.jit
def code_of(payload, grid, WIDE: tl.constexpr):
    """(code, problem) of payload bits on the grid; problem is nonzero where NaN or inf has no code (then code 0)."""
    INF: tl.constexpr = 0x7FF0000000000000 if WIDE else 0x7F800000
    MAGNITUDE: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    magnitude = payload & MAGNITUDE
    small = magnitude < grid.min_normal_bits
    lifted = bits_of(float_of(magnitude, WIDE) + float_of(grid.min_normal_bits, WIDE), WIDE)
    code = tl.where(small, lifted, magnitude) >> grid.dropped_bits
    code = code - tl.where(small, grid.code_base_small, grid.code_base)
    is_inf, is_nan = magnitude == INF, magnitude > INF
    code = tl.where(is_inf, grid.inf_code, tl.where(is_nan, grid.nan_code, code))
    problem = tl.where(is_inf, grid.inf_problem, tl.where(is_nan, grid.nan_problem, magnitude * 0))
    negated = (magnitude * 0 - code) & grid.complement_mask
    flipped = tl.where(grid.complement_mask != 0, negated, code | grid.code_sign)
    signed = (payload != magnitude) & (magnitude <= INF) & (problem == 0)
    return tl.where(signed, flipped, code), problem


@triton.jit
def mixed64(x):
    """SplitMix64's output, as `randomness.splitmix64`."""
    z = x + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def key_words(key, block):
    """(before, between) of the key (a pointer to seed and stream) for elements of a block of 2^32; `altgrad.randomness`."""
    seed = tl.load(key).to(tl.uint64, bitcast=True)
    stream = tl.load(key + 1).to(tl.uint64, bitcast=True)
    mixed = mixed64(mixed64(mixed64(seed) ^ stream) ^ block)
    return mixed.to(tl.uint32), (mixed >> 32).to(tl.uint32)


@triton.jit
def random_words(index, before, between):
    """32 random bits of each element index (modulo 2^32, uint32) under two key words."""
    x = (index ^ before) * 0xED5AD4BB
    x = (x ^ (x >> 11) ^ between) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def round_element(v, y, word, random_bits, grid, MODE: tl.constexpr, WIDE: tl.constexpr):
    """(payload bits, overflowed) of quotients y of elements v (both float64 where WIDE); `word`: see `words_of`."""
    SIGN: tl.constexpr = 0x8000000000000000 if WIDE else 0x80000000
    bits = bits_of(y, WIDE)
    sign = bits & SIGN
    magnitude = bits ^ sign
    magnitude = tl.where(magnitude < grid.clamp_bits, magnitude, grid.clamp_bits)
    rounded = round_magnitude(magnitude, sign, word, random_bits, grid, MODE, WIDE)
    return settle(rounded, bits_of(v, WIDE), sign, grid, WIDE)


# -- the casts of training: finite magnitudes beyond max become max, -0 stays -0 (`launch.is_lean`) ------------------------


class Divisor(NamedTuple):
    """A float32 scale m * 2^p as what a quotient by it takes: 2^-p, fl(1/m), what 1/m lacks of it, m, and 2^p."""

    down: tl.tensor
    reciprocal: tl.tensor
    rest: tl.tensor
    significand: tl.tensor
    up: tl.tensor


@triton.jit
def divisor_of(scale):
    """A positive float32 scale taken apart; 1 <= m < 2, but for subnormal scales."""
    field = (scale.to(tl.uint32, bitcast=True) >> 23) & 0xFF
    field = tl.where(field < 1, field * 0 + 1, tl.where(field > 254, field * 0 + 254, field))
    down = tl.where(field < 254, (254 - field) << 23, field * 0 + 0x400000).to(tl.float32, bitcast=True)
    m = scale * down
    reciprocal = tl.math.div_rn(m * 0.0 + 1.0, m)
    rest = tl.fma(-reciprocal, m, 1.0) * reciprocal
    return Divisor(down, reciprocal, rest, m, (field << 23).to(tl.float32, bitcast=True))


@triton.jit
def lean_quotient(v, d):
    """|v| / scale in float32, rounded once where that is at least 2^-70; NaN and what exceeds 2^76 come out large.

    The first quotient is within one ulp, so its remainder is exact, and one more step rounds correctly (Markstein).
    """
    a = tl.minimum(tl.abs(v) * d.down, 1.2676506002282294e30)
    near = tl.fma(a, d.reciprocal, a * d.rest)
    return tl.fma(tl.fma(-near, d.significand, a), d.reciprocal, near)


@triton.jit
def lean_round(quotient, word, grid, MODE: tl.constexpr):
    """(magnitude, magnitude code) on the grid of |quotients|, which may be NaN or beyond max.

    ADDITION: next to 2^(e + 23 - M) floats are 2^(e - M) apart, the grid's spacing at e, so that adding it rounds and the
    sum's fraction counts grid steps. SHORT_CHANCE: 32-bit fixed point with 24 bits after the point, for at most 7
    significant bits and 24 random ones, as `jit.grid_rounding.by_short_chance`.
    """
    y = tl.minimum(quotient, grid.max_bits.to(tl.float32, bitcast=True))
    least = grid.min_normal_bits.to(tl.float32, bitcast=True)
    binade = (y.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    binade = tl.maximum(binade, least)
    bits = binade.to(tl.uint32, bitcast=True)
    if MODE == ADDITION:
        lift = ((grid.dropped_bits + 127) << 23).to(tl.float32, bitcast=True)
        sum_ = tl.fma(binade, lift, y)
        magnitude = tl.fma(binade, -lift, sum_)
        steps = sum_.to(tl.uint32, bitcast=True) & 0x7FFFFF
    else:
        fixed = (y * (grid.fixed_point - bits).to(tl.float32, bitcast=True)).to(tl.int32).to(tl.uint32, bitcast=True)
        steps = (fixed + (word >> 8)) >> 24
        spacing = (bits - grid.mantissa_field).to(tl.float32, bitcast=True)
        magnitude = steps.to(tl.int32, bitcast=True).to(tl.float32) * spacing
    return magnitude, steps + ((bits - grid.min_normal_bits) >> grid.dropped_bits)


@triton.jit
def lean_finite(v, KEEPS_INF: tl.constexpr):
    """Whether elements are rounded: NaN is not, nor inf where that keeps its place."""
    return tl.abs(v) < float("inf") if KEEPS_INF else v == v


@triton.jit
def signed_as(magnitude, v):
    """Magnitudes with the signs of v."""
    sign = v.to(tl.uint32, bitcast=True) & 0x80000000
    return (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def lean_code(code, v, grid, KEEPS_INF: tl.constexpr):
    """Codes of elements v whose magnitudes have these codes, as `code_of`; 0 where a NaN or inf has none."""
    sign = (v.to(tl.uint32, bitcast=True) >> grid.code_sign_shift) & grid.code_sign
    special = tl.zeros_like(code) + grid.nan_code
    if KEEPS_INF:
        of_inf = grid.inf_code | (tl.where(grid.inf_problem == 0, grid.code_sign, 0) & sign)
        special = tl.where(v == v, of_inf, special)
    return tl.where(lean_finite(v, KEEPS_INF), code | sign, special)


@triton.jit
def lean_problem(v, grid, KEEPS_INF: tl.constexpr):
    """The largest problem of elements v; masked ones are 0."""
    size = tl.abs(v)
    problem = tl.where(tl.max(size.to(tl.uint32, bitcast=True)) > 0x7F800000, grid.nan_problem, 0)
    if KEEPS_INF:
        number = tl.maximum(size, 0.0).to(tl.uint32, bitcast=True)  # NaN becomes 0
        problem = tl.maximum(problem, tl.where(tl.max(number) == 0x7F800000, grid.inf_problem, 0))
    return problem.to(tl.int32)


@triton.jit
def rounded(
    v,
    s,
    up,
    word,
    random_bits,
    grid,
    MODE: tl.constexpr,
    LEAN: tl.constexpr,
    KEEPS_INF: tl.constexpr,
    MANY: tl.constexpr,
    CODES: tl.constexpr,
):
    """(payload * up, code, problem) of elements v under a scale s, or MANY of them.

    Without CODES the last two mean nothing; LEAN leaves the problem to `lean_problem`.
    """
    if LEAN:
        quotient = tl.math.div_rn(tl.abs(v), s + tl.zeros_like(v)) if MANY else lean_quotient(v, divisor_of(s))
        magnitude, code = lean_round(quotient, word, grid, MODE)
        result, problem = tl.where(lean_finite(v, KEEPS_INF), signed_as(magnitude * up, v), v), code
        if CODES:
            code = lean_code(code, v, grid, KEEPS_INF)
    else:
        payload, _ = round_element(v, tl.math.div_rn(v, s + tl.zeros_like(v)), word, random_bits, grid, MODE, False)
        result, code, problem = float_of(payload, False) * up, payload, payload
        if CODES:
            code, problem = code_of(payload, grid, False)
    return result, code, problem


@triton.jit
def count(v, r, over, valid, nan_scale):
    """(amax, overflows, underflows, nonfinites, sse, sum_sq), float64 scalars, of elements v with results r."""
    wide, result = v.to(tl.float64), r.to(tl.float64)
    finite = (tl.abs(wide) < float("inf")) & valid
    both = finite & (tl.abs(result) < float("inf"))
    kept = tl.where(both, wide, 0.0)
    error = tl.where(both, wide - result, 0.0)
    return (
        tl.max(tl.where(finite, tl.abs(wide), 0.0)),
        tl.sum((over & valid & (nan_scale == 0)).to(tl.float64)),
        tl.sum(((wide != 0) & (result == 0) & valid).to(tl.float64)),
        tl.sum((valid & (finite == 0)).to(tl.float64)),
        tl.sum(error * error),
        tl.sum(kept * kept),
    )


@triton.jit
def store_counts(partials, program, amax, overflows, underflows, nonfinites, errors, squares):
    """Write a program's row of six partial statistics."""
    place = partials + program * 6
    tl.store(place, amax)
    tl.store(place + 1, overflows)
    tl.store(place + 2, underflows)
    tl.store(place + 3, nonfinites)
    tl.store(place + 4, errors)
    tl.store(place + 5, squares)
