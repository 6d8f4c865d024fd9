"""The loops over elements, compiled on first use for each combination of storage, rounding family and outputs.

A loop works on tiles that stay in the first-level cache. All have the signature `jit.template.LOOP`, so that one threaded
driver (`jit.threads`) serves them.

Statistics are taken from a tile that has just been rounded: counts in the loop that rounds, sums in fixed lanes after it
(`jit.lanes`), as if all were finite and the squares neither too large nor too small for float32; where a tile's sums say
that this may not hold, they are taken again with care, in float64.
"""

# ruff: noqa: F821  (names are bound to the templates)
from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from altgrad.jit.element import Arithmetic, rounding_of
from altgrad.jit.grid_rounding import key_words, random_word, read_grid
from altgrad.jit.grid_table import DRAWING, Family
from altgrad.jit.lanes import LANE_BYTES, add_squares, clear_lanes, lane_sums
from altgrad.jit.machine import (
    add,
    band,
    below,
    bits_of,
    bor,
    counted,
    float_of,
    in_wide_vectors,
    low_word,
    narrowed,
    pick,
    sub,
    widened,
)
from altgrad.jit.memory import compute_zero, load, load_code, reload, scratch, store, store_code, store_word, stored
from altgrad.jit.storage import FLOAT32, FLOAT64, ITEM_BYTES
from altgrad.jit.template import function, loop, part
from altgrad.jit.threads import CHUNK, CREW, run_range, shared

TILE = 2048  # elements whose temporaries stay in the first-level cache
SUM_TILE = 512  # elements that are squared and summed in float32: few, so that their rounding errors stay few
LEAST_SUM, MOST_SUM = 2.0**-100, 2.0**120  # between them no float32 square in a sum can have been lost that counts
STATS_TILE = CHUNK  # elements per partial sum, whatever the number of threads
LEAST_SCALE = 2.0**-126
SCRATCH_BYTES = 8 * TILE
SHORT_RUN = 512  # runs of one scale shorter than this go through a buffer of scales
PARTIALS = ("amax", "overflow", "underflow", "nonfinite", "sse", "sum_sq")  # float64 fields of a partial sum
PARTIAL_BYTES = 64  # room for them


class Variant(NamedTuple):
    """What one compiled loop does: the constants of its template."""

    KIND: int  # storage of x and of the values written
    FAMILY: int = int(Family.BY_ADDITION)
    WIDE: bool = False  # round on float64's bits
    VALUES: bool = True  # write quantized values; with statistics only where the call has a place for them
    CODE_BYTES: int = 0  # write codes: 0 none, 1 uint8, 4 int32
    STATS: bool = False  # accumulate statistics
    PLAIN: bool = False  # what lies beyond max becomes max before it is rounded, and -0 stays (no statistics then)


def _span(grid, x, out, codes, scales, count, scale, reciprocal, index, before, between):
    """Quantize `count` elements under one scale (by reciprocal) or one scale per element (DIVIDE).

    Returns (problems, overflows, underflows, bits of the largest |x|); the last holds for finite x only.
    """
    in_wide_vectors()
    problems, overflows, zeros_in, zeros_out, largest = grid.zero, grid.zero, grid.zero, grid.zero, grid.zero
    for i in range(count):
        v = load(x, i, KIND)
        s = load(scales, i, COMPUTE_KIND) if DIVIDE else scale
        y = v / s if DIVIDE else v * reciprocal
        word = random_word(add(index, low_word(index, i)), before, between) if DRAWS else index
        payload, over, code, problem = rounded(v, y, word, grid)
        value = narrowed(s, float_of(payload)) * s
        if VALUES:
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
    return problems, overflows, sub(zeros_out, zeros_in), largest


def _count(x, count):
    """(amax, nonfinites) of a tile, by integer comparisons."""
    in_wide_vectors()
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


