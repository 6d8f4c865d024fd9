"""The careful loop of the fused measurement: one element after the other, in float64, whatever the numbers.

For the few tiles that `diagnostics.kernels.tiles` does not take: NaN, inf, numbers at the ends of float32, sums of ill condition.
"""

from __future__ import annotations

import numpy as np

from altgrad.diagnostics.kernels.tiles import (
    INF,
    MAGNITUDE,
    STEPS,
    TO_BIN,
    U0,
    U1,
    U23,
    U254,
    ULPS,
    UPDATES,
    WEIGHTS,
    F,
    grid_index,
    steps_between,
)
from altgrad.jit.machine import band, bits_of, float_of, low_word, shl, shr, sub
from altgrad.jit.memory import load
from altgrad.jit.storage import FLOAT32
from altgrad.jit.template import called, inlined

_W52, _W1173 = np.uint64(52), np.uint64(1173)


@inlined
def _weight_and_gradient(p, w_size, g_size, near_zero, has_gradient, grid):
    """Sizes, stiffness and the pair of one weight and its gradient, given as magnitude bits."""
    w_fine, g_fine = w_size < INF, g_size < INF
    x, y = np.float64(float_of(w_size)), np.float64(float_of(g_size))
    p[F.count] += 1
    p[F.w_zero] += w_size == U0
    p[F.w_nonfinite] += not w_fine
    if w_fine:
        p[F.w_amax] = max(p[F.w_amax], x)
        p[F.w_sum_sq] += x * x
    if has_gradient:
        p[F.g_count] += 1
        p[F.g_zero] += g_size == U0
        p[F.g_near_zero] += (g_size > U0) & (g_size < near_zero)
        p[F.g_nonfinite] += not g_fine
        if g_fine:
            p[F.g_amax] = max(p[F.g_amax], y)
            p[F.g_sum_sq] += y * y

    field = shr(w_size, U23)
    lowered = sub(field, grid.mantissa_bits) if grid.stiffness_field == U0 else grid.stiffness_field
    if not w_fine or field == U0 or lowered == U0 or lowered >= U254:  # below 0 it is a huge number
        return
    s = np.float64(float_of(shl(lowered, U23)))
    p[F.s_count] += 1
    p[F.s_sum] += s
    if has_gradient and g_fine:
        p[F.pairs] += 1
        p[F.pair_s_sum] += s
        p[F.pair_s_sum_sq] += s * s
        p[F.pair_s_min] = min(p[F.pair_s_min], s)
        p[F.pair_s_max] = max(p[F.pair_s_max], s)
        p[F.pair_g_sum] += y
        p[F.pair_g_sum_sq] += y * y
        p[F.pair_g_min] = min(p[F.pair_g_min], y)
        p[F.pair_g_max] = max(p[F.pair_g_max], y)
        p[F.pair_gs_sum] += y * s
        p[F.ratio_sum] += y / s
        p[F.below] += y < s


@inlined
def _ulps(w, z):
    """ULPs of the carrier between two finite numbers."""
    field = shr(band(bits_of(w), MAGNITUDE), U23)
    field = field if field > U0 else U1
    per_ulp = float_of(shl(sub(_W1173, low_word(_W52, field)), _W52))  # 2^(150 - field)
    return abs(np.float64(z) - np.float64(w)) * per_ulp


@called
def tile_with_care(p, tensors, scales, scale, divides, near_zero, has_gradient, grid, n, histograms):
    """Measure n elements into the fields p and the histograms, all of them; arguments as of `tile`."""
    w, g, a, z = tensors
    counts = histograms[0]
    for i in range(n):
        before, after = load(w, i, FLOAT32), load(z, i, FLOAT32)
        size, z_size = band(bits_of(before), MAGNITUDE), band(bits_of(after), MAGNITUDE)
        _weight_and_gradient(p, size, band(bits_of(load(g, i, FLOAT32)), MAGNITUDE), near_zero, has_gradient, grid)
        fine, both = size < INF, (size < INF) & (z_size < INF)
        s = load(scales, i, FLOAT32) if divides else scale
        index = steps = U0
        if fine:
            quotient = bits_of(float_of(size) / s)
            counts[WEIGHTS, shr(quotient, TO_BIN)] += 1
            index, value = grid_index(quotient, grid)
            error = np.float64(0.0) if grid.own else np.float64(abs(float_of(size) - value * s))
            p[F.error_sum] += error
            p[F.error_sum_sq] += error * error
            p[F.error_max] = max(p[F.error_max], error)
            p[F.on_grid] += error == 0
        if both:
            z_index, _ = grid_index(bits_of(float_of(z_size) / s), grid)
            steps = steps_between(index, z_index, bits_of(before), bits_of(after))
            p[F.moves] += 1
            p[F.flips] += steps > U0
            p[F.steps_sum] += np.float64(steps)
            p[F.steps_max] = max(p[F.steps_max], np.float64(steps))
            if steps > U0:
                counts[STEPS, shr(bits_of(np.float32(steps)), TO_BIN)] += 1
            if before != after:
                ulps = _ulps(before, after)
                p[F.moved] += 1
                p[F.ulp_sum] += ulps
                p[F.ulp_max] = max(p[F.ulp_max], ulps)
                counts[ULPS, shr(bits_of(np.float32(ulps)), TO_BIN)] += 1
        update = float_of(band(bits_of(load(a, i, FLOAT32) - before), MAGNITUDE))
        if not bits_of(update) < INF:
            p[F.u_nonfinite] += 1
        elif update > 0:
            p[F.attempted] += 1
            p[F.u_amax] = max(p[F.u_amax], np.float64(update))
            p[F.u_sum_sq] += np.float64(update) * np.float64(update)
            p[F.stalled] += both & (steps == U0)
            counts[UPDATES, shr(bits_of(update / s), TO_BIN)] += 1
