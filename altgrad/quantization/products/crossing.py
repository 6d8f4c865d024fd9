"""The compiled call of a program (`program`): its rows, and the function that runs them one after the other."""

# ruff: noqa: F821  (names are bound to the template)
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import types

from altgrad.jit.memory import load_word, scratch, store_word, table_reader
from altgrad.jit.template import Plain, function, part
from altgrad.jit.threads import CHUNK, CREW, shared
from altgrad.quantization.kernels.cpu import blocks, loops
from altgrad.quantization.products.loops import blocks_fit, multiply_shared

FIRST, SECOND, KEPT, ROOM, OUT, OTHER = range(6)
NOTHING = -1
SCALES = 4  # that a call gives or finds


class Encoding(NamedTuple):
    """One row: a matrix of float32 to codes. `loop` 0: by blocks."""

    x: int  # which address
    codes: int
    codes_at: int  # bytes behind it
    scales_at: int
    scale: int  # index of what it finds
    loop: int
    table: int
    units: int  # elements, or blocks
    amax_loop: int
    top: int  # bits of the format's largest value; 0: the scale is given
    power_of_two: int
    block_loop: int
    scales: int  # stored ones
    lowest: int  # of them
    highest: int
    rows: int  # as `BlockLayout`
    columns: int
    tile_rows: int
    tile_columns: int
    payloads: int
    threads: int
    amaxes_at: int  # in ROOM
    group: int  # blocks that stay on one thread


class Multiplication(NamedTuple):
    """Another: a product of two matrices of codes."""

    template: int
    a: int
    a_at: int
    a_scales_at: int
    a_scale: int
    b: int
    b_at: int
    b_scales_at: int
    b_scale: int
    out: int
    bias: int
    left_at: int  # in ROOM
    right_at: int
    exponent: int
    pack_left: int
    pack_right: int
    multiply: int
    left_units: int
    right_units: int
    units: int
    threads: int


ROW_WORDS = max(len(Encoding._fields), len(Multiplication._fields))  # of either row


_read_encoding, _read_multiplication = table_reader(Encoding), table_reader(Multiplication)
_ROW = 8 * ROW_WORDS


def _parts() -> dict:
    named = {
        "encode": loops.encode_shared,
        "encode_blocks": blocks.blocks_shared,
        "blocks_fit": blocks_fit,
        "multiply": multiply_shared,
    }
    return {name: part(plain, Plain()) for name, plain in named.items()}


@function(
    types.Tuple((types.int64, *[types.float64] * SCALES))(CREW, *[types.int64] * 9, *[types.float64] * 2), parts=_parts
)
def run(crew, rows, encodings, multiplications, first, second, kept, room, out, other, scale_0, scale_1):
    """(whether it went through, scales that it found): `encodings` rows, then `multiplications` rows."""
    places, scales = scratch(48), scratch(32)
    store_word(places, 0, first)
    store_word(places, 1, second)
    store_word(places, 2, kept)
    store_word(places, 3, room)
    store_word(places, 4, out)
    store_word(places, 5, other)
    store_word(scales, 0, scale_0)
    store_word(scales, 1, scale_1)
    store_word(scales, 2, 1.0)
    store_word(scales, 3, 1.0)
    fits = np.int64(1)
    for i in range(encodings):
        e = _read_encoding(0, rows + i * _ROW)
        x = np.int64(load_word(np.uint64(0), places, e.x))
        target = np.int64(load_word(np.uint64(0), places, e.codes))
        codes, stored = target + e.codes_at, target + e.scales_at
        scale, those = load_word(0.0, scales, e.scale), (crew[0], crew[1], e.threads)
        if e.block_loop != 0:
            problems = encode_blocks(those, e.block_loop, e.table, x, 0, codes, stored, 0, 0, 0, 1.0, e.units, e.group)
            if problems == 0 and e.scales != 0:
                fits = blocks_fit(
                    codes,
                    stored,
                    e.scales,
                    e.lowest,
                    e.highest,
                    e.rows,
                    e.columns,
                    e.tile_rows,
                    e.tile_columns,
                    e.payloads,
                )
            scale = 1.0
        else:
            top = load_word(0.0, rows + i * _ROW, _TOP)
            if e.top == 0:
                problems = shared(those, e.loop, (e.table, x, 0, codes, 0, scale, e.units, 1, 0, 0, 0), e.units, CHUNK)
            else:
                amaxes = room + e.amaxes_at
                scale, problems = encode(
                    those, e.amax_loop, e.loop, e.table, x, codes, amaxes, e.units, top, e.power_of_two
                )
            fits = np.int64(np.isfinite(scale))
        if problems != 0 or fits == 0:
            return np.int64(0), 0.0, 0.0, 0.0, 0.0
        store_word(scales, e.scale, scale)
    for i in range(encodings, encodings + multiplications):
        m = _read_multiplication(0, rows + i * _ROW)
        a = np.int64(load_word(np.uint64(0), places, m.a))
        b = np.int64(load_word(np.uint64(0), places, m.b))
        bias = np.int64(0)
        if m.bias != NOTHING:
            bias = np.int64(load_word(np.uint64(0), places, m.bias))
        target = np.int64(load_word(np.uint64(0), places, m.out))
        factor = math.ldexp(load_word(0.0, scales, m.a_scale) * load_word(0.0, scales, m.b_scale), m.exponent)
        multiply(
            (crew[0], crew[1], m.threads),
            m.template,
            a + m.a_at,
            a + m.a_scales_at,
            b + m.b_at,
            b + m.b_scales_at,
            room + m.left_at,
            room + m.right_at,
            target,
            bias,
            factor,
            m.pack_left,
            m.pack_right,
            m.multiply,
            m.left_units,
            m.right_units,
            m.units,
        )
    return (
        np.int64(1),
        load_word(0.0, scales, 0),
        load_word(0.0, scales, 1),
        load_word(0.0, scales, 2),
        load_word(0.0, scales, 3),
    )


_TOP = Encoding._fields.index("top")
