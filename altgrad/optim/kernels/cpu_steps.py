"""Fused optimizer steps on the CPU: one pass over weights, gradients and moments, compiled on first use.

Each step is a loop over tiles that stay in the first-level cache. A tile's weights are moved to where the rule wants
them (the *attempt*), handed to the quantization kernel's own compiled loop where they land on a grid, and what the
landing did is counted, or fed back, before the next tile. GridOptim and LNS-Madam round within their own loop. The steps
are C functions with the signature of `altgrad.quantization.kernels.cpu_loops`, run by the same threaded driver:

    table     the step's numbers (`Field`)                          x, out, codes   weights, gradients, first moment
    scales    one scale per `inner` elements, or 0 for `scale`     partials        six counts per COUNT_TILE elements

Arithmetic is float32 in the order of torch's kernels, with fused multiply-add where torch has it.
"""

# ruff: noqa: F821, SIM109, SIM113  (names are bound to the templates, and Numba compiles what is plain)
from __future__ import annotations

from functools import cache

import numpy as np
from numba import cfunc, njit, types

from altgrad.optim.kernels import cpu_parts
from altgrad.optim.kernels.cpu_parts import (
    COUNT_FIELDS,
    COUNT_TILE,
    TILE,
    Field,
    Landing,
    Rule,
    Variant,
    exponent_as_double,
    floor,
    power_of_two,
    threshold,
)
from altgrad.quantization.kernels import cpu_loops
from altgrad.quantization.kernels.cpu_bits import key_words, random_word
from altgrad.quantization.kernels.cpu_llvm import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    add,
    band,
    bits_of,
    bor,
    call_loop,
    float_of,
    load,
    load_word,
    low_word,
    scratch,
    shl,
    store,
    store_double,
    sub,
)


def _adam(w, g, m, v, extra, before, aim, kept, count, s, n):
    """Move `count` weights by AdamW; see `altgrad.optim.adam_math`."""
    emin_bits, relative, keep, beta2, rest2, root, eps, size, decayed = n
    for i in range(count):
        x = load(w, i, FLOAT32)
        pull = load(g, i, FLOAT32)
        step = np.float32(1)
        if SPACING:
            step = spacing(x, s, emin_bits, relative)
        if ON_GRADIENT:
            pull = pull * step
        first = lerp(load(m, i, FLOAT32), pull, keep)
        second = multiply_add(rest2 * pull, pull, load(v, i, FLOAT32) * beta2)
        bottom = np.sqrt(second) / root + (eps * step if ON_GRADIENT and ON_STEP else eps)
        bottom = np.float32(np.inf) if bottom == np.float32(0) else bottom
        top = first * step if ON_STEP else first
        store(v, i, second, FLOAT32)
        store(m, i, first, FLOAT32)
        if LANDING == NONE:
            store(w, i, x * decayed + (size * top) / bottom, FLOAT32)
        else:
            store(before, i, x, FLOAT32)
        if LANDING == ROUND or LANDING == ECO:
            store(aim, i, x * decayed + (size * top) / bottom, FLOAT32)
        if LANDING == ECO:
            store(kept, i, np.float32(0) if bottom == np.float32(np.inf) else bottom, FLOAT32)
        if LANDING == KAHAN:
            total = load(extra, i, BFLOAT16) + ((size * top) / bottom + (-decayed) * x)
            store(kept, i, total, FLOAT32)
            store(aim, i, x + total, FLOAT32)


def _feed_back(m, extra, before, aim, landed, kept, limit, share, count):
    """Put the rounding error where it will be worked off; what lies beyond max is dropped."""
    for i in range(count):
        target = load(aim, i, FLOAT32)
        y = load(landed, i, FLOAT32)
        within = limit if target > limit else (-limit if target < -limit else target)
        if LANDING == ECO:
            store(m, i, load(m, i, FLOAT32) + share * load(kept, i, FLOAT32) * (within - y), FLOAT32)
        else:
            exact = load(kept, i, FLOAT32) - (y - load(before, i, FLOAT32))
            store(extra, i, exact if within == target else within - y, BFLOAT16)


