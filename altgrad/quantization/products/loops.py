"""The loop that multiplies packed operands, and the call that packs and multiplies on one thread or several.

A product is cut into blocks of rows by columns, one unit of work each. Within a block, slice after slice of the reduction
is multiplied: sums start anew in every slice, which keeps rounding errors small, and are added to the raw sums that lie in
the result's own memory; the last slice scales them. So a result does not depend on how blocks are cut, nor on threads.

Packing and multiplying are different calls: as two parallel loops of one compiled function the second could start before
the first has ended, for addresses hide that one depends on the other.
"""

# ruff: noqa: F821  (names are bound to the template)
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import types

from altgrad.jit.memory import load, load_code, load_word, scratch, store_word, table_reader
from altgrad.jit.storage import FLOAT32
from altgrad.jit.template import function, loop, part
from altgrad.jit.threads import CREW, shared
from altgrad.quantization.products import amx
from altgrad.quantization.products.panels import PANEL_BYTES, SLICE, UNITS, Packing
from altgrad.quantization.products.tiles import NARROW_TILE_ROWS, PANEL_ROWS, TILE_ROWS, put_word, tile, word_at


class Variant(NamedTuple):
    """The constants of a multiplying loop."""

    UNIT: int  # index in `panels.UNITS`
    EMULATED: bool
    NARROW: bool = False  # tiles for AVX2's registers


class Product(NamedTuple):
    """What a multiplying loop finds in its table of 64-bit words."""

    left: int  # addresses of packed operands
    right: int
    out: int
    bias: int  # 0: none
    rows: int
    columns: int
    words: int  # along the reduction
    left_batch: int  # matrices from one product to the next: 1, or 0 where one matrix serves all
    right_batch: int
    block_rows: int  # panels of a unit of work
    block_columns: int
    first: int  # as `Packing`
    slices: int
    factor: int  # bits of a float64


_read = table_reader(Product, floats=("factor",))


def _edge(p, left, right, words, out, height, width, adds, last, bias, room):
    """A tile of which only `height` rows and `width` columns are there: by way of `room`."""
    if adds != 0:
        for i in range(height):
            for j in range(width):
                put_word(room, i * PANEL + j, word_at(out, i * p.columns + j))
    multiply_tile(left, right, words, room, PANEL, adds, last, p.factor, bias)
    for i in range(height):
        for j in range(width):
            put_word(out, i * p.columns + j, word_at(room, i * PANEL + j))