def _fill(buffer, scales, position, inner, channels, count, scale):
    """The scale of each of `count` elements from `position` on; `scale` for all of them if there is one channel."""
    in_wide_vectors()
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
    in_wide_vectors()
    nil = compute_zero(KIND)
    grid = read_grid(bits_of(widened(nil, WIDE)), table)
    s = narrowed(nil, scale)
    if scales != 0 and channels == 1:
        s = load(scales, 0, COMPUTE_KIND)
    buffer = scratch(SCRATCH_BYTES)
    buffered = nil  # the one scale that the buffer holds, 0 for another content
    period = inner * channels
    values, lanes = scratch(SCRATCH_BYTES), scratch(LANE_BYTES)
    clear_lanes(lanes)
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
        in_place = STATS and (out == x or out == 0)
        out_here = values if in_place else out + position * ITEM
        codes_here = codes + position * CODE_BYTES
        power_of_two = band(bits_of(s), low_word(bits_of(s), np.uint64(FRACTION_MASK))) == 0
        reciprocal = narrowed(nil, 1.0) / s
        tiny = narrowed(nil, TINY)
        if not per_element and power_of_two and s >= tiny and reciprocal >= tiny:
            found, overflows, underflows, top = span_by_reciprocal(
                grid, x_here, out_here, codes_here, buffer, count, s, reciprocal, index, before, between
            )
        else:
            if not per_element and s != buffered:
                for i in range(min(RUN, stop - start)):
                    store(buffer, i, s, COMPUTE_KIND)
                buffered = s
            found, overflows, underflows, top = span_by_division(
                grid, x_here, out_here, codes_here, buffer, count, s, reciprocal, index, before, between
            )
        problems = bor(problems, found)
        if STATS:
            largest, nonfinites = widened(float_of(top), True), 0.0
            add_squares(lanes, x_here, out_here, count, KIND, False)
            errors, squares = lane_sums(lanes, KIND, False)
            if not (min(errors, squares) >= LEAST_SUM and max(errors, squares) <= MOST_SUM):
                largest, nonfinites = count_tile(x_here, count)
                add_squares(lanes, x_here, out_here, count, KIND, True)
                errors, squares = lane_sums(lanes, KIND, True)
            record(partials, position, largest, float(overflows), float(underflows), nonfinites, errors, squares)
            if in_place and out != 0:
                for i in range(count):
                    store(out + position * ITEM, i, reload(values, i, KIND), KIND)
        position += count
    return np.int64(problems)


def _decode(table, codes, out, unused, scales, scale, inner, channels, entries, unused_too, partials, start, stop):
    """Values of the codes start .. stop - 1: table[code] * scale, where `table` has `entries` float64 or float32.

    `entries` is a power of two and at least what a code of one byte can name; an int32 code is taken modulo it.
    """
    in_wide_vectors()
    last = entries - 1
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
                store(out_here, i, load(scaled, load_code(codes_here, i, CODE_BYTES) & last, KIND), KIND)
        else:
            fill(buffer, scales, position, inner, channels, count, s)
            for i in range(count):
                value = load(table, load_code(codes_here, i, CODE_BYTES) & last, COMPUTE_KIND)
                store(out_here, i, value * load(buffer, i, COMPUTE_KIND), KIND)
        position += count
    return np.int64(0)