def _signs(w, g, m, before, aim, count, keep, rest2, size, decayed):
    """Move `count` weights by the sign of an average: Lion, and Signum."""
    zero = np.float32(0)
    for i in range(count):
        x = load(w, i, FLOAT32)
        pull = load(g, i, FLOAT32)
        held = load(m, i, FLOAT32)
        average = lerp(held, pull, keep)
        store(m, i, lerp(held, pull, rest2) if RULE == LION else average, FLOAT32)
        step = size if average > zero else (-size if average < zero else zero)
        target = x * decayed + step
        if LANDING == NONE:
            store(w, i, target, FLOAT32)
        else:
            store(before, i, x, FLOAT32)
            store(aim, i, target, FLOAT32)


def _normalised(pull, second, root, clip):
    """g / sqrt(v / (1 - beta^t)), limited to +-clip; 0 where v is."""
    size = np.sqrt(second / root)
    size = np.float32(np.inf) if size == np.float32(0) else size
    pull = pull / size
    pull = clip if pull > clip else pull
    return -clip if pull < -clip else pull


def _madam(w, g, v, before, aim, count, beta2, rest2, root, size, clip, bound):
    """Move `count` weights by factors: Madam."""
    zero = np.float32(0)
    for i in range(count):
        x = load(w, i, FLOAT32)
        pull = load(g, i, FLOAT32)
        second = multiply_add(rest2 * pull, pull, load(v, i, FLOAT32) * beta2)
        store(v, i, second, FLOAT32)
        pull = normalised(pull, second, root, clip)
        pull = pull if x > zero else (-pull if x < zero else pull * zero)
        target = x * exponential(pull * size)
        target = -bound if target < -bound else target
        target = bound if target > bound else target
        if LANDING == NONE:
            store(w, i, target, FLOAT32)
        else:
            store(before, i, x, FLOAT32)
            store(aim, i, target, FLOAT32)


def _pulls(w, g, v, before, aim, kept, count, s, n, index, one, two):
    """First half of LNS-Madam: weights, normalised gradients, random words; whether a weight is off the exponents."""
    beta2, rest2, root, clip = n
    off = np.uint32(0)
    for i in range(count):
        x = load(w, i, FLOAT32)
        pull = load(g, i, FLOAT32)
        second = multiply_add(rest2 * pull, pull, load(v, i, FLOAT32) * beta2)
        store(v, i, second, FLOAT32)
        store(before, i, x, FLOAT32)
        store(aim, i, normalised(pull, second, root, clip), FLOAT32)
        if STOCHASTIC:
            store(kept, i, float_of(random_word(add(index, low_word(index, i)), one, two)), FLOAT32)
        off = bor(off, band(bits_of(x * (np.float32(1) / s) if POWER else x / s), np.uint32(0x7FFFFF)))
    return off != np.uint32(0)


def _lns(w, before, aim, kept, count, s, size, low, high, roof):
    """Second half: move by exponents and round those; returns the weights that aimed beyond max.

    `aim` gets the difference that a count of attempted updates looks at.
    """
    beyond = 0
    scale = np.float64(s)
    for i in range(count):
        x = load(before, i, FLOAT32)
        y = abs(np.float64(x)) * (1.0 / scale) if POWER else abs(np.float64(x)) / scale
        start = exponent_as_double(bits_of(y)) - 1023.0 if EXACT else np.log2(y)
        step = size * np.float64(load(aim, i, FLOAT32))
        goal = start - step if x > np.float32(0) else start + step
        limited = roof if goal > roof else goal
        limited = start if limited < start else limited
        goal = limited if goal > start else goal
        if STOCHASTIC:
            whole = floor(goal)
            whole += 1.0 if goal - whole >= threshold(bits_of(load(kept, i, FLOAT32))) else 0.0
        else:
            whole = goal + 6755399441055744.0 - 6755399441055744.0  # to the nearest whole number, ties to even
        there = x != np.float32(0)
        beyond += 1 if there and goal > high else 0
        whole = low if whole < low else (high if whole > high else whole)
        value = np.float32(power_of_two(whole) * scale)
        value = value if x > np.float32(0) else -value
        value = np.float32(goal) if goal != goal else value  # NaN
        store(w, i, value if there else x, FLOAT32)
        store(aim, i, np.float32(1) if there and goal != start else np.float32(0), FLOAT32)
    return beyond


