"""The loops that turn element codes and stored scales of block formats into values.

As the loops that quantize (`kernels.cpu.block_loops`), one walks tiles whose rows are contiguous, one strips of columns
under blocks along another axis; there the multipliers of a strip are fetched once and serve all its rows. Values are
made of codes by arithmetic (`jit.code_table`), or looked up in a table; a run that holds NaN or inf is looked up again.
Scales are looked up. An index cannot leave its table: that has at least what a byte can name, and a wider code is taken
modulo its length, a power of two.
"""

# ruff: noqa: F821  (names are bound to the templates)
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from altgrad.jit.code_table import Decoding, by_fields, by_integer, read_codes
from altgrad.jit.machine import bor, in_wide_vectors, low_word
from altgrad.jit.memory import keep, kept, load, load_code, scratch, store
from altgrad.jit.storage import FLOAT32, ITEM_BYTES
from altgrad.jit.template import loop, part
from altgrad.quantization.kernels.cpu.block_parts import CALL_PARAMETERS, parameter_reader

STRIP = 256  # columns that a strip works on at once
STRIP_BYTES = 4 * STRIP


class DecodeVariant(NamedTuple):
    """The constants of a decoding loop."""

    KIND: int  # storage of the values written: float32, bf16 or fp16
    CODE_BYTES: int  # of an element's code: 1 or 4
    SCALE_BYTES: int  # of a scale's code: 1 or 4; 0 for scales that are stored as float32
    BLOCK: int  # length of every run where it is the same and known, else 0
    DECODING: int  # `jit.code_table.Decoding`


PARAMETERS = (
    *CALL_PARAMETERS,  # codes, out, scales and upper of them
    "values",  # addresses: float32 value of each code,
    "scale_values",  # of each scale's code,
    "facts",  # and `jit.code_table.code_table` of the element
    "last",  # index of the last entry of `values`
    "last_scale",
    "rows",  # the layout, as `block_layout.BlockLayout`
    "columns",
    "tile_rows",
    "tile_columns",
)
Parameters = NamedTuple("Parameters", [(name, int) for name in PARAMETERS])
_read_parameters = parameter_reader(Parameters)


def _multiplier(p, block):
    """The scale of a block as float32: its value, times the scale of the tensor."""
    if SCALE_BYTES == 0:
        return load(p.scales, block, FLOAT32)
    value = load(p.scale_values, load_code(p.scales, block, SCALE_BYTES) & p.last_scale, FLOAT32)
    return np.float32(p.upper) * value


def _run(codes, out, count, s, multipliers, facts, p):
    """The values of `count` neighbouring codes under the scale s, or where EACH under one multiplier for each."""
    in_wide_vectors()
    special = np.uint32(0)
    if DECODING != BY_TABLE:
        for i in range(BLOCK if BLOCK else count):
            code = low_word(special, load_code(codes, i, CODE_BYTES))
            value, void = by_fields(code, facts) if DECODING == BY_FIELDS else by_integer(code, facts)
            special = bor(special, void)
            store(out, i, value * (kept(multipliers, i) if EACH else s), KIND)
    if DECODING == BY_TABLE or special != np.uint32(0):
        for i in range(BLOCK if BLOCK else count):
            value = load(p.values, load_code(codes, i, CODE_BYTES) & p.last, FLOAT32)
            store(out, i, value * (kept(multipliers, i) if EACH else s), KIND)


def _tiles(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Tiles start .. stop - 1 in C order of the grid; a tile's rows are contiguous runs."""
    in_wide_vectors()
    p = _read_parameters(0, table)
    facts = read_codes(np.uint32(0), p.facts)
    tiles_across = (p.columns + p.tile_columns - 1) // p.tile_columns
    tiles_down = (p.rows + p.tile_rows - 1) // p.tile_rows
    across = start % tiles_across
    down = (start // tiles_across) % tiles_down
    outer = start // tiles_across // tiles_down
    for tile in range(start, stop):
        s = multiplier(p, tile)
        height = min(p.tile_rows, p.rows - down * p.tile_rows)
        width = min(p.tile_columns, p.columns - across * p.tile_columns)
        corner = (outer * p.rows + down * p.tile_rows) * p.columns + across * p.tile_columns
        for row in range(height):
            at = corner + row * p.columns
            run(p.codes + at * CODE_BYTES, p.out + at * ITEM, width, s, 0, facts, p)
        across += 1
        if across == tiles_across:
            across = 0
            down += 1
            if down == tiles_down:
                down = 0
                outer += 1
    return np.int64(0)


def _strips(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Strips start .. stop - 1 of up to STRIP columns, in C order of (outer, blocks along the axis, strips)."""
    in_wide_vectors()
    p = _read_parameters(0, table)
    facts = read_codes(np.uint32(0), p.facts)
    strips = (p.columns + STRIP - 1) // STRIP
    blocks = (p.rows + p.tile_rows - 1) // p.tile_rows
    multipliers = scratch(STRIP_BYTES)
    for unit in range(start, stop):
        strip = unit % strips
        block = (unit // strips) % blocks
        outer = unit // strips // blocks
        count = min(STRIP, p.columns - strip * STRIP)
        height = min(p.tile_rows, p.rows - block * p.tile_rows)
        first = (outer * blocks + block) * p.columns + strip * STRIP
        for i in range(count):
            keep(multipliers, i, multiplier(p, first + i))
        for row in range(height):
            at = (outer * p.rows + block * p.tile_rows + row) * p.columns + strip * STRIP
            run(p.codes + at * CODE_BYTES, p.out + at * ITEM, count, np.float32(1.0), multipliers, facts, p)
    return np.int64(0)


@cache
def compiled(variant: DecodeVariant, strips: bool) -> int:
    """Address of the loop of one variant."""
    by = {member.name: int(member) for member in Decoding}
    parts = {
        "run": part(_run, variant, inline=True, EACH=strips, **by),
        "multiplier": part(_multiplier, variant, inline=True),
    }
    return loop(_strips if strips else _tiles, variant, ITEM=ITEM_BYTES[variant.KIND], **parts)