def _amax(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Largest finite magnitude of each STATS_TILE of elements, as float64, into `partials`."""
    in_wide_vectors()
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
        store_word(partials, position // STATS_TILE, widened(float_of(largest), True))
        position += count
    return np.int64(0)


def _record(partials, position, largest, overflows, underflows, nonfinites, errors, squares):
    """Add a tile's statistics to its partial sums."""
    place = partials + (position // STATS_TILE) * PARTIAL_BYTES
    fresh = position % STATS_TILE == 0
    for slot, value in enumerate((largest, overflows, underflows, nonfinites, errors, squares)):
        held = 0.0 if fresh else load(place, slot, FLOAT64)
        store_word(place, slot, max(held, value) if slot == 0 else held + value)


def _total(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Add partial statistics start .. stop - 1, in order, into the fields of a QuantStats vector at `out`."""
    largest, overflows, underflows, nonfinites, errors, squares = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for tile in range(start, stop):
        place = partials + tile * PARTIAL_BYTES
        largest = max(largest, load(place, 0, FLOAT64))
        overflows += load(place, 1, FLOAT64)
        underflows += load(place, 2, FLOAT64)
        nonfinites += load(place, 3, FLOAT64)
        errors += load(place, 4, FLOAT64)
        squares += load(place, 5, FLOAT64)
    for slot, value in enumerate((largest, scale, overflows, underflows, nonfinites, errors, squares)):
        store_word(out, slot, value)
    return np.int64(0)


def _largest(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """The largest of the partial results start .. stop - 1 of `_amax`, into the one number at `out`."""
    largest = 0.0
    for tile in range(start, stop):
        largest = max(largest, load(partials, tile, FLOAT64))
    store(out, 0, narrowed(compute_zero(KIND), largest), COMPUTE_KIND)
    return np.int64(0)


# -- compiled ---------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """The constant of loops that look at one kind of storage."""

    KIND: int


class DecodeVariant(NamedTuple):
    """The constants of a decoding loop."""

    KIND: int
    CODE_BYTES: int


def _constants(kind: int) -> dict[str, Any]:
    wide = kind == FLOAT64
    return {
        "COMPUTE_KIND": FLOAT64 if wide else FLOAT32,
        "ITEM": ITEM_BYTES[kind],
        "MAGNITUDE_MASK": 2 ** (63 if wide else 31) - 1,
        "INF_BITS": 0x7FF << 52 if wide else 0xFF << 23,
        "FRACTION_MASK": 2 ** (52 if wide else 23) - 1,
        "TINY": 2.0**-1022 if wide else 2.0**-126,
    }


@cache
def compiled(variant: Variant) -> int:
    """Address of the loop of one variant."""
    constants = _constants(variant.KIND)
    constants["DRAWS"] = variant.FAMILY in DRAWING
    constants["RUN"] = SUM_TILE if variant.STATS else TILE
    rounded = rounding_of(Arithmetic(variant.FAMILY, variant.WIDE, variant.PLAIN))
    parts = {
        "span_by_reciprocal": part(_span, variant, DIVIDE=False, rounded=rounded, **constants),
        "span_by_division": part(_span, variant, DIVIDE=True, rounded=rounded, **constants),
        "fill": part(_fill, variant, **constants),
        "count_tile": part(_count, variant, **constants),
        "record": part(_record, variant),
    }
    return loop(_loop, variant, **constants, **parts)


@cache
def compiled_decode(variant: DecodeVariant) -> int:
    """Address of a decoding loop."""
    constants = _constants(variant.KIND)
    return loop(_decode, variant, **constants, fill=part(_fill, variant, **constants))


@cache
def compiled_amax(kind: int) -> int:
    """Address of the loop that finds the amax of each STATS_TILE elements of a kind of storage."""
    return loop(_amax, _Kind(kind), **_constants(kind))


def encode_shared(crew, amax_loop, loop, table, x, codes, partials, count, top, power_of_two):
    """(scale, problems): the amax of `count` elements, `scaling.host_scale` of it, and their codes.

    partials: room for `amax_words` of 8 bytes.
    """
    shared(crew, amax_loop, (0, x, 0, 0, 0, 0.0, 0, 0, 0, 0, partials), count, CHUNK)
    found = 0.0
    for tile in range((count + STATS_TILE - 1) // STATS_TILE):
        found = max(found, load(partials, tile, FLOAT64))
    scale = max(np.float64(np.float32((found if found > 0.0 else 1.0) / top)), LEAST_SCALE)
    if power_of_two != 0 and scale < np.inf:
        mantissa, exponent = math.frexp(scale)
        scale = math.ldexp(1.0, min(exponent - (1 if mantissa == 0.5 else 0), 127))
    return scale, shared(crew, loop, (table, x, 0, codes, 0, scale, count, 1, 0, 0, 0), count, CHUNK)


encode_by_amax = function(
    types.Tuple((types.float64, types.int64))(CREW, *[types.int64] * 7, types.float64, types.int64)
)(encode_shared)


def amax_words(count: int) -> int:
    """Float64 amaxes of the tiles of `count` elements."""
    return -(-count // STATS_TILE)


@cache
def _compiled_largest(kind: int) -> int:
    return loop(_largest, _Kind(kind), **_constants(kind))


@cache
def _compiled_total() -> int:
    return loop(_total, _Kind(FLOAT64))


def total(partials: int, tiles: int, elements: int, result: int) -> None:
    """Add partial statistics in order into the seven fields of a QuantStats vector; both are addresses."""
    run_range()(_compiled_total(), 0, 0, result, 0, 0, float(elements), 0, 0, 0, 0, partials, 0, tiles)


def largest(partials: int, tiles: int, kind: int, result: int) -> None:
    """The largest of the float64 amaxes at one address, in the compute type of the kind, to another."""
    run_range()(_compiled_largest(kind), 0, 0, result, 0, 0, 0.0, 0, 0, 0, 0, partials, 0, tiles)
