"""The vector loops of the fused measurement: tiles of at most 512 finite, moderate numbers, summed in float32 lanes.

The grid index of y is read off one float32 addition: next to C = 2^(e + 23 - M) floats are 2^(e - M) apart, so the bits
of |y| + C exceed those of C by k = round(|y| / 2^(e - M)), ties to even, and the ordered index is (e - emin) * 2^M + k.

A tile is taken back, for `diagnostics.kernels.careful`, where float32 might not do: numbers that are not finite or whose squares
leave float32's range, and sums whose variance would drown in their rounding. What is left has sums right to 4e-6 at
worst (2^-24 for each of the 64 additions in a lane of eight), 1e-8 on random data; counts and extremes are exact.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from altgrad.diagnostics.fields import BINS, UPDATE_FIELDS
from altgrad.jit.machine import (
    add,
    band,
    below,
    bits_of,
    bxor,
    counted,
    float_of,
    pick,
    plus,
    plus_product,
    plus_square,
    shl,
    shr,
    small_integer,
    sub,
)
from altgrad.jit.memory import load, reload_code, store_code
from altgrad.jit.storage import FLOAT32
from altgrad.jit.template import called, inlined

TILE = 512
WEIGHTS, UPDATES, STEPS, ULPS = range(4)  # histograms
HISTOGRAM = BINS + 1  # entries; the last one counts what has no bin
COPIES = 4
SCRATCH_ROW = 4 * TILE  # bytes of a tile's bins for one histogram
ULP_SHIFT = 100  # ULPs moved are kept as multiples of 2^100, so that those of a zero weight are float32 numbers

F = namedtuple("F", UPDATE_FIELDS)(*range(len(UPDATE_FIELDS)))
Grid = namedtuple("Grid", ["mantissa_bits", "emin_field", "largest", "stiffness_field", "own"])

U0, U1 = np.uint32(0), np.uint32(1)
MAGNITUDE, INF = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
NO_BIN, TO_BIN = np.uint32(BINS), np.uint32(21)
U16, U23, U50, U254 = np.uint32(16), np.uint32(23), np.uint32(50), np.uint32(254)
LOW_HALF = np.uint32(0xFFFF)
ULP_BINS, INF_BIN = np.uint32(4 * ULP_SHIFT), np.uint32(4 * 255)
_F0 = np.float32(0.0)
_LEAST, _MOST = np.float32(2.0**-115), np.float32(2.0**120)  # float32 squares that were lost below _LEAST do not count
_MOST_WEIGHT = np.float32(2.0**43)  # up to here the factor of ULPs is a normal number


@inlined
def larger(a, b):
    """The larger of two magnitudes' bits."""
    return pick(below(a, b), b, a)


@inlined
def smaller(a, b):
    """The smaller of two magnitudes' bits."""
    return pick(below(a, b), a, b)


@inlined
def grid_index(magnitude, grid):
    """(index, rounded value) of the magnitude bits of a finite y."""
    kept = smaller(magnitude, bits_of(grid.largest))
    field = larger(shr(kept, U23), grid.emin_field)
    pivot_bits = shl(add(field, sub(U23, grid.mantissa_bits)), U23)
    raised = float_of(kept) + float_of(pivot_bits)
    index = add(shl(sub(field, grid.emin_field), grid.mantissa_bits), sub(bits_of(raised), pivot_bits))
    return pick(grid.own, magnitude, index), pick(grid.own, float_of(magnitude), raised - float_of(pivot_bits))


@inlined
def steps_between(before, after, w_bits, z_bits):
    """Steps of the grid from index `before` with the sign of w to index `after` with the sign of z."""
    apart = pick(below(before, after), sub(after, before), sub(before, after))
    return pick(below(bxor(w_bits, z_bits), U0), add(before, after), apart)


