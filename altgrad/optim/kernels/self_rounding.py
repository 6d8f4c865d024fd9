"""Rules that round by themselves, in two loops over a tile: GridOptim (in float64) and LNS-Madam (by exponents).

The first loop works in float32 and draws the random words, the second in float64: each fills its vector lanes.
"""

# ruff: noqa: F821  (names are bound to the templates, and Numba compiles what is plain)
from __future__ import annotations

import numpy as np

from altgrad.jit.grid_rounding import random_word
from altgrad.jit.machine import add, band, bits_of, bor, float_of, low_word, shl, sub
from altgrad.jit.memory import keep, kept, load, store
from altgrad.jit.storage import FLOAT32
from altgrad.optim.kernels.parts import exponent_as_double, floor, power_of_two, threshold


def _gather(g, m, count, momentum):
    """The momentum by itself, for rules that look at the whole tensor before they step."""
    for i in range(count):
        store(m, i, load(m, i, FLOAT32) * momentum + load(g, i, FLOAT32), FLOAT32)


def _grid_steps(w, g, m, before, moves, words, count, n, place):
    """First half of GridOptim: momentum, steps, random words; returns how many steps were clipped."""
    emin_bits, relative, momentum, rms, size, decayed, clip = n
    s, _, _, index, one, two = place
    clipped = np.uint32(0)
    for i in range(count):
        x = load(w, i, FLOAT32)
        if PULL == READY:
            pull = load(m, i, FLOAT32) / rms
        else:
            pull = load(m, i, FLOAT32) * momentum + load(g, i, FLOAT32)
            store(m, i, pull, FLOAT32)
        if PULL == NESTEROV:
            pull = multiply_add(pull, momentum, load(g, i, FLOAT32))
        grid_steps = pull * size
        clipped = add(clipped, np.uint32(1) if abs(grid_steps) > clip else np.uint32(0))
        grid_steps = clip if grid_steps > clip else grid_steps
        grid_steps = -clip if grid_steps < -clip else grid_steps
        step = grid_steps * spacing(x, s, emin_bits, relative) - x * decayed
        if LANDING == NONE:
            store(w, i, np.float32(np.float64(x) + np.float64(step)), FLOAT32)
        else:
            keep(before, i, x)
            keep(moves, i, step)
            if STOCHASTIC:
                keep(words, i, float_of(random_word(add(index, low_word(index, i)), one, two)))
    return np.int64(clipped)


def _land_steps(w, before, moves, words, count, s, emin, mantissa, top):
    """Second half: round w + step, a float64, to its neighbours; returns the weights that aimed beyond max.

    A magnitude between k * ulp and (k + 1) * ulp goes up iff floor(frac * 2^32) + random >= 2^32 (stochastic), or to
    nearest, ties to even k: as the quantization kernels do it on float64, saturating at max. All steps but one are exact.
    A target that is infinite, or no number, stays.
    """
    beyond = 0
    scale = np.float64(s)
    unit = scale if POWER else 1.0  # under a power of two the grid is scaled instead of the weights
    top = top * unit
    least = float_of(shl(emin, np.uint64(52))) * unit
    for i in range(count):
        target = np.float64(kept(before, i)) + np.float64(kept(moves, i))
        y = target if POWER else target / scale
        magnitude = abs(y)
        beyond += 1 if magnitude > top else 0
        magnitude = top if magnitude > top else magnitude
        binade = float_of(band(bits_of(magnitude), np.uint64(0x7FF0000000000000)))
        binade = least if binade < least or SPACING == 2 else binade
        gap = sub(bits_of(binade), mantissa)
        if STOCHASTIC:
            steps = floor(magnitude * float_of(sub(np.uint64((2046 + 32) << 52), gap)))  # in 2^-32 of a gap
            drawn = float_of(bor(low_word(emin, bits_of(kept(words, i))), np.uint64(0x433 << 52)))  # + 2^52
            whole = floor((steps + drawn) * 2.0**-32) - 2.0**20
        else:
            steps = magnitude * float_of(sub(np.uint64(2046 << 52), gap))
            whole = steps + 2.0**52 - 2.0**52  # ties to even
        landed = float_of(bor(bits_of(whole * float_of(gap)), band(bits_of(y), np.uint64(1 << 63))))
        landed = landed if POWER else landed * scale
        store(w, i, np.float32(landed if abs(target) < np.inf else target), FLOAT32)
    return beyond


def _pulls(w, g, v, before, moves, words, count, n, place):
    """First half of LNS-Madam: weights, normalised gradients, random words; whether a weight is off the exponents."""
    beta2, rest2, root, clip = n
    s, _, _, index, one, two = place
    off = np.uint32(0)
    for i in range(count):
        x = load(w, i, FLOAT32)
        pull = load(g, i, FLOAT32)
        second = multiply_add(rest2 * pull, pull, load(v, i, FLOAT32) * beta2)
        store(v, i, second, FLOAT32)
        keep(before, i, x)
        keep(moves, i, normalised(pull, second, root, clip))
        if STOCHASTIC:
            keep(words, i, float_of(random_word(add(index, low_word(index, i)), one, two)))
        off = bor(off, band(bits_of(x * (np.float32(1) / s) if POWER else x / s), np.uint32(0x7FFFFF)))
    return off != np.uint32(0)


def _lns(w, before, moves, words, count, s, size, low, high, roof):
    """Second half: move by exponents and round those; returns the weights that aimed beyond max.

    `moves` gets the difference that a count of attempted updates looks at.
    """
    beyond = 0
    scale = np.float64(s)
    for i in range(count):
        x = kept(before, i)
        y = abs(np.float64(x)) * (1.0 / scale) if POWER else abs(np.float64(x)) / scale
        start = exponent_as_double(bits_of(y)) - 1023.0 if EXACT else np.log2(y)
        step = size * np.float64(kept(moves, i))
        goal = start - step if x > np.float32(0) else start + step
        limited = roof if goal > roof else goal
        limited = start if limited < start else limited
        goal = limited if goal > start else goal
        if STOCHASTIC:
            whole = floor(goal)
            whole += 1.0 if goal - whole >= threshold(bits_of(kept(words, i))) else 0.0
        else:
            whole = goal + 6755399441055744.0 - 6755399441055744.0  # to the nearest whole number, ties to even
        there = x != np.float32(0)
        beyond += 1 if there and goal > high else 0
        whole = low if whole < low else (high if whole > high else whole)
        value = np.float32(power_of_two(whole) * scale)
        value = value if x > np.float32(0) else -value
        value = np.float32(goal) if goal != goal else value  # NaN
        store(w, i, value if there and abs(x) < np.float32(np.inf) else x, FLOAT32)
        keep(moves, i, np.float32(1) if there and goal != start else np.float32(0))
    return beyond
