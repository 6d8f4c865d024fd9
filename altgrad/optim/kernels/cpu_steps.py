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
    double_of_word,
    exponent_as_double,
    floor,
    power_of_two,
)
from altgrad.quantization.kernels import cpu_loops
from altgrad.quantization.kernels.cpu_bits import key_words, random_word
from altgrad.quantization.kernels.cpu_llvm import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    add,
    band,
    below,
    bits_of,
    bor,
    call_loop,
    float_of,
    load,
    load_word,
    low_word,
    scratch,
    shl,
    shr,
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
        target = x * np.exp(pull * size)
        target = -bound if target < -bound else target
        target = bound if target > bound else target
        if LANDING == NONE:
            store(w, i, target, FLOAT32)
        else:
            store(before, i, x, FLOAT32)
            store(aim, i, target, FLOAT32)


def _off_exponents(w, count, s):
    """Whether a weight of the tile is neither zero nor a power of two of its scale."""
    found = np.uint64(0)
    for i in range(count):
        found = bor(found, band(bits_of(np.float64(load(w, i, FLOAT32)) / np.float64(s)), np.uint64(0xFFFFFFFFFFFFF)))
    return found != np.uint64(0)


def _lns(w, g, v, count, s, n, size, emin, top, bound, index, before, between):
    """Move `count` weights by exponents and round those: LNS-Madam; (attempted, flips, stalled, 0, 0, saturated)."""
    beta2, rest2, root, clip = n
    attempted, flips, stalled, beyond = 0, 0, 0, 0
    scale, low, high = np.float64(s), np.float64(np.int64(emin)) - 1023.0, np.log2(top)
    roof = np.log2(bound / scale)
    for i in range(count):
        x = load(w, i, FLOAT32)
        pull = load(g, i, FLOAT32)
        second = multiply_add(rest2 * pull, pull, load(v, i, FLOAT32) * beta2)
        store(v, i, second, FLOAT32)
        pull = normalised(pull, second, root, clip)
        y = abs(np.float64(x) / scale)
        start = exponent_as_double(bits_of(y)) - 1023.0 if EXACT else np.log2(y)
        step = size * np.float64(pull)
        aim = start - step if x > np.float32(0) else start + step
        limited = roof if aim > roof else aim
        limited = start if limited < start else limited
        aim = limited if aim > start else aim
        if STOCHASTIC:
            whole = floor(aim)
            drawn = double_of_word(random_word(add(index, low_word(index, i)), before, between))
            whole += 1.0 if floor((aim - whole) * 4294967296.0) + drawn >= 4294967296.0 else 0.0
        else:
            whole = aim + 6755399441055744.0 - 6755399441055744.0  # to the nearest whole number, ties to even
        beyond += 1 if x != np.float32(0) and aim > high else 0
        whole = low if whole < low else (high if whole > high else whole)
        value = np.float32(power_of_two(whole) * scale)
        value = value if x > np.float32(0) else -value
        value = np.float32(aim) if aim != aim else value  # NaN
        value = x if x == np.float32(0) else value
        tried, moved = x != np.float32(0) and aim != start, value != x
        attempted += 1 if tried else 0
        flips += 1 if moved else 0
        stalled += 1 if tried and not moved else 0
        store(w, i, value, FLOAT32)
    return attempted, flips, stalled, 0, 0, beyond