@called
def _sizes(w, g, near_zero, n):
    """Counts, largest magnitudes and sums of squares of weights and gradients."""
    w_zero, w_top, g_zero, g_near, g_top = U0, U0, U0, U0, U0
    ww, gg = _F0, _F0
    for i in range(n):
        x, y = load(w, i, FLOAT32), load(g, i, FLOAT32)
        w_size, g_size = band(bits_of(x), MAGNITUDE), band(bits_of(y), MAGNITUDE)
        w_zero, g_zero = counted(w_zero, w_size == U0), counted(g_zero, g_size == U0)
        g_near = counted(g_near, below(U0, g_size) & below(g_size, near_zero))
        w_top, g_top = larger(w_top, w_size), larger(g_top, g_size)
        ww, gg = plus_square(ww, x), plus_square(gg, y)
    return w_zero, w_top, ww, g_zero, g_near, g_top, gg


@called
def _pairs(w, g, grid, n):
    """Sums over pairs of stiffness S and gradient |g|, where the weight has a stiffness."""
    count, under, s_top, g_top = U0, U0, U0, U0
    s_low, g_low = INF, INF
    s_sum, s_sq, g_sum, g_sq, gs, ratio = _F0, _F0, _F0, _F0, _F0, _F0
    varies = grid.stiffness_field == U0
    floor = pick(varies, grid.mantissa_bits, U0)
    for i in range(n):
        field = shr(band(bits_of(load(w, i, FLOAT32)), MAGNITUDE), U23)
        has = below(floor, field)
        lowered = pick(varies, sub(field, grid.mantissa_bits), grid.stiffness_field)
        s = pick(has, shl(lowered, U23), U0)
        size = pick(has, band(bits_of(load(g, i, FLOAT32)), MAGNITUDE), U0)
        inverse = pick(has, shl(sub(U254, lowered), U23), U0)
        count, under = counted(count, has), counted(under, below(size, s))
        s_low, g_low = smaller(s_low, pick(has, s, INF)), smaller(g_low, pick(has, size, INF))
        s_top, g_top = larger(s_top, s), larger(g_top, size)
        s_sum, g_sum = plus(s_sum, float_of(s)), plus(g_sum, float_of(size))
        s_sq, g_sq = plus_square(s_sq, float_of(s)), plus_square(g_sq, float_of(size))
        gs = plus_product(gs, float_of(size), float_of(s))
        ratio = plus_product(ratio, float_of(size), float_of(inverse))
    return count, under, s_low, s_top, g_low, g_top, s_sum, s_sq, g_sum, g_sq, gs, ratio


@inlined
def _movement(w, z, scales, scale, reciprocal, divides, grid, n, w_bins, step_bins):
    """Alignment of w, steps from w to z; bins of |w / s| and of the steps (0: none) go to scratch."""
    on, e_top, flips, top, low, high, z_top = U0, U0, U0, U0, U0, U0, U0
    e_sum, e_sq = _F0, _F0
    for i in range(n):
        x, y = load(w, i, FLOAT32), load(z, i, FLOAT32)
        size, z_size = band(bits_of(x), MAGNITUDE), band(bits_of(y), MAGNITUDE)
        if divides:
            s = load(scales, i, FLOAT32)
            quotient, z_quotient = bits_of(float_of(size) / s), bits_of(float_of(z_size) / s)
        else:
            s = scale
            quotient, z_quotient = bits_of(float_of(size) * reciprocal), bits_of(float_of(z_size) * reciprocal)
        before, value = grid_index(quotient, grid)
        after, _ = grid_index(z_quotient, grid)
        gap = pick(grid.own, U0, band(bits_of(float_of(size) - value * s), MAGNITUDE))
        steps = steps_between(before, after, bits_of(x), bits_of(y))
        on, flips = counted(on, gap == U0), counted(flips, steps != U0)
        e_top, top, z_top = larger(e_top, gap), pick(top < steps, steps, top), larger(z_top, z_size)
        e_sum, e_sq = plus(e_sum, float_of(gap)), plus_square(e_sq, float_of(gap))
        low, high = add(low, band(steps, LOW_HALF)), add(high, shr(steps, U16))
        store_code(w_bins, i, shr(quotient, TO_BIN), 4)
        store_code(step_bins, i, shr(bits_of(small_integer(U0, steps)), TO_BIN), 4)
    return on, e_top, flips, top, low, high, z_top, e_sum, e_sq


