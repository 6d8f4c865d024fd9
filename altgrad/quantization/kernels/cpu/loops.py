"""The loops over elements, compiled on first use for each combination of storage, rounding family and outputs.

A loop works on tiles that stay in the first-level cache. Each is a C function of addresses, so that one threaded driver
(`jit.threads.py`) serves all of them; constants such as KIND are bound to a template's globals before it is compiled,
and the name of the result, by which Numba keeps it on disk, carries them with a stamp of the sources.

Statistics are taken in the loop that rounds, as if all were finite and the squares neither too large nor too small for
float32; where a tile's sums say that this may not hold, they are taken again with care, in float64.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

import numpy as np
from numba import cfunc, njit, types

from altgrad.jit import grid_rounding as cpu_bits
from altgrad.jit import grid_table as grid_facts
from altgrad.jit import machine as cpu_llvm
from altgrad.jit.grid_rounding import (
    by_chance,
    by_rule,
    by_short_chance,
    code_alike,
    code_of,
    key_words,
    nearest_even,
    random_word,
    read_grid,
    settled,
    settled_alike,
)
from altgrad.jit.grid_table import SETTLED_ALIKE, Family
from altgrad.jit.machine import (
    FLOAT32,
    FLOAT64,
    ITEM_BYTES,
    add,
    band,
    below,
    bits_of,
    bor,
    bxor,
    compute_zero,
    counted,
    float_of,
    load,
    load_code,
    low_word,
    narrowed,
    pick,
    plus_square,
    reload,
    scratch,
    store,
    store_code,
    store_double,
    stored,
    sub,
    widened,
)

BY_ADDITION, BY_RULE = int(Family.BY_ADDITION), int(Family.BY_RULE)
BY_CHANCE, BY_SHORT_CHANCE = int(Family.BY_CHANCE), int(Family.BY_SHORT_CHANCE)
DRAWING = (BY_CHANCE, BY_SHORT_CHANCE)  # families that take random words
TILE = 2048  # elements whose temporaries stay in the first-level cache
SUM_TILE = 512  # elements that are squared and summed in float32: few, so that their rounding errors stay few
LEAST_SUM, MOST_SUM = 2.0**-100, 2.0**120  # between them no float32 square in a sum can have been lost that counts
STATS_TILE = 4 * TILE  # elements per partial sum, whatever the number of threads
SCRATCH_BYTES = 8 * TILE
SHORT_RUN = 512  # runs of one scale shorter than this go through a buffer of scales
PARTIAL_BYTES = 64  # amax, overflow, underflow, nonfinite, sse, sum_sq, two unused

_SOURCES = [Path(module.__file__) for module in (cpu_bits, cpu_llvm, grid_facts)] + [Path(__file__)]
_STAMP = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:12]

# Names in the templates below that `_bind` replaces; the values here only say what they are.
KIND = COMPUTE_KIND = FAMILY = CODE_BYTES = 0
WIDE = VALUES = STATS = DIVIDE = PLAIN = False
ALIKE = False  # whether results settle alike for both signs
DRAWS = False  # whether random words are drawn
RUN = TILE  # elements per round of a loop
ITEM = MAGNITUDE_MASK = INF_BITS = FRACTION_MASK = 0
TINY = 0.0
rounded = span_by_reciprocal = span_by_division = fill = count_tile = square_tile = None

LOOP_ARGUMENTS = types.Tuple(
    # table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop
    [types.int64] * 5 + [types.float64] + [types.int64] * 7
)
_SIGNATURE = types.int64(*LOOP_ARGUMENTS.types)


class Variant(NamedTuple):
    """What one compiled loop does: the constants of its template."""

    KIND: int  # storage of x and of the values written
    FAMILY: int = BY_ADDITION
    WIDE: bool = False  # round on float64's bits
    VALUES: bool = True  # write quantized values
    CODE_BYTES: int = 0  # write codes: 0 none, 1 uint8, 4 int32
    STATS: bool = False  # accumulate statistics
    PLAIN: bool = False  # what lies beyond max becomes max before it is rounded, and -0 stays (no statistics then)


def _bind(template, variant: NamedTuple, **constants):
    """A copy of `template` that sees the variant's fields and `constants` as globals."""
    bound = {**variant._asdict(), **constants}
    plain = {k: v for k, v in bound.items() if isinstance(v, int)}
    label = "_".join(f"{k}{int(v)}" for k, v in sorted(plain.items())).lower()
    name = f"{template.__name__}_{label}_{_STAMP}"
    function = FunctionType(template.__code__, {**template.__globals__, **bound}, name)
    function.__qualname__ = name
    return function