def _rungs(w, g, m, count, s, n, emin, mantissa, top, index, before, between):
    """Move `count` weights by momentum SGD in rungs, land the float64 targets, and count what became of them.

    Landing: a magnitude between neighbours k * ulp and (k + 1) * ulp goes up iff floor(frac * 2^32) + random >= 2^32
    (stochastic), or to nearest, ties to even k: as the quantization kernels do it on float64, saturating at max.
    """
    emin_bits, relative, keep, size, decayed, clip = n
    attempted, flips, stalled, crossed, clipped, beyond = 0, 0, 0, 0, 0, 0
    for i in range(count):
        x = load(w, i, FLOAT32)
        pull = load(m, i, FLOAT32) * keep + load(g, i, FLOAT32)
        store(m, i, pull, FLOAT32)
        rungs = pull * size
        clipped += 1 if abs(rungs) > clip else 0
        rungs = clip if rungs > clip else rungs
        rungs = -clip if rungs < -clip else rungs
        step = rungs * spacing(x, s, emin_bits, relative) - x * decayed
        here = np.float64(x)
        target = here + np.float64(step)
        if LANDING == NONE:
            store(w, i, np.float32(target), FLOAT32)
        else:
            y = target / np.float64(s)
            magnitude = abs(y)
            beyond += 1 if magnitude > top else 0
            magnitude = top if magnitude > top else magnitude
            field = shr(bits_of(magnitude), np.uint64(52))
            field = emin if below(field, emin) or SPACING == 2 else field
            finest = sub(field, mantissa)
            steps = magnitude * float_of(shl(sub(np.uint64(2046), finest), np.uint64(52)))
            whole = floor(steps)
            rest = steps - whole
            if STOCHASTIC:
                drawn = double_of_word(random_word(add(index, low_word(index, i)), before, between))
                away = floor(rest * 4294967296.0) + drawn >= 4294967296.0
            else:
                half = whole * 0.5
                away = rest > 0.5 or (rest == 0.5 and floor(half) != half)
            landed = (whole + (1.0 if away else 0.0)) * float_of(shl(finest, np.uint64(52)))
            landed = top if landed > top else landed
            landed = float_of(bor(bits_of(landed), band(bits_of(y), np.uint64(1 << 63))))
            value = np.float32(landed * np.float64(s))
            attempted += 1 if target != here else 0
            flips += 1 if value != x else 0
            stalled += 1 if (target != here) and (value == x) else 0
            crossed += 1 if x * value < np.float32(0) else 0
            store(w, i, value, FLOAT32)
    return attempted, flips, stalled, crossed, clipped, beyond


def _step(table, w, g, m, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Elements start .. stop - 1."""
    word = np.uint64(0)
    v = np.int64(load_word(word, table, SECOND))
    extra = np.int64(load_word(word, table, EXTRA))
    round_loop = np.int64(load_word(word, table, ROUND_LOOP))
    round_table = np.int64(load_word(word, table, ROUND_TABLE))
    emin_bits = load_word(np.uint32(0), table, EMIN_BITS)
    emin = load_word(word, table, EMIN_FIELD)
    mantissa = load_word(word, table, MANTISSA)
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
        found = (0, 0, 0, 0, 0, 0)
        if RULE == RUNGS or RULE == LNS:
            one, two = key_words(np.uint64(seed), np.uint64(stream), np.uint64(position >> 32))
            index = low_word(np.uint32(0), position)
            if RULE == RUNGS:
                numbers = (emin_bits, relative, keep, size, decayed, clip)
                found = rungs(w + at, g + at, m + at, count, s, numbers, emin, mantissa, top, index, one, two)
            else:
                numbers = (beta2, rest2, root, clip)
                rest = (-exact_size, emin, top, bound, index, one, two)
                if off_exponents(w + at, count, s):
                    found = lns_anywhere(w + at, g + at, m + at, count, s, numbers, *rest)
                else:
                    found = lns(w + at, g + at, m + at, count, s, numbers, *rest)
        else:
            if RULE == ADAM:
                numbers = (emin_bits, relative, keep, beta2, rest2, root, eps, size, decayed)
                adam(w + at, g + at, m + at, v + at, extra + position * 2, before, aim, kept, count, s, numbers)
            elif RULE == MADAM:
                roof = np.float32(bound)
                madam(w + at, g + at, m + at, before, aim, count, beta2, rest2, root, size, clip, roof)
            else:
                signs(w + at, g + at, m + at, before, aim, count, keep, rest2, size, decayed)
            if LANDING != NONE:
                span = (round_table, aim - at, w, 0, 0, np.float64(s), inner, 1, seed, stream, 0)
                call_loop(round_loop, span + (position, position + count))  # noqa: RUF005
                limit = np.float32(top * np.float64(s))
                attempted, flips, stalled, crossed, beyond = tally(before, aim, w + at, limit, count)
                found = (attempted, flips, stalled, crossed, 0, beyond)
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
    }
    rules = {"adam": _adam, "rungs": _rungs, "signs": _signs, "madam": _madam}
    loops = {name: part(template, **small) for name, template in rules.items()}
    loops["lns"] = part(_lns, EXACT=True, **small)
    loops["lns_anywhere"] = part(_lns, EXACT=False, **small)
    loops["off_exponents"] = part(_off_exponents)
    whole = {"tally": part(cpu_parts._tally), "feed_back": part(_feed_back), **loops}
    step = cpu_parts.bind(_step, variant, _MARK, **_CONSTANTS, **whole)
    entry = cfunc(_SIGNATURE, cache=True, error_model="numpy")(step)
    _kept.append(entry)
    return entry.address