@inlined
def _updates(w, a, scales, reciprocal, divides, n, step_bins, u_bins):
    """Attempted updates a - w; bins of |update / s| go to scratch."""
    tried, stalled, top, sq = U0, U0, U0, _F0
    for i in range(n):
        u = load(a, i, FLOAT32) - load(w, i, FLOAT32)
        size = band(bits_of(u), MAGNITUDE)
        quotient = float_of(size) / load(scales, i, FLOAT32) if divides else float_of(size) * reciprocal
        moves = below(U0, size)
        tried = counted(tried, moves)
        stalled = counted(stalled, moves & (reload_code(U0, step_bins, i) == U0))
        top, sq = larger(top, size), plus_square(sq, u)
        store_code(u_bins, i, pick(moves, shr(bits_of(quotient), TO_BIN), NO_BIN), 4)
    return tried, stalled, top, sq


@called
def _by_product(w, a, z, scale, grid, n, w_bins, step_bins, u_bins):
    reciprocal = np.float32(1.0) / scale
    m = _movement(w, z, w, scale, reciprocal, False, grid, n, w_bins, step_bins)
    return m, _updates(w, a, w, reciprocal, False, n, step_bins, u_bins)


@called
def _by_quotient(w, a, z, scales, grid, n, w_bins, step_bins, u_bins):
    m = _movement(w, z, scales, np.float32(1.0), np.float32(1.0), True, grid, n, w_bins, step_bins)
    return m, _updates(w, a, scales, np.float32(1.0), True, n, step_bins, u_bins)


@called
def _ulps(w, z, n, bins):
    """ULPs of the carrier from w to z, as multiples of 2^ULP_SHIFT; their bins (0: none) go to scratch."""
    moved, top, total = U0, U0, _F0
    for i in range(n):
        x = load(w, i, FLOAT32)
        way = abs(load(z, i, FLOAT32) - x)
        field = larger(shr(band(bits_of(x), MAGNITUDE), U23), U1)
        ulps = way * float_of(shl(sub(add(U50, np.uint32(127)), field), U23))  # way / 2^(field - 150) / 2^100
        moves = below(U0, bits_of(way))
        moved = counted(moved, moves)
        top, total = larger(top, bits_of(ulps)), plus(total, ulps)
        bin_ = smaller(add(shr(bits_of(ulps), TO_BIN), ULP_BINS), INF_BIN)
        store_code(bins, i, pick(moves, bin_, U0), 4)
    return moved, top, total


@inlined
def _squares_hold(total, largest):
    """Whether a float32 sum of squares or products lost none that count; all zero if the largest is."""
    return (largest == _F0) | ((total >= _LEAST) & (total <= _MOST))


@inlined
def _varies_enough(count, total, squares, largest):
    """Whether a variance can be told from float32 sums of numbers and squares."""
    n, t, q = np.float64(count), np.float64(total), np.float64(squares)
    return (largest == _F0) | (n * q - t * t > 2.0**-10 * n * q)