def _rounded(v, y, word, grid):
    """(payload bits, overflowed, code, problem) of v from its quotient y by the scale and, where DRAWS, a random word."""
    x_bits = bits_of(widened(v, WIDE))
    y_bits = bits_of(widened(y, WIDE))
    magnitude = bits_of(abs(float_of(y_bits)))
    sign = bxor(y_bits, magnitude)
    roof = grid.max_bits if PLAIN else grid.clamp_bits
    magnitude = magnitude if magnitude < roof else roof
    if ALIKE:
        rounded, steps = by_short_chance(magnitude, word, grid) if DRAWS else nearest_even(magnitude, grid)
        payload, over = settled_alike(rounded, x_bits, sign, grid, PLAIN)
        code, problem = code_alike(steps, x_bits, sign, grid, PLAIN)
    else:
        rounded = by_chance(magnitude, word, grid) if DRAWS else by_rule(magnitude, sign != grid.zero, grid)
        payload, over = settled(rounded, x_bits, sign, grid)
        code, problem = code_of(payload, grid)
    return payload, over, code, problem


def _span(grid, x, out, codes, scales, count, scale, reciprocal, index, before, between):
    """Quantize `count` elements under one scale (by reciprocal) or one scale per element (DIVIDE).

    Returns (problems, overflows, underflows, bits of the largest |x|, sum of squared errors, sum of squares); the last
    three hold for finite x and results only.
    """
    problems, overflows, zeros_in, zeros_out, largest = grid.zero, grid.zero, grid.zero, grid.zero, grid.zero
    errors, squares = compute_zero(KIND), compute_zero(KIND)
    for i in range(count):
        v = load(x, i, KIND)
        s = load(scales, i, COMPUTE_KIND) if DIVIDE else scale
        y = v / s if DIVIDE else v * reciprocal
        word = random_word(add(index, low_word(index, i)), before, between) if DRAWS else index
        payload, over, code, problem = rounded(v, y, word, grid)
        value = narrowed(s, float_of(payload)) * s
        if VALUES or STATS:
            store(out, i, value, KIND)
        if CODE_BYTES:
            problems = bor(problems, problem)
            store_code(codes, i, code, CODE_BYTES)
        if STATS:
            q = stored(value, KIND)
            mask = low_word(bits_of(v), np.uint64(MAGNITUDE_MASK))
            size = band(bits_of(v), mask)
            overflows = counted(overflows, over)
            zeros_in = counted(zeros_in, size == 0)
            zeros_out = counted(zeros_out, band(bits_of(q), mask) == 0)
            largest = pick(below(largest, size), size, largest)
            errors, squares = plus_square(errors, v - q), plus_square(squares, v)
    return problems, overflows, sub(zeros_out, zeros_in), largest, errors, squares


def _count(x, count):
    """(amax, nonfinites) of a tile, by integer comparisons."""
    zero = bits_of(compute_zero(KIND))
    mask = low_word(zero, np.uint64(MAGNITUDE_MASK))
    inf = low_word(zero, np.uint64(INF_BITS))
    largest, nonfinites = zero, zero
    for i in range(count):
        v = band(bits_of(load(x, i, KIND)), mask)
        finite = pick(below(v, inf), v, zero)
        largest = pick(below(largest, finite), finite, largest)
        nonfinites = counted(nonfinites, below(v, inf) == False)  # noqa: E712
    return widened(float_of(largest), True), float(nonfinites)


def _square(x, q, count):
    """(sum of squared errors, sum of squares) in float64 over elements finite on both sides; in vector lanes."""
    errors, squares = 0.0, 0.0
    for i in range(count):
        v = widened(load(x, i, KIND), True)
        error = v - widened(reload(q, i, KIND), True)
        both = abs(error) < np.inf
        error = error if both else 0.0
        v = v if both else 0.0
        errors += error * error
        squares += v * v
    return errors, squares


