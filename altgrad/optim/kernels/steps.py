"""Fused optimizer steps on the CPU: one pass over weights, gradients and moments, compiled on first use.

A step runs over tiles, under one scale each. Most rules move, land, count and feed back in one loop (`optim.kernels.rules`);
GridOptim and LNS-Madam round in float64 in a second one (`optim.kernels.self_rounding`). The steps have the signature
`altgrad.jit.template.LOOP`:

    table     the step's numbers (`Field`)                          x, out, codes   weights, gradients, first moment
    scales    one scale per `inner` elements, or 0 for `scale`     partials        six counts per COUNT_TILE elements

Arithmetic is float32 in the order of torch's kernels, with fused multiply-add where torch has it.
"""

# ruff: noqa: F821, SIM109, SIM113  (names are bound to the templates, and Numba compiles what is plain)
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from altgrad.jit.element import Arithmetic, rounding_of
from altgrad.jit.grid_rounding import key_words, read_grid, scaled_grid
from altgrad.jit.grid_table import DRAWING
from altgrad.jit.machine import low_word
from altgrad.jit.memory import load, load_word, scratch, store_word
from altgrad.jit.storage import FLOAT32, FLOAT64
from altgrad.jit.template import loop, part
from altgrad.optim.kernels import parts, rules, self_rounding
from altgrad.optim.kernels.parts import COUNT_FIELDS, COUNT_TILE, TILE, Field, Landing, Pull, Rule, Variant


def _step(table, w, g, m, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Elements start .. stop - 1."""
    word = np.uint64(0)
    v = np.int64(load_word(word, table, SECOND))
    extra = np.int64(load_word(word, table, EXTRA))
    emin_bits = load_word(np.uint32(0), table, EMIN_BITS)
    emin = load_word(word, table, EMIN_FIELD)
    mantissa = load_word(word, table, MANTISSA_FIELD)
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
    rms = np.float32(load_word(0.0, table, RMS))
    before = scratch(TILE_BYTES)  # also what is kept for the feedback
    aim = scratch(TILE_BYTES)
    words = scratch(TILE_BYTES)
    grid = read_grid(np.uint32(0), np.int64(load_word(word, table, ROUND_TABLE)))
    s = np.float32(scale)
    position = start
    while position < stop:
        count = min(stop - position, TILE - position % TILE)
        if channels > 1:
            count = min(count, inner - position % inner)
            s = load(scales, position // inner, FLOAT32)
        at = position * 4
        one, two = key_words(np.uint64(seed), np.uint64(stream), np.uint64(position >> 32))
        limit = np.float32(top * np.float64(s))
        here = scaled_grid(grid, s) if POWER else grid
        place = (s, here, limit, low_word(np.uint32(0), position), one, two)
        clipped, beyond = 0, 0
        if RULE == GATHER:
            gather(g + at, m + at, count, keep)
        elif RULE == GRID_STEPS:
            n = (emin_bits, relative, keep, rms, size, decayed, clip)
            clipped = grid_steps(w + at, g + at, m + at, before, aim, words, count, n, place)
            if LANDING != NONE:
                beyond = land_steps(w + at, before, aim, words, count, s, emin, mantissa, top)
        elif RULE == LNS:
            n = (beta2, rest2, root, clip)
            ends = (np.float64(np.int64(emin)) - 1023.0, np.log2(top), np.log2(bound / np.float64(s)))
            if pulls(w + at, g + at, m + at, before, aim, words, count, n, place):
                beyond = lns_anywhere(w + at, before, aim, words, count, s, -exact_size, *ends)
            else:
                beyond = lns(w + at, before, aim, words, count, s, -exact_size, *ends)
        elif RULE == ADAM:
            n = (emin_bits, relative, keep, beta2, rest2, root, eps, size, decayed)
            adam(w + at, g + at, m + at, v + at, extra + position * 2, aim, before, words, count, n, place)
        elif RULE == MADAM:
            n = (beta2, rest2, root, size, clip, np.float32(bound))
            madam(w + at, g + at, m + at, aim, words, count, n, place)
        else:
            signs(w + at, g + at, m + at, aim, words, count, (keep, rest2, size, decayed), place)
        if LANDING != NONE:
            if RULE == GRID_STEPS or RULE == LNS:
                counts = tally(before, aim, w + at, count)
            else:
                counts = land(w + at, m + at, extra + position * 2, aim, before, words, count, share, place)
            attempted, unmoved, stalled, crossed, over = counts
            flips = count - np.int64(unmoved)
            beyond = np.int64(beyond) if RULE == GRID_STEPS or RULE == LNS else np.int64(over)
            found = (np.int64(attempted), flips, np.int64(stalled), np.int64(crossed), np.int64(clipped), beyond)
            row = partials + (position // COUNT_TILE) * (COUNT_FIELDS * 8)
            fresh = position % COUNT_TILE == 0
            slot = 0
            for number in found:
                held = 0.0 if fresh else load(row, slot, FLOAT64)
                store_word(row, slot, held + np.float64(number))
                slot += 1
        position += count
    return 0


@cache
def compiled(variant: Variant) -> int:
    """Address of one fused step, compiled or loaded from Numba's cache on first use."""
    constants = {
        **{member.name: int(member) for enum in (Rule, Landing, Pull, Field) for member in enum},
        "TILE_BYTES": 4 * TILE,
        "DRAWS": variant.LANDING != Landing.NONE and variant.FAMILY in DRAWING,
        "fma": parts.llvm_fma,
    }

    def of(template, **bound) -> Any:
        return part(template, variant, **constants, **bound)

    small = {
        "multiply_add": of(parts._multiply_add),
        "rounded": rounding_of(Arithmetic(variant.FAMILY, PLAIN=variant.PLAIN)),
        "no_counts": of(parts._no_counts),
        "with_weight": of(parts._with_weight),
        "within": of(parts._within),
        "aim_at": of(rules._aim_at),
        "spacing": of(parts._spacing),
        "normalised": of(parts._normalised),
        "exponential": of(parts._exponential),
    }
    small["lerp"] = of(parts._lerp, **small)
    loops = {
        "adam": of(rules._adam, **small),
        "signs": of(rules._signs, **small),
        "madam": of(rules._madam, **small),
        "land": of(rules._land, **small),
        "gather": of(self_rounding._gather, **small),
        "grid_steps": of(self_rounding._grid_steps, **small),
        "land_steps": of(self_rounding._land_steps, **small),
        "pulls": of(self_rounding._pulls, **small),
        "tally": of(parts._tally, **small),
        "lns": of(self_rounding._lns, EXACT=True),
        "lns_anywhere": of(self_rounding._lns, EXACT=False),
    }
    return loop(_step, variant, **constants, **loops)
