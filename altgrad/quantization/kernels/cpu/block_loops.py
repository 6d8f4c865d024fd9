"""The loops over blocks, compiled on first use for each combination of storage, rounding family, scale and outputs.

Two loops: `_tiles` walks tiles whose rows are contiguous (blocks along the last axis, 2-D tiles), `_strips` walks blocks
along any other axis, a strip of neighbouring columns at a time. Both find the amax of a tile while bringing it into the
cache, make the scale, and round the tile's elements from the cache: memory is read once. Where statistics are taken, runs
of elements go to a buffer first, from which their squares are summed in fixed lanes (`jit.lanes`).
"""

# ruff: noqa: F821  (names are bound to the templates)
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from altgrad.jit.grid_rounding import key_words, read_grid
from altgrad.jit.grid_table import DRAWING, Family
from altgrad.jit.lanes import LANE_BYTES, add_squares, clear_lanes, lane_sums
from altgrad.jit.machine import band, bits_of, float_of, in_wide_vectors, low_word
from altgrad.jit.memory import load, reload, scratch, store, store_code
from altgrad.jit.storage import ITEM_BYTES
from altgrad.jit.template import loop, part
from altgrad.quantization.kernels.cpu.block_parts import (
    _element,
    _plain_span,
    _row_amax,
    _scale,
    _span,
    peek,
    poke,
    read_parameters,
    record,
)
from altgrad.quantization.kernels.cpu.loops import PARTIAL_BYTES

STRIP = 256  # columns that a strip works on at once
STRIP_BYTES = 4 * STRIP
RUN = 512  # elements whose values wait in a buffer for their statistics
RUN_BYTES = 4 * RUN


class Variant(NamedTuple):
    """What one compiled loop does: the constants of its template."""

    KIND: int  # storage of x and of the values written
    FAMILY: int
    SCALE: int
    VALUES: bool
    CODE_BYTES: int  # 0 none, 1 uint8, 4 int32
    SCALE_BYTES: int  # bytes of a stored scale: 1 or 4
    STATS: bool
    BLOCK: int  # length of every run where it is the same and known, else 0


# -- the loops --------------------------------------------------------------------------------------------------------