def _rungs(w, g, m, before, aim, kept, count, s, n, index, one, two):
    """First half of GridOptim: momentum, steps, random words; returns how many steps were clipped."""
    emin_bits, relative, keep, size, decayed, clip = n
    clipped = np.uint32(0)
    for i in range(count):
        x = load(w, i, FLOAT32)
        pull = load(m, i, FLOAT32) * keep + load(g, i, FLOAT32)
        store(m, i, pull, FLOAT32)
        rungs = pull * size
        clipped = add(clipped, np.uint32(1) if abs(rungs) > clip else np.uint32(0))
        rungs = clip if rungs > clip else rungs
        rungs = -clip if rungs < -clip else rungs
        step = rungs * spacing(x, s, emin_bits, relative) - x * decayed
        if LANDING == NONE:
            store(w, i, np.float32(np.float64(x) + np.float64(step)), FLOAT32)
        else:
            store(before, i, x, FLOAT32)
            store(aim, i, step, FLOAT32)
            if STOCHASTIC:
                store(kept, i, float_of(random_word(add(index, low_word(index, i)), one, two)), FLOAT32)
    return np.int64(clipped)


def _land_rungs(w, before, aim, kept, count, s, emin, relative, top):
    """Second half: round w + step, a float64, to its neighbours; returns the weights that aimed beyond max.

    A magnitude between k * ulp and (k + 1) * ulp goes up iff floor(frac * 2^32) + random >= 2^32 (stochastic), or to
    nearest, ties to even k: as the quantization kernels do it on float64, saturating at max.
    """
    beyond = 0
    scale = np.float64(s)
    up = 1.0 / relative
    least = float_of(shl(emin, np.uint64(52)))
    for i in range(count):
        target = np.float64(load(before, i, FLOAT32)) + np.float64(load(aim, i, FLOAT32))
        y = target * (1.0 / scale) if POWER else target / scale
        magnitude = abs(y)
        beyond += 1 if magnitude > top else 0
        magnitude = top if magnitude > top else magnitude
        binade = float_of(band(bits_of(magnitude), np.uint64(0x7FF0000000000000)))
        binade = least if binade < least or SPACING == 2 else binade
        inverse = float_of(sub(np.uint64(2046 << 52), bits_of(binade)))
        steps = magnitude * (inverse * up)
        whole = floor(steps)
        if STOCHASTIC:
            away = steps - whole >= threshold(bits_of(load(kept, i, FLOAT32)))
        else:
            half = whole * 0.5
            rest = steps - whole
            away = rest > 0.5 or (rest == 0.5 and floor(half) != half)
        landed = (whole + (1.0 if away else 0.0)) * (binade * relative)
        landed = float_of(bor(bits_of(landed), band(bits_of(y), np.uint64(1 << 63))))
        store(w, i, np.float32(landed * scale), FLOAT32)
    return beyond


