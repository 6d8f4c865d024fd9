"""From codes to panels: the loop that decodes an operand's codes while it packs them as a unit multiplies them.

An operand is a matrix of codes [rows, steps], steps along the reduction, in batches; either axis may be the one whose
codes are neighbours. Packed, it is cut along the reduction into slices of `SLICE` words, each of them into panels of 32
rows (`tiles`), short ones filled with zeros. Codes become what is multiplied by arithmetic (`jit.code_table`), or are looked
up where a run of them holds NaN or inf. What matrix units multiply from the left lies differently (`amx`).
"""

# ruff: noqa: F821  (names are bound to the templates)
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from altgrad.jit.code_table import Decoding, by_fields, by_integer, read_codes
from altgrad.jit.machine import band, bits_of, bor, bxor, in_wide_vectors, low_word, shl, shr, truncated
from altgrad.jit.memory import keep, kept, load, load_code, scratch, store_code, table_reader
from altgrad.jit.storage import FLOAT32
from altgrad.jit.template import loop, part
from altgrad.quantization.products.tiles import LANES, PANEL_ROWS, put_byte, starts, transposed_words
from altgrad.quantization.products.units import GROUP, Unit

SLICE = 192  # words along the reduction whose panels of both operands stay in the first-level cache
PANEL_BYTES = 4 * PANEL_ROWS * (SLICE + 1)  # the words that sums start from come first
UNITS = tuple(Unit)


class Variant(NamedTuple):
    """The constants of a packing loop."""

    UNIT: int  # index in `UNITS`
    DECODING: int  # `jit.code_table.Decoding`
    BY_STEPS: bool  # codes along the reduction are neighbours, not those along the rows
    SCALED: bool  # each code has a block's scale


class Packing(NamedTuple):
    """What a packing loop finds in its table of 64-bit words."""

    codes: int  # addresses
    packed: int
    facts: int
    payloads: int
    scales: int  # one-byte codes of the scales of blocks
    scale_values: int  # float32 of each of them
    rows: int
    steps: int
    row_bytes: int  # from a code to that of the next row, step and matrix
    step_bytes: int
    batch_bytes: int
    scale_row: int  # from a block's scale to that of the next block, in scales
    scale_step: int
    scale_batch: int
    block_rows: int
    block_steps: int
    flips: int  # xored into each word
    sums: int  # whether sums start from this operand's panels
    row_major: int  # whether a row's 16 words are neighbours, for matrix units
    first: int  # slice of the reduction that is packed, and how many follow it
    slices: int


_read = table_reader(Packing)


def _payload(code, scale, facts):
    """(what the unit multiplies, as the low bits of a uint32, whether the code is no number) of a code."""
    value, void = by_integer(code, facts) if DECODING == BY_INTEGER else by_fields(code, facts)
    return narrow(value * scale if SCALED else value), void


def _narrow(value):
    """A payload as the low bits of a uint32: float32, bf16, which holds it exactly, or an integer of 16 or 8 bits."""
    return band(truncated(np.uint32(0), value), np.uint32(MASK)) if MASK else shr(bits_of(value), np.uint32(DROPPED))


def _decode(codes, count, multipliers, out, payloads, facts):
    """`count` neighbouring codes to neighbouring payloads."""
    in_wide_vectors()
    special = np.uint32(0)
    if DECODING != BY_TABLE:
        for i in range(count):
            code = low_word(special, load_code(codes, i, 1))
            value, void = payload(code, kept(multipliers, i), facts)
            special = bor(special, void)
            store_code(out, i, value, ITEM)
    if DECODING == BY_TABLE or special != np.uint32(0):
        for i in range(count):
            value = load(payloads, load_code(codes, i, 1), FLOAT32)
            store_code(out, i, narrow(value * kept(multipliers, i) if SCALED else value), ITEM)


