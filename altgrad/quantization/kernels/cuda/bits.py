"""Rounding, policies, codes and random words on the bits of elements, as Triton functions.

The same definitions as `jit.grid_rounding.py` and the same tables (`jit.grid_table.py`), written for Triton: magnitudes are unsigned
integers of the arithmetic's own width (uint32, or uint64 where WIDE), a table's facts are scalars that a program reads
once.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import GRID_FIELDS, grid_table
from altgrad.quantization.codec import code_dtype
from altgrad.quantization.plan import Plan
from altgrad.quantization.quantized import Quantized
from altgrad.quantization.stats import QuantStats

ADDITION, NEAREST_EVEN, NEAREST_AWAY, TOWARD_ZERO, UP, DOWN, ODD, STOCHASTIC = (tl.constexpr(i) for i in range(8))
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


_PICKED = [GRID_FIELDS.index(name) for name in Grid._fields]


@cache
def device_table(
    fmt: FloatFormat,
    rounding: Rounding,
    overflow: Overflow,
    clamp: bool,
    wide: bool,
    saturate_finite: bool,
    device: torch.device,
) -> torch.Tensor:
    """The facts that `read_grid` reads, as an int64 tensor on the device; kept for the life of the process.

    saturate_finite: finite elements become max even where the policy would give inf.
    """
    table = grid_table(fmt, rounding, overflow, clamp, 24, wide).copy()
    if saturate_finite:
        for name in ("overflow_positive", "overflow_negative"):
            table[GRID_FIELDS.index(name)] = table[GRID_FIELDS.index("max_bits")]
    return torch.from_numpy(table[_PICKED].view(np.int64)).to(device)


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


@triton.jit
def narrow(r, dtype: tl.constexpr):
    """Results in the stored dtype, rounded once to nearest even."""
    if dtype == tl.bfloat16:
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
        draw = random_bits.to(tl.uint64)
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
def random_words(index, key):
    """32 random bits of each int64 element index under the key (a pointer to seed and stream); see `altgrad.randomness`."""
    seed = tl.load(key).to(tl.uint64, bitcast=True)
    stream = tl.load(key + 1).to(tl.uint64, bitcast=True)
    mixed = mixed64(mixed64(mixed64(seed) ^ stream) ^ (index >> 32).to(tl.uint64))
    before, between = mixed.to(tl.uint32), (mixed >> 32).to(tl.uint32)
    x = (index.to(tl.uint32) ^ before) * 0xED5AD4BB
    x = (x ^ (x >> 11) ^ between) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def round_element(v, y, index, key, random_bits, grid, MODE: tl.constexpr, WIDE: tl.constexpr):
    """(payload bits, overflowed) of quotients y of elements v (both float64 where WIDE)."""
    SIGN: tl.constexpr = 0x8000000000000000 if WIDE else 0x80000000
    bits = bits_of(y, WIDE)
    sign = bits & SIGN
    magnitude = bits ^ sign
    magnitude = tl.where(magnitude < grid.clamp_bits, magnitude, grid.clamp_bits)
    word = magnitude
    if MODE == STOCHASTIC:
        word = random_words(index, key)
    rounded = round_magnitude(magnitude, sign, word, random_bits, grid, MODE, WIDE)
    return settle(rounded, bits_of(v, WIDE), sign, grid, WIDE)


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


def total(partials: torch.Tensor, elements: int) -> torch.Tensor:
    """The vector of `QuantStats` from rows of partial statistics."""
    sums = partials[:, 1:].sum(dim=0)
    amax = partials[:, :1].amax(dim=0) if len(partials) else partials.new_zeros(1)
    return torch.cat([amax, partials.new_full((1,), float(elements)), sums])


def on_device(x: torch.Tensor):
    """Context in which kernels launch on x's GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def key_tensor(key: tuple[int, int] | torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """(seed, stream) as an int64 tensor on the device."""
    if key is None or isinstance(key, torch.Tensor):
        return None if key is None else key.to(device)
    return torch.tensor(key, dtype=torch.int64).to(device)


class Outputs(NamedTuple):
    """What a launch writes to; None for what the plan does not want."""

    values: torch.Tensor | None
    codes: torch.Tensor | None
    problems: torch.Tensor | None  # int32, one per program
    partials: torch.Tensor | None  # float64, six per program


def outputs(plan: Plan, x: torch.Tensor, out: torch.Tensor | None, programs: int) -> Outputs:
    """Room for the results of so many programs over the contiguous x; values go straight to an `out` that is contiguous."""
    direct = out is not None and out.is_contiguous()
    return Outputs(
        (out if direct else torch.empty_like(x)) if plan.values else None,
        torch.empty_like(x, dtype=code_dtype(plan.grid)) if plan.codes else None,
        torch.zeros(programs, dtype=torch.int32, device=x.device) if plan.codes else None,
        torch.empty((programs, 6), dtype=torch.float64, device=x.device) if plan.stats else None,
    )


def collected(
    found: Outputs,
    out: torch.Tensor | None,
    elements: int,
    scales: torch.Tensor | None = None,
    upper: torch.Tensor | None = None,
) -> Quantized:
    """The results of a launch over so many elements."""
    values, codes, problems, partials = found
    if out is not None and values is not None and values is not out:
        values = out.copy_(values)
    stats = None if partials is None else QuantStats(total(partials, elements))
    missing = 0 if problems is None or not len(problems) else problems.amax()
    return Quantized(values, codes, scales, stats, upper, missing)