def _step(table, w, g, m, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Elements start .. stop - 1."""
    word = np.uint64(0)
    v = np.int64(load_word(word, table, SECOND))
    extra = np.int64(load_word(word, table, EXTRA))
    round_loop = np.int64(load_word(word, table, ROUND_LOOP))
    round_table = np.int64(load_word(word, table, ROUND_TABLE))
    emin_bits = load_word(np.uint32(0), table, EMIN_BITS)
    emin = load_word(word, table, EMIN_FIELD)
    relative = np.float32(load_word(0.0, table, RELATIVE))
    top = load_word(0.0, table, LIMIT)
    keep = np.float32(load_word(0.0, table, KEEP))
    beta2 = np.float32(load_word(0.0, table, BETA2))
    rest2 = np.float32(load_word(0.0, table, REST2))
    root = np.float32(load_word(0.0, table, ROOT))
    eps = np.float32(load_word(0.0, table, EPS))
    size = np.float32(load_word(0.0, table, SIZE))
    exact_size = load_word(0.0, table, SIZE)
    decayed = np.float32(load_word(0.0, table, DECAYED))
    clip = np.float32(load_word(0.0, table, CLIP))
    share = np.float32(load_word(0.0, table, SHARE))
    bound = load_word(0.0, table, BOUND)
    before = scratch(TILE_BYTES)
    aim = scratch(TILE_BYTES)
    kept = scratch(TILE_BYTES)
    s = np.float32(scale)
    position = start
    while position < stop:
        count = min(stop - position, TILE - position % TILE)
        if channels > 1:
            count = min(count, inner - position % inner)
            s = load(scales, position // inner, FLOAT32)
        at = position * 4
        clipped, beyond = 0, 0
        if RULE == RUNGS or RULE == LNS:
            one, two = key_words(np.uint64(seed), np.uint64(stream), np.uint64(position >> 32))
            index = low_word(np.uint32(0), position)
        if RULE == RUNGS:
            numbers = (emin_bits, relative, keep, size, decayed, clip)
            clipped = rungs(w + at, g + at, m + at, before, aim, kept, count, s, numbers, index, one, two)
            if LANDING != NONE:
                beyond = land_rungs(w + at, before, aim, kept, count, s, emin, np.float64(relative), top)
        elif RULE == LNS:
            numbers = (beta2, rest2, root, clip)
            ends = (np.float64(np.int64(emin)) - 1023.0, np.log2(top), np.log2(bound / np.float64(s)))
            if pulls(w + at, g + at, m + at, before, aim, kept, count, s, numbers, index, one, two):
                beyond = lns_anywhere(w + at, before, aim, kept, count, s, -exact_size, *ends)
            else:
                beyond = lns(w + at, before, aim, kept, count, s, -exact_size, *ends)
        elif RULE == ADAM:
            numbers = (emin_bits, relative, keep, beta2, rest2, root, eps, size, decayed)
            adam(w + at, g + at, m + at, v + at, extra + position * 2, before, aim, kept, count, s, numbers)
        elif RULE == MADAM:
            roof = np.float32(bound)
            madam(w + at, g + at, m + at, before, aim, count, beta2, rest2, root, size, clip, roof)
        else:
            signs(w + at, g + at, m + at, before, aim, count, keep, rest2, size, decayed)
        if LANDING != NONE:
            limit = np.float32(top * np.float64(s))
            if RULE != RUNGS and RULE != LNS:
                span = (round_table, aim - at, w, 0, 0, np.float64(s), inner, 1, seed, stream, 0)
                call_loop(round_loop, span + (position, position + count))  # noqa: RUF005
            attempted, flips, stalled, crossed, over = tally(before, aim, w + at, limit, count)
            if RULE != RUNGS and RULE != LNS:
                beyond = over
            found = (attempted, flips, stalled, crossed, clipped, beyond)
            if LANDING == KAHAN or LANDING == ECO:
                feed_back(m + at, extra + position * 2, before, aim, w + at, kept, limit, share, count)
        if LANDING != NONE:
            place = partials + (position // COUNT_TILE) * (COUNT_FIELDS * 8)
            fresh = position % COUNT_TILE == 0
            slot = 0
            for number in found:
                held = 0.0 if fresh else load(place, slot, FLOAT64)
                store_double(place, slot, held + np.float64(number))
                slot += 1
        position += count
    return 0


_MARK = cpu_parts.stamp(__file__)
_SIGNATURE = types.int64(*cpu_loops.LOOP_ARGUMENTS.types)
_CONSTANTS = {
    **{member.name: int(member) for enum in (Rule, Landing, Field) for member in enum},
    "TILE_BYTES": 4 * TILE,
    "fma": cpu_parts.llvm_fma,
}
_kept: list = []  # compiled functions must outlive their addresses


@cache
def compiled(variant: Variant) -> int:
    """Address of one fused step, compiled or loaded from Numba's cache on first use."""

    def part(template, **parts):
        return njit(error_model="numpy")(cpu_parts.bind(template, variant, _MARK, **_CONSTANTS, **parts))

    multiply_add = part(cpu_parts._multiply_add)
    small = {
        "multiply_add": multiply_add,
        "lerp": part(cpu_parts._lerp, multiply_add=multiply_add),
        "spacing": part(cpu_parts._spacing),
        "normalised": part(_normalised),
        "exponential": part(cpu_parts._exponential),
    }
    rules = {"adam": _adam, "rungs": _rungs, "signs": _signs, "madam": _madam, "pulls": _pulls}
    loops = {name: part(template, **small) for name, template in rules.items()}
    loops |= {"lns": part(_lns, EXACT=True), "lns_anywhere": part(_lns, EXACT=False), "land_rungs": part(_land_rungs)}
    whole = {"tally": part(cpu_parts._tally), "feed_back": part(_feed_back), **loops}
    step = cpu_parts.bind(_step, variant, _MARK, **_CONSTANTS, **whole)
    entry = cfunc(_SIGNATURE, cache=True, error_model="numpy")(step)
    _kept.append(entry)
    return entry.address