def _combine(first, line_bytes, multipliers, out, payloads, facts, flips):
    """Words of 32 rows from GROUP_SIZE lines of neighbouring codes; scales of all lines are alike."""
    in_wide_vectors()
    special = np.uint32(0)
    if DECODING != BY_TABLE:
        for i in range(PANEL):
            word = flips
            for line in range(GROUP_SIZE):
                code = low_word(special, load_code(first + line * line_bytes, i, 1))
                value, void = payload(code, kept(multipliers, i), facts)
                special = bor(special, void)
                word = bxor(word, shl(value, np.uint32(line * (32 // GROUP_SIZE))))
            store_code(out, i, word, 4)
    if DECODING == BY_TABLE or special != np.uint32(0):
        for i in range(PANEL):
            word = flips
            for line in range(GROUP_SIZE):
                value = load(payloads, load_code(first + line * line_bytes, i, 1), FLOAT32)
                value = narrow(value * kept(multipliers, i) if SCALED else value)
                word = bxor(word, shl(value, np.uint32(line * (32 // GROUP_SIZE))))
            store_code(out, i, word, 4)


def _copy(source, count, target, room):
    """`count` codes, and zeros up to `room`."""
    for i in range(count):
        put_byte(target, i, load_code(source, i, 1))
    for i in range(count, room):
        put_byte(target, i, 0)


def _multipliers(p, scales, row, step, count, multipliers):
    """The scales of `count` neighbouring codes along the reduction."""
    first, done = scales + row // p.block_rows * p.scale_row, 0
    block = step // p.block_steps
    while done < count:
        stop = min((block + 1) * p.block_steps - step, count)
        s = load(p.scale_values, load_code(first, block * p.scale_step, 1), FLOAT32)
        for i in range(done, stop):
            keep(multipliers, i, s)
        done, block = stop, block + 1


def _panel_by_steps(p, facts, codes, scales, row, step, words, panel):
    """A panel of rows whose codes along the reduction are neighbours: decoded row by row, then transposed if need be."""
    in_wide_vectors()
    lines, padded, multipliers = scratch(BLOCK_BYTES), scratch(64), scratch(1024)
    steps = min(words * GROUP_SIZE, p.steps - step)
    for half in range(2):
        at = row + half * LANES
        for done in range(0, words, LANES):
            count = min(LANES * GROUP_SIZE, steps - done * GROUP_SIZE)
            target = panel + 4 * PANEL * (done + 1)
            into = target + half * BLOCK_BYTES if MATRICES and p.row_major != 0 else lines
            for i in range(LANES):
                line = into + i * LANES * 4
                if at + i < p.rows:
                    source = codes + (at + i) * p.row_bytes + (step + done * GROUP_SIZE)
                    if SCALED:
                        multiply_by(p, scales, at + i, step + done * GROUP_SIZE, count, multipliers)
                    if count < LANES * GROUP_SIZE:
                        copy(source, count, padded, LANES * GROUP_SIZE)
                        if SCALED:
                            for j in range(count, LANES * GROUP_SIZE):
                                keep(multipliers, j, np.float32(1.0))
                        source = padded
                    decode(source, LANES * GROUP_SIZE, multipliers, line, p.payloads, facts)
                else:
                    for j in range(LANES):
                        store_code(line, j, np.uint32(0), 4)
            if into == lines:
                transposed_words(lines, LANES, target + 4 * half * LANES, PANEL, p.flips)


def _panel_by_rows(p, facts, codes, scales, row, step, words, panel):
    """A panel of neighbouring rows: lines along the rows are combined into words."""
    in_wide_vectors()
    lines, multipliers, columns = scratch(LINES_BYTES), scratch(1024), scratch(COLUMNS_BYTES)
    width = min(PANEL, p.rows - row)
    row_major = MATRICES and p.row_major != 0
    flips = np.uint32(p.flips)
    held = -1
    for word in range(words):
        at = step + word * GROUP_SIZE
        if SCALED:
            block = at // p.block_steps
            if block != held:
                held = block
                for i in range(width):
                    place = (row + i) // p.block_rows * p.scale_row + block * p.scale_step
                    keep(multipliers, i, load(p.scale_values, load_code(scales, place, 1), FLOAT32))
                for i in range(width, PANEL):
                    keep(multipliers, i, np.float32(1.0))
        source, line_bytes = codes + at * p.step_bytes + row, p.step_bytes
        if width < PANEL or at + GROUP_SIZE > p.steps:
            for line in range(GROUP_SIZE):
                count = width if at + line < p.steps else 0
                copy(source + line * p.step_bytes, count, lines + line * PANEL, PANEL)
            source, line_bytes = lines, PANEL
        target = columns + 4 * PANEL * (word % LANES) if row_major else panel + 4 * PANEL * (word + 1)
        combine(source, line_bytes, multipliers, target, p.payloads, facts, flips)
        if row_major and (word + 1 == words or word % LANES == LANES - 1):
            for i in range((word % LANES + 1) * PANEL, LANES * PANEL):
                store_code(columns, i, np.uint32(0), 4)
            target = panel + 4 * PANEL * (word - word % LANES + 1)
            for half in range(2):
                transposed_words(columns + 4 * half * LANES, PANEL, target + half * BLOCK_BYTES, LANES, 0)
    if not row_major:
        for i in range(words * PANEL, (words + WHOLE - 1) // WHOLE * WHOLE * PANEL):
            store_code(panel, PANEL + i, np.uint32(0), 4)


def _pack(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Panels start .. stop - 1 of all batches, each over `slices` slices of the reduction from the first on."""
    in_wide_vectors()
    p = read(0, table)
    facts = read_codes(np.uint32(0), p.facts)
    panels = (p.rows + PANEL - 1) // PANEL
    words = (p.steps + GROUP_SIZE - 1) // GROUP_SIZE
    slices = min(p.slices, (words + SLICE - 1) // SLICE - p.first)
    for unit in range(start, stop):
        batch, panel = unit // panels, unit % panels
        for cut in range(slices):
            target = p.packed + ((batch * slices + cut) * panels + panel) * PANEL_BYTES
            here = min(SLICE, words - (p.first + cut) * SLICE)
            first = (p.first + cut) * SLICE * GROUP_SIZE
            codes_here, scales_here = p.codes + batch * p.batch_bytes, p.scales + batch * p.scale_batch
            fill(p, facts, codes_here, scales_here, panel * PANEL, first, here, target)
            if p.sums != 0:
                starts(target, here)
    return np.int64(0)


@cache
def compiled(variant: Variant) -> int:
    """Address of a packing loop."""
    unit = UNITS[variant.UNIT]
    constants = {member.name: int(member) for member in Decoding} | {
        "GROUP_SIZE": GROUP[unit],
        "ITEM": 4 // GROUP[unit],
        "MASK": 2 ** (32 // GROUP[unit]) - 1 if unit.sums_integers else 0,
        "DROPPED": 32 - 32 // GROUP[unit],
        "PANEL": PANEL_ROWS,
        "BLOCK_BYTES": 4 * LANES * LANES,
        "LINES_BYTES": 4 * PANEL_ROWS,
        "COLUMNS_BYTES": 4 * PANEL_ROWS * LANES if unit.by_matrices else 64,
        "MATRICES": unit.by_matrices,
        "WHOLE": LANES if unit.by_matrices else 1,
    }
    narrow = part(_narrow, variant, inline=True, **constants)
    given = {"narrow": narrow, "payload": part(_payload, variant, inline=True, narrow=narrow, **constants), **constants}
    copy = part(_copy, variant, **given)
    if variant.BY_STEPS:
        decode = part(_decode, variant, inline=True, **given)
        multiply_by = part(_multipliers, variant, **given)
        fill = part(_panel_by_steps, variant, copy=copy, decode=decode, multiply_by=multiply_by, **given)
    else:
        combine = part(_combine, variant, inline=True, **given)
        fill = part(_panel_by_rows, variant, copy=copy, combine=combine, **given)
    return loop(_pack, variant, fill=fill, starts=starts(unit), read=_read, **given)