def _tiles(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Tiles start .. stop - 1 in C order of the grid; a tile's rows are contiguous runs."""
    in_wide_vectors()
    p = read_parameters(0, table)
    zero = np.uint32(0)
    grid = read_grid(zero, p.element_table)
    scale_grid = read_grid(zero, p.scale_table)
    tiles_across = (p.columns + p.tile_columns - 1) // p.tile_columns
    tiles_down = (p.rows + p.tile_rows - 1) // p.tile_rows
    problems = np.int64(0)
    largest, overflows, underflows, nonfinites = zero, 0, 0, 0
    values, lanes = scratch(RUN_BYTES), scratch(LANE_BYTES)
    clear_lanes(lanes)
    before, between = zero, zero
    across = start % tiles_across
    down = (start // tiles_across) % tiles_down
    outer = start // tiles_across // tiles_down
    for tile in range(start, stop):
        height = min(p.tile_rows, p.rows - down * p.tile_rows)
        width = min(p.tile_columns, p.columns - across * p.tile_columns)
        if BLOCK:
            width = BLOCK
        corner = (outer * p.rows + down * p.tile_rows) * p.columns + across * p.tile_columns
        amax, finite = zero, zero
        for row in range(height):
            found, found_finite = row_amax(p.x + (corner + row * p.columns) * ITEM, width)
            amax = found if found > amax else amax
            finite = found_finite if found_finite > finite else finite
        poisoned = p.poison != 0 and amax > np.uint32(0x7F800000)
        raw, s, reciprocal = scale_of(finite, poisoned, scale_grid, p)
        store_code(p.scales, tile, raw, SCALE_BYTES)
        for row in range(height):
            position = corner + row * p.columns
            if PLAIN and p.plain != 0 and amax < np.uint32(0x7F800000):
                x, out, codes = p.x + position * ITEM, p.out + position * ITEM, p.codes + position * CODE_BYTES
                plain_span(grid, x, out, codes, BLOCK if BLOCK else width, s, reciprocal, 0, 0)
                continue
            done = 0
            while done < width:
                here = position + done
                count = width - done
                if not BLOCK:  # key words change every 2^32 elements, a multiple of BLOCK
                    count = min(count, (here | 0xFFFFFFFF) + 1 - here)
                if STATS and not BLOCK:
                    count = min(count, RUN)
                if CHANCE:
                    before, between = key_words(np.uint64(p.seed), np.uint64(p.stream), np.uint64(here >> 32))
                index = low_word(zero, here)
                x, out, codes = p.x + here * ITEM, p.out + here * ITEM, p.codes + here * CODE_BYTES
                run = BLOCK if BLOCK else count
                target = values if STATS else out
                found = span(grid, x, target, codes, run, s, reciprocal, 0, 0, index, before, between)
                if STATS:
                    settle(x, values, out, lanes, run)
                    overflows += np.int64(found[1])
                    underflows += np.int64(found[2])
                    nonfinites += np.int64(found[3])
                if CODE_BYTES:
                    problems |= np.int64(found[0])
                done += count
        if STATS:
            largest = finite if finite > largest else largest
            if (tile + 1) % p.group == 0 or tile + 1 == stop:
                place, sums = p.partials + tile // p.group * PARTIAL_BYTES, lane_sums(lanes, KIND, True)
                record(place, largest, overflows, underflows, nonfinites, sums)
                largest, overflows, underflows, nonfinites = zero, 0, 0, 0
        across += 1
        if across == tiles_across:
            across = 0
            down += 1
            if down == tiles_down:
                down = 0
                outer += 1
    return problems


def _strips(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Strips start .. stop - 1 of up to STRIP columns, in C order of (outer, blocks along the axis, strips)."""
    in_wide_vectors()
    p = read_parameters(0, table)
    zero, inf = np.uint32(0), np.uint32(0x7F800000)
    grid = read_grid(zero, p.element_table)
    scale_grid = read_grid(zero, p.scale_table)
    strips = (p.columns + STRIP - 1) // STRIP
    blocks = (p.rows + p.tile_rows - 1) // p.tile_rows
    amaxes, multipliers, reciprocals = scratch(STRIP_BYTES), scratch(STRIP_BYTES), scratch(STRIP_BYTES)
    problems = np.int64(0)
    values, lanes = scratch(STRIP_BYTES), scratch(LANE_BYTES)
    clear_lanes(lanes)
    before, between, one = zero, zero, np.float32(1.0)
    for unit in range(start, stop):
        strip = unit % strips
        block = (unit // strips) % blocks
        outer = unit // strips // blocks
        count = min(STRIP, p.columns - strip * STRIP)
        height = min(p.tile_rows, p.rows - block * p.tile_rows)
        corner = (outer * p.rows + block * p.tile_rows) * p.columns + strip * STRIP
        for i in range(count):
            poke(amaxes, i, float_of(zero))
        for row in range(height):
            x = p.x + (corner + row * p.columns) * ITEM
            for i in range(count):
                found = band(bits_of(load(x, i, KIND)), grid.magnitude_mask)
                held = bits_of(peek(amaxes, i))
                poke(amaxes, i, float_of(found if found > held else held))
        specials = False
        for i in range(count):
            specials |= bits_of(peek(amaxes, i)) >= inf
        largest = zero
        for i in range(count):
            amax = bits_of(peek(amaxes, i))
            finite = amax
            poisoned = False
            if specials and amax >= inf:
                poisoned = p.poison != 0 and amax > inf
                finite = zero
                for row in range(height):
                    found = band(bits_of(load(p.x + (corner + row * p.columns) * ITEM, i, KIND)), grid.magnitude_mask)
                    finite = found if found > finite and found < inf else finite
            largest = finite if finite > largest else largest
            raw, s, reciprocal = scale_of(finite, poisoned, scale_grid, p)
            store_code(p.scales, (outer * blocks + block) * p.columns + strip * STRIP + i, raw, SCALE_BYTES)
            poke(multipliers, i, s)
            poke(reciprocals, i, reciprocal)
        overflows, underflows, nonfinites = 0, 0, 0
        for row in range(height):
            position = corner + row * p.columns
            if PLAIN and p.plain != 0 and not specials:
                x, out, codes = p.x + position * ITEM, p.out + position * ITEM, p.codes + position * CODE_BYTES
                plain_span(grid, x, out, codes, count, one, one, multipliers, reciprocals)
                continue
            done = 0
            while done < count:
                here = position + done
                length = min(count - done, (here | 0xFFFFFFFF) + 1 - here)
                if CHANCE:
                    before, between = key_words(np.uint64(p.seed), np.uint64(p.stream), np.uint64(here >> 32))
                x, out, codes = p.x + here * ITEM, p.out + here * ITEM, p.codes + here * CODE_BYTES
                given = (one, one, multipliers + 4 * done, reciprocals + 4 * done)
                target = values if STATS else out
                found = span(grid, x, target, codes, length, *given, low_word(zero, here), before, between)
                if STATS:
                    settle(x, values, out, lanes, length)
                problems |= np.int64(found[0])
                overflows += np.int64(found[1])
                underflows += np.int64(found[2])
                nonfinites += np.int64(found[3])
                done += length
        if STATS:
            sums = lane_sums(lanes, KIND, True)
            record(p.partials + unit * PARTIAL_BYTES, largest, overflows, underflows, nonfinites, sums)
    return problems


def _settle(x, values, out, lanes, count):
    """Take the sums of a run whose values are in a buffer, and write these where they are wanted."""
    add_squares(lanes, x, values, count, KIND, True)
    if VALUES:
        for i in range(count):
            store(out, i, reload(values, i, KIND), KIND)


# -- compiled ---------------------------------------------------------------------------------------------------------


@cache
def compiled(variant: Variant, strips: bool) -> int:
    """Address of the loop of one variant."""
    simple = variant.FAMILY == Family.BY_ADDITION and not variant.STATS
    constants = {"ITEM": ITEM_BYTES[variant.KIND], "PLAIN": simple, "EACH": strips, "CHANCE": variant.FAMILY in DRAWING}
    element = part(_element, variant, inline=True)
    parts = {
        "scale_of": part(_scale, variant, inline=True),
        "span": part(_span, variant, inline=True, element=element, **constants),
        "plain_span": part(_plain_span, variant, inline=True, **constants),
        "row_amax": part(_row_amax, variant, inline=True),
        "settle": part(_settle, variant, inline=True),
    }
    return loop(_strips if strips else _tiles, variant, **constants, **parts)