@called
def tile(p, tensors, scales, scale, divides, near_zero, has_gradient, counts, grid, n, scratch, histograms):
    """Measure n elements into the fields p and the histograms; False: nothing done, it needs care.

    Args:
        tensors: addresses of the weights before, gradients, attempted and stored weights.
        scales: address of a scale per element, if `divides`; else all are divided by `scale`, a power of two.
        near_zero: bits of the float32 number.
        counts: which histograms are wanted.
        scratch: address of 4 rows of SCRATCH_ROW bytes: the bins for each histogram.
        histograms: int32 [COPIES, 4, HISTOGRAM]; the copies are to be added up.
    """
    w, g, a, z = tensors
    w_bins, u_bins = scratch + SCRATCH_ROW * WEIGHTS, scratch + SCRATCH_ROW * UPDATES
    step_bins, ulp_bins = scratch + SCRATCH_ROW * STEPS, scratch + SCRATCH_ROW * ULPS
    w_zero, w_size, ww, g_zero, g_near, g_size, gg = _sizes(w, g, near_zero, n)
    w_top, g_top = float_of(w_size), float_of(g_size)
    if not (w_top <= _MOST_WEIGHT and g_size < INF and _squares_hold(ww, w_top) and _squares_hold(gg, g_top)):
        return False
    pairs, under, s_low, s_top, pg_low, pg_size, s_sum, s_sq, pg_sum, pg_sq, gs, ratio = _pairs(w, g, grid, n)
    pg_top = float_of(pg_size)
    if pairs > U0:
        exact = float_of(s_top) <= np.float32(128.0) * float_of(s_low)  # sums of few powers of two near each other
        if not (_squares_hold(s_sq, float_of(s_top)) and (exact or _varies_enough(pairs, s_sum, s_sq, s_top))):
            return False
        if not (_squares_hold(pg_sq, pg_top) and _squares_hold(gs, pg_top) and _squares_hold(ratio, pg_top)):
            return False
        if not _varies_enough(pairs, pg_sum, pg_sq, pg_top):
            return False
    if divides:
        m, u = _by_quotient(w, a, z, scales, grid, n, w_bins, step_bins, u_bins)
    else:
        m, u = _by_product(w, a, z, scale, grid, n, w_bins, step_bins, u_bins)
    on, e_size, flips, top, low, high, z_top, e_sum, e_sq = m
    tried, stalled, u_size, uu = u
    e_top, u_top = float_of(e_size), float_of(u_size)
    if not (
        z_top < INF and top <= MAGNITUDE and u_size < INF and _squares_hold(e_sq, e_top) and _squares_hold(uu, u_top)
    ):
        return False
    if not _varies_enough(n, e_sum, e_sq, e_top):
        return False
    moved, ulp_top, ulp_sum = _ulps(w, z, n, ulp_bins)
    if not float_of(ulp_top) <= _MOST:
        return False

    p[F.count] += n
    p[F.w_zero] += w_zero
    p[F.w_amax] = max(p[F.w_amax], w_top)
    p[F.w_sum_sq] += ww
    p[F.s_count] += pairs
    p[F.s_sum] += s_sum
    if has_gradient:
        p[F.g_count] += n
        p[F.g_zero] += g_zero
        p[F.g_near_zero] += g_near
        p[F.g_amax] = max(p[F.g_amax], g_top)
        p[F.g_sum_sq] += gg
        p[F.below] += under
        if pairs > U0:
            p[F.pairs] += pairs
            p[F.pair_s_sum] += s_sum
            p[F.pair_s_sum_sq] += s_sq
            p[F.pair_s_min] = min(p[F.pair_s_min], float_of(s_low))
            p[F.pair_s_max] = max(p[F.pair_s_max], float_of(s_top))
            p[F.pair_g_sum] += pg_sum
            p[F.pair_g_sum_sq] += pg_sq
            p[F.pair_g_min] = min(p[F.pair_g_min], float_of(pg_low))
            p[F.pair_g_max] = max(p[F.pair_g_max], pg_top)
            p[F.pair_gs_sum] += gs
            p[F.ratio_sum] += ratio
    p[F.error_sum] += e_sum
    p[F.error_sum_sq] += e_sq
    p[F.error_max] = max(p[F.error_max], e_top)
    p[F.on_grid] += on
    p[F.attempted] += tried
    p[F.u_amax] = max(p[F.u_amax], u_top)
    p[F.u_sum_sq] += uu
    p[F.stalled] += stalled
    p[F.moves] += n
    p[F.flips] += flips
    p[F.steps_sum] += low + 65536.0 * high
    p[F.steps_max] = max(p[F.steps_max], np.float64(top))
    p[F.moved] += moved
    p[F.ulp_sum] += np.float64(ulp_sum) * 2.0**ULP_SHIFT
    p[F.ulp_max] = max(p[F.ulp_max], np.float64(float_of(ulp_top)) * 2.0**ULP_SHIFT)
    for kind in range(4):  # no constants: each would have machine code of its own
        if counts[kind]:
            _count_bins(n, scratch + SCRATCH_ROW * kind, kind, histograms)
    return True


@called
def _count_bins(n, bins, kind, histograms):
    """Count the bins at an address; neighbours in different copies, so that no counter is waited for."""
    for i in range(0, n - 3, 4):
        for copy in range(COPIES):
            histograms[copy, kind, reload_code(U0, bins, i + copy)] += 1
    for i in range(n - n % 4, n):
        histograms[0, kind, reload_code(U0, bins, i)] += 1