def _multiply(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Blocks start .. stop - 1 of all batches."""
    p = read(0, table)
    room, shifts = scratch(ROOM_BYTES), scratch(BIAS_BYTES)
    found = scratch(64)
    take_registers(found)
    panels_down, panels_across = (p.rows + PANEL - 1) // PANEL, (p.columns + PANEL - 1) // PANEL
    blocks_down = (panels_down + p.block_rows - 1) // p.block_rows
    blocks_across = (panels_across + p.block_columns - 1) // p.block_columns
    left_behind = (p.words + SLICE - 1) // SLICE - p.first
    slices = min(p.slices, left_behind)
    for unit in range(start, stop):
        across = unit % blocks_across
        down = unit // blocks_across % blocks_down
        batch = unit // blocks_across // blocks_down
        for cut in range(slices):
            words = min(SLICE, p.words - (p.first + cut) * SLICE)
            adds, last = np.int64(p.first + cut > 0), np.int64(cut == left_behind - 1)
            lefts = p.left + (batch * p.left_batch * slices + cut) * panels_down * PANEL_BYTES
            rights = p.right + (batch * p.right_batch * slices + cut) * panels_across * PANEL_BYTES
            for j in range(across * p.block_columns, min((across + 1) * p.block_columns, panels_across)):
                right = rights + j * PANEL_BYTES
                width = min(PANEL, p.columns - j * PANEL)
                bias = np.int64(0)
                if p.bias != 0:
                    bias = p.bias + 4 * j * PANEL
                    if width < PANEL:
                        for i in range(width):
                            put_word(shifts, i, word_at(bias, i))
                        bias = shifts
                for i in range(down * p.block_rows, min((down + 1) * p.block_rows, panels_down)):
                    for step in range(PANEL // TILE):
                        row = i * PANEL + step * TILE
                        if row >= p.rows:
                            break
                        left = lefts + i * PANEL_BYTES + 4 * (PANEL + step * TILE)
                        target = p.out + 4 * ((batch * p.rows + row) * p.columns + j * PANEL)
                        if width == PANEL and row + TILE <= p.rows:
                            multiply_tile(left, right, words, target, p.columns, adds, last, p.factor, bias)
                        else:
                            edge(p, left, right, words, target, min(TILE, p.rows - row), width, adds, last, bias, room)
    give_registers_back(found)
    return np.int64(0)


@cache
def compiled(variant: Variant) -> int:
    """Address of a multiplying loop."""
    unit = UNITS[variant.UNIT]
    rows = PANEL_ROWS if unit.by_matrices else NARROW_TILE_ROWS if variant.NARROW else TILE_ROWS
    constants = {"PANEL": PANEL_ROWS, "TILE": rows, "ROOM_BYTES": 4 * rows * PANEL_ROWS, "BIAS_BYTES": 4 * PANEL_ROWS}
    if unit.by_matrices:
        multiply_tile = amx.tile(unit, variant, emulated=variant.EMULATED)
    else:
        made = tile(unit, variant.EMULATED, variant.NARROW)
        multiply_tile = part(_tile, variant, multiply_tile=made, **constants)
    edge = part(_edge, variant, multiply_tile=multiply_tile, **constants)
    registers = amx.registers(taken=unit.by_matrices and not variant.EMULATED)
    return loop(_multiply, variant, edge=edge, multiply_tile=multiply_tile, read=_read, **registers, **constants)


def _tile(left, right, words, out, stride, adds, last, factor, bias):
    multiply_tile(left, right, words, out, stride, adds, last, factor, bias)


_TABLE_WORDS = 2 * len(Packing._fields) + len(Product._fields)
_TABLE_BYTES = 8 * _TABLE_WORDS
_RIGHT, _PRODUCT = 8 * len(Packing._fields), 16 * len(Packing._fields)
_CODES, _SCALES, _PACKED, _FIRST = (Packing._fields.index(name) for name in ("codes", "scales", "packed", "first"))
_WORDS, _PRODUCTS_FIRST, _SLICES, _FACTOR = (
    Product._fields.index(name) for name in ("words", "first", "slices", "factor")
)


def multiply_shared(
    crew,
    template,
    a,
    a_scales,
    b,
    b_scales,
    left,
    right,
    out,
    bias,
    factor,
    pack_left,
    pack_right,
    multiply,
    m,
    n,
    units,
):
    """Pack both operands and multiply: the tables are those at `template` with the addresses given."""
    table = scratch(_TABLE_BYTES)
    for i in range(_TABLE_WORDS):
        store_word(table, i, np.int64(load_word(np.uint64(0), template, i)))
    store_word(table, _CODES, a)
    store_word(table, _SCALES, a_scales)
    store_word(table, _PACKED, left)
    store_word(table + _RIGHT, _CODES, b)
    store_word(table + _RIGHT, _SCALES, b_scales)
    store_word(table + _RIGHT, _PACKED, right)
    product = table + _PRODUCT
    store_word(product, 0, left)
    store_word(product, 1, right)
    store_word(product, 2, out)
    store_word(product, 3, bias)
    store_word(product, _FACTOR, factor)
    words = np.int64(load_word(np.uint64(0), product, _WORDS))
    slices = np.int64(load_word(np.uint64(0), product, _SLICES))
    for first in range(0, (words + SLICE - 1) // SLICE, slices):
        store_word(table, _FIRST, first)
        store_word(table + _RIGHT, _FIRST, first)
        store_word(product, _PRODUCTS_FIRST, first)
        shared(crew, pack_left, (table, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0), m, 1)
        shared(crew, pack_right, (table + _RIGHT, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0), n, 1)
        shared(crew, multiply, (product, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0), units, 1)


run_all = function(types.void(CREW, *[types.int64] * 9, types.float64, *[types.int64] * 6))(multiply_shared)


def blocks_fit(codes, scales, count, lowest, highest, rows, columns, tile_rows, tile_columns, values):
    """Whether all stored scales lie within the bounds, those of blocks of zeros aside; one matrix or more of them."""
    down, across = (rows + tile_rows - 1) // tile_rows, (columns + tile_columns - 1) // tile_columns
    for i in range(count):
        stored = load_code(scales, i, 1)
        if stored > highest:
            return np.int64(0)
        if stored < lowest:
            first = i // (down * across) * rows * columns
            row, column = i // across % down * tile_rows, i % across * tile_columns
            for r in range(row, min(row + tile_rows, rows)):
                for c in range(column, min(column + tile_columns, columns)):
                    if load(values, load_code(codes, first + r * columns + c, 1), FLOAT32) != np.float32(0.0):
                        return np.int64(0)
    return np.int64(1)


all_blocks_fit = function(types.int64(*[types.int64] * 10))(blocks_fit)