def _fill(buffer, scales, position, inner, channels, count, scale):
    """The scale of each of `count` elements from `position` on; `scale` for all of them if there is one channel."""
    if channels == 1:
        for i in range(count):
            store(buffer, i, scale, COMPUTE_KIND)
        return
    if inner == 1:
        done, channel = 0, position % channels
        while done < count:
            length = min(channels - channel, count - done)
            for i in range(length):
                store(buffer, done + i, load(scales, channel + i, COMPUTE_KIND), COMPUTE_KIND)
            done += length
            channel = 0
        return
    channel = (position // inner) % channels
    run = inner - position % inner
    done = 0
    while done < count:
        length = min(run, count - done)
        s = load(scales, channel, COMPUTE_KIND)
        for i in range(length):
            store(buffer, done + i, s, COMPUTE_KIND)
        done += length
        run = inner
        channel = channel + 1 if channel + 1 < channels else 0


def _loop(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Elements start .. stop - 1 (in memory order); returns the problems met while encoding."""
    nil = compute_zero(KIND)
    grid = read_grid(bits_of(widened(nil, WIDE)), table)
    s = narrowed(nil, scale)
    if scales != 0 and channels == 1:
        s = load(scales, 0, COMPUTE_KIND)
    buffer = scratch(SCRATCH_BYTES)
    buffered = nil  # the one scale that the buffer holds, 0 for another content
    period = inner * channels
    values = scratch(SCRATCH_BYTES)
    before, between = np.uint32(0), np.uint32(0)
    problems = grid.zero
    position = start
    while position < stop:
        count = min(stop - position, RUN - position % RUN)
        per_element = False
        if channels > 1:
            if inner >= SHORT_RUN:
                count = min(count, inner - position % inner)
                s = load(scales, (position // inner) % channels, COMPUTE_KIND)
            else:
                per_element = True
                if RUN % period != 0 or position == start or position % RUN != 0 or count < RUN:
                    fill(buffer, scales, position, inner, channels, count, s)
        if DRAWS:
            before, between = key_words(np.uint64(seed), np.uint64(stream), np.uint64(position >> 32))
        index = low_word(np.uint32(0), position)
        x_here = x + position * ITEM
        in_place = STATS and (out == x or not VALUES)
        out_here = values if in_place else out + position * ITEM
        codes_here = codes + position * CODE_BYTES
        power_of_two = band(bits_of(s), low_word(bits_of(s), np.uint64(FRACTION_MASK))) == 0
        reciprocal = narrowed(nil, 1.0) / s
        tiny = narrowed(nil, TINY)
        if not per_element and power_of_two and s >= tiny and reciprocal >= tiny:
            found, overflows, underflows, top, errors, squares = span_by_reciprocal(
                grid, x_here, out_here, codes_here, buffer, count, s, reciprocal, index, before, between
            )
        else:
            if not per_element and s != buffered:
                for i in range(min(RUN, stop - start)):
                    store(buffer, i, s, COMPUTE_KIND)
                buffered = s
            found, overflows, underflows, top, errors, squares = span_by_division(
                grid, x_here, out_here, codes_here, buffer, count, s, reciprocal, index, before, between
            )
        problems = bor(problems, found)
        if STATS:
            largest, nonfinites = widened(float_of(top), True), 0.0
            errors, squares = widened(errors, True), widened(squares, True)
            if not (min(errors, squares) >= LEAST_SUM and max(errors, squares) <= MOST_SUM):
                largest, nonfinites = count_tile(x_here, count)
                errors, squares = square_tile(x_here, out_here, count)
            record(partials, position, largest, float(overflows), float(underflows), nonfinites, errors, squares)
            if VALUES and in_place:
                for i in range(count):
                    store(out + position * ITEM, i, reload(values, i, KIND), KIND)
        position += count
    return np.int64(problems)


def _decode(table, codes, out, unused, scales, scale, inner, channels, entries, unused_too, partials, start, stop):
    """Values of the codes start .. stop - 1: table[code] * scale, where `table` has `entries` float64 or float32."""
    nil = compute_zero(KIND)
    s = narrowed(nil, scale)
    if scales != 0 and channels == 1:
        s = load(scales, 0, COMPUTE_KIND)
    buffer = scratch(SCRATCH_BYTES)
    scaled = scratch(SCRATCH_BYTES)
    by_table = channels == 1 and entries <= TILE
    if by_table:
        for i in range(entries):
            store(scaled, i, load(table, i, COMPUTE_KIND) * s, KIND)
    position = start
    while position < stop:
        count = min(stop - position, TILE - position % TILE)
        codes_here = codes + position * CODE_BYTES
        out_here = out + position * ITEM
        if by_table:
            for i in range(count):
                store(out_here, i, load(scaled, load_code(codes_here, i, CODE_BYTES), KIND), KIND)
        else:
            fill(buffer, scales, position, inner, channels, count, s)
            for i in range(count):
                value = load(table, load_code(codes_here, i, CODE_BYTES), COMPUTE_KIND)
                store(out_here, i, value * load(buffer, i, COMPUTE_KIND), KIND)
        position += count
    return np.int64(0)


def _amax(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Largest finite magnitude of each STATS_TILE of elements, as float64, into `partials`."""
    zero = bits_of(compute_zero(KIND))
    mask = low_word(zero, np.uint64(MAGNITUDE_MASK))
    inf = low_word(zero, np.uint64(INF_BITS))
    position = start
    while position < stop:
        count = min(stop - position, STATS_TILE)
        x_here = x + position * ITEM
        largest = zero
        for i in range(count):
            v = band(bits_of(load(x_here, i, KIND)), mask)
            v = v if below(v, inf) else zero
            largest = v if below(largest, v) else largest
        store_double(partials, position // STATS_TILE, widened(float_of(largest), True))
        position += count
    return np.int64(0)


@njit(error_model="numpy")
def record(partials, position, largest, overflows, underflows, nonfinites, errors, squares):
    """Add a tile's statistics to its partial sums."""
    place = partials + (position // STATS_TILE) * PARTIAL_BYTES
    fresh = position % STATS_TILE == 0
    for slot, value in enumerate((largest, overflows, underflows, nonfinites, errors, squares)):
        held = 0.0 if fresh else load(place, slot, FLOAT64)
        store_double(place, slot, max(held, value) if slot == 0 else held + value)


@njit(error_model="numpy", cache=True, nogil=True)
def total(partials, count, elements, result):
    """Add partial statistics in order into the seven fields of a QuantStats vector."""
    largest, overflows, underflows, nonfinites, errors, squares = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for tile in range(count):
        place = partials + tile * PARTIAL_BYTES
        largest = max(largest, load(place, 0, FLOAT64))
        overflows += load(place, 1, FLOAT64)
        underflows += load(place, 2, FLOAT64)
        nonfinites += load(place, 3, FLOAT64)
        errors += load(place, 4, FLOAT64)
        squares += load(place, 5, FLOAT64)
    for slot, value in enumerate((largest, float(elements), overflows, underflows, nonfinites, errors, squares)):
        store_double(result, slot, value)


_OPTIONS = {"error_model": "numpy"}
_kept: list = []  # compiled functions must outlive their addresses


def _constants(kind: int) -> dict:
    wide = kind == FLOAT64
    return {
        "COMPUTE_KIND": FLOAT64 if wide else FLOAT32,
        "ITEM": ITEM_BYTES[kind],
        "MAGNITUDE_MASK": 2 ** (63 if wide else 31) - 1,
        "INF_BITS": 0x7FF << 52 if wide else 0xFF << 23,
        "FRACTION_MASK": 2 ** (52 if wide else 23) - 1,
        "TINY": 2.0**-1022 if wide else 2.0**-126,
    }


def _address(template, variant: NamedTuple, **bound) -> int:
    loop = cfunc(_SIGNATURE, cache=True, **_OPTIONS)(_bind(template, variant, **bound))
    _kept.append(loop)
    return loop.address


def _family_constants(variant: Variant) -> dict:
    constants = _constants(variant.KIND)
    constants["ALIKE"] = variant.FAMILY in SETTLED_ALIKE
    constants["DRAWS"] = variant.FAMILY in DRAWING
    return constants


def rounding_of(variant: Variant):
    """The arithmetic of one element (see `_rounded`) as a function for other compiled loops."""
    return njit(**_OPTIONS)(_bind(_rounded, variant, **_family_constants(variant)))


@cache
def compiled(variant: Variant) -> int:
    """Address of the loop of one variant, compiled or loaded from Numba's cache on first use."""
    constants = _family_constants(variant)
    constants["RUN"] = SUM_TILE if variant.STATS else TILE
    inner = {"rounded": rounding_of(variant), **constants}
    parts = {
        "span_by_reciprocal": njit(**_OPTIONS)(_bind(_span, variant, DIVIDE=False, **inner)),
        "span_by_division": njit(**_OPTIONS)(_bind(_span, variant, DIVIDE=True, **inner)),
        "fill": njit(**_OPTIONS)(_bind(_fill, variant, **constants)),
        "count_tile": njit(**_OPTIONS)(_bind(_count, variant, **constants)),
        "square_tile": njit(fastmath={"reassoc"}, **_OPTIONS)(_bind(_square, variant, **constants)),
    }
    return _address(_loop, variant, **constants, **parts)


class DecodeVariant(NamedTuple):
    """The constants of a decoding loop."""

    KIND: int
    CODE_BYTES: int


class AmaxVariant(NamedTuple):
    """The constant of an amax loop."""

    KIND: int


@cache
def compiled_decode(variant: DecodeVariant) -> int:
    """Address of a decoding loop."""
    constants = _constants(variant.KIND)
    return _address(_decode, variant, **constants, fill=njit(**_OPTIONS)(_bind(_fill, variant, **constants)))


@cache
def compiled_amax(variant: AmaxVariant) -> int:
    """Address of an amax loop."""
    return _address(_amax, variant, **_constants(variant.KIND))
