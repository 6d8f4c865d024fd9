"""The loops over blocks, compiled on first use for each combination of storage, rounding family, scale and outputs.

Two loops: `_tiles` walks tiles whose rows are contiguous (blocks along the last axis, 2-D tiles), `_strips` walks blocks
along any other axis, a strip of neighbouring columns at a time. Both find the amax of a tile while bringing it into the
cache, make the scale, and round the tile's elements from the cache: memory is read once. Each loop is a C function
(table of parameters, first unit, last unit), so one threaded driver (`kernels.cpu.blocks.py`) serves all.
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
from altgrad.jit.grid_rounding import key_words, read_grid
from altgrad.jit.grid_table import Family
from altgrad.jit.machine import ITEM_BYTES, band, bits_of, float_of, load, low_word, scratch, store_code
from altgrad.quantization.kernels.cpu import block_parts as cpu_block_parts
from altgrad.quantization.kernels.cpu.block_parts import (
    BY_ADDITION,
    BY_SHORT_CHANCE,
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

BY_CHANCE = int(Family.BY_CHANCE)
STRIP = 256  # columns that a strip works on at once
STRIP_BYTES = 4 * STRIP
# Names in the templates below that `compiled` replaces; the values here only say what they are.
BLOCK = CODE_BYTES = SCALE_BYTES = ITEM = KIND = 0
CHANCE = PLAIN = STATS = False
plain_span = row_amax = scale_of = span = None

PARTIAL_BYTES = 64  # amax, overflow, underflow, nonfinite, sse, sum_sq, two unused


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


def _tiles(table, start, stop):
    """Tiles start .. stop - 1 in C order of the grid; a tile's rows are contiguous runs."""
    p = read_parameters(table)
    zero = np.uint32(0)
    grid = read_grid(zero, p.element_table)
    scale_grid = read_grid(zero, p.scale_table)
    tiles_across = (p.columns + p.tile_columns - 1) // p.tile_columns
    tiles_down = (p.rows + p.tile_rows - 1) // p.tile_rows
    problems = np.int64(0)
    largest, overflows, underflows, nonfinites, sums = zero, 0, 0, 0, (0.0, 0.0)
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
                x, out = p.x + position * ITEM, p.out + position * ITEM
                plain_span(grid, x, out, BLOCK if BLOCK else width, s, reciprocal, 0, 0)
                continue
            done = 0
            while done < width:
                here = position + done
                count = width - done
                if not BLOCK:  # key words change every 2^32 elements, a multiple of BLOCK
                    count = min(count, (here | 0xFFFFFFFF) + 1 - here)
                if CHANCE:
                    before, between = key_words(np.uint64(p.seed), np.uint64(p.stream), np.uint64(here >> 32))
                index = low_word(zero, here)
                x, out, codes = p.x + here * ITEM, p.out + here * ITEM, p.codes + here * CODE_BYTES
                run = BLOCK if BLOCK else count
                found = span(grid, x, out, codes, run, s, reciprocal, 0, 0, index, before, between, sums)
                sums = found[4]
                if STATS:
                    overflows += np.int64(found[1])
                    underflows += np.int64(found[2])
                    nonfinites += np.int64(found[3])
                if CODE_BYTES:
                    problems |= np.int64(found[0])
                done += count
        if STATS:
            largest = finite if finite > largest else largest
            if (tile + 1) % p.group == 0 or tile + 1 == stop:
                record(p.partials + tile // p.group * PARTIAL_BYTES, largest, overflows, underflows, nonfinites, sums)
                largest, overflows, underflows, nonfinites, sums = zero, 0, 0, 0, (0.0, 0.0)
        across += 1
        if across == tiles_across:
            across = 0
            down += 1
            if down == tiles_down:
                down = 0
                outer += 1
    return problems


def _strips(table, start, stop):
    """Strips start .. stop - 1 of up to STRIP columns, in C order of (outer, blocks along the axis, strips)."""
    p = read_parameters(table)
    zero, inf = np.uint32(0), np.uint32(0x7F800000)
    grid = read_grid(zero, p.element_table)
    scale_grid = read_grid(zero, p.scale_table)
    strips = (p.columns + STRIP - 1) // STRIP
    blocks = (p.rows + p.tile_rows - 1) // p.tile_rows
    amaxes, multipliers, reciprocals = scratch(STRIP_BYTES), scratch(STRIP_BYTES), scratch(STRIP_BYTES)
    problems = np.int64(0)
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
        overflows, underflows, nonfinites, sums = 0, 0, 0, (0.0, 0.0)
        for row in range(height):
            position = corner + row * p.columns
            if PLAIN and p.plain != 0 and not specials:
                x, out = p.x + position * ITEM, p.out + position * ITEM
                plain_span(grid, x, out, count, one, one, multipliers, reciprocals)
                continue
            done = 0
            while done < count:
                here = position + done
                part = min(count - done, (here | 0xFFFFFFFF) + 1 - here)
                if CHANCE:
                    before, between = key_words(np.uint64(p.seed), np.uint64(p.stream), np.uint64(here >> 32))
                x, out, codes = p.x + here * ITEM, p.out + here * ITEM, p.codes + here * CODE_BYTES
                scales = (one, one, multipliers + 4 * done, reciprocals + 4 * done)
                found = span(grid, x, out, codes, part, *scales, low_word(zero, here), before, between, sums)
                sums = found[4]
                problems |= np.int64(found[0])
                overflows += np.int64(found[1])
                underflows += np.int64(found[2])
                nonfinites += np.int64(found[3])
                done += part
        if STATS:
            record(p.partials + unit * PARTIAL_BYTES, largest, overflows, underflows, nonfinites, sums)
    return problems


_SOURCES = [Path(module.__file__) for module in (cpu_bits, cpu_llvm, cpu_block_parts, grid_facts)] + [Path(__file__)]
_STAMP = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:12]
_SIGNATURE = types.int64(types.int64, types.int64, types.int64)
_kept: list = []  # compiled functions must outlive their addresses


@cache
def compiled(variant: Variant, strips: bool) -> int:
    """Address of the loop of one variant, compiled or loaded from Numba's cache on first use."""
    simple = variant.FAMILY == BY_ADDITION and variant.VALUES and not variant.CODE_BYTES and not variant.STATS
    constants = {**variant._asdict(), "ITEM": ITEM_BYTES[variant.KIND], "PLAIN": simple, "EACH": strips}
    constants["CHANCE"] = variant.FAMILY in (BY_CHANCE, BY_SHORT_CHANCE)
    label = "_".join(f"{name}{int(value)}" for name, value in sorted(constants.items())).lower()

    def bind(template, **parts):
        name = f"{template.__name__}_{label}_{_STAMP}"
        function = FunctionType(template.__code__, {**template.__globals__, **constants, **parts}, name)
        function.__qualname__ = name
        return function

    options = {"error_model": "numpy", "forceinline": True}
    scale_of = njit(**options)(bind(_scale))
    element = njit(**options)(bind(_element))
    parts = {
        "scale_of": scale_of,
        "span": njit(**options)(bind(_span, element=element)),
        "plain_span": njit(**options)(bind(_plain_span)),
        "row_amax": njit(**options)(bind(_row_amax)),
    }
    loop = cfunc(_SIGNATURE, cache=True, error_model="numpy")(bind(_strips if strips else _tiles, **parts))
    _kept.append(loop)
    return loop.address
