"""Fused optimizer steps on the CPU: one pass over weights, gradients and moments, compiled on first use.

A step runs over tiles, under one scale each. Most rules move, land, count and feed back in one loop (`optim.kernels.rules`);
GridOptim and LNS-Madam round in float64 in a second one (`optim.kernels.self_rounding`). The steps are C functions with the
signature of `altgrad.quantization.kernels.cpu.loops`, run by the same threaded driver:

    table     the step's numbers (`Field`)                          x, out, codes   weights, gradients, first moment
    scales    one scale per `inner` elements, or 0 for `scale`     partials        six counts per COUNT_TILE elements

Arithmetic is float32 in the order of torch's kernels, with fused multiply-add where torch has it.
"""

# ruff: noqa: F821, SIM109, SIM113  (names are bound to the templates, and Numba compiles what is plain)
from __future__ import annotations

from functools import cache

import numpy as np
from numba import cfunc, njit, types

from altgrad.jit.grid_rounding import key_words, read_grid, scaled_grid
from altgrad.jit.machine import FLOAT32, FLOAT64, load, load_word, low_word, scratch, store_double
from altgrad.optim.kernels import parts as cpu_parts
from altgrad.optim.kernels import rules as cpu_rules
from altgrad.optim.kernels import self_rounding as cpu_self_rounding
from altgrad.optim.kernels.parts import COUNT_FIELDS, COUNT_TILE, TILE, Field, Landing, Pull, Rule, Variant
from altgrad.quantization.kernels.cpu import loops as cpu_loops
from altgrad.quantization.kernels.cpu.loops import DRAWING


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
        elif RULE == RUNGS:
            n = (emin_bits, relative, keep, rms, size, decayed, clip)
            clipped = rungs(w + at, g + at, m + at, before, aim, words, count, n, place)
            if LANDING != NONE:
                beyond = land_rungs(w + at, before, aim, words, count, s, emin, mantissa, top)
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
            if RULE == RUNGS or RULE == LNS:
                counts = tally(before, aim, w + at, count)
            else:
                counts = land(w + at, m + at, extra + position * 2, aim, before, words, count, share, place)
            attempted, unmoved, stalled, crossed, over = counts
            flips = count - np.int64(unmoved)
            beyond = np.int64(beyond) if RULE == RUNGS or RULE == LNS else np.int64(over)
            found = (np.int64(attempted), flips, np.int64(stalled), np.int64(crossed), np.int64(clipped), beyond)
            row = partials + (position // COUNT_TILE) * (COUNT_FIELDS * 8)
            fresh = position % COUNT_TILE == 0
            slot = 0
            for number in found:
                held = 0.0 if fresh else load(row, slot, FLOAT64)
                store_double(row, slot, held + np.float64(number))
                slot += 1
        position += count
    return 0


_MARK = cpu_parts.stamp(__file__, cpu_rules.__file__, cpu_self_rounding.__file__)
_SIGNATURE = types.int64(*cpu_loops.LOOP_ARGUMENTS.types)
_kept: list = []  # compiled functions must outlive their addresses


@cache
def compiled(variant: Variant) -> int:
    """Address of one fused step, compiled or loaded from Numba's cache on first use."""
    landing = cpu_loops.Variant(FLOAT32, variant.FAMILY, PLAIN=variant.PLAIN)
    constants = {
        **{member.name: int(member) for enum in (Rule, Landing, Pull, Field) for member in enum},
        "TILE_BYTES": 4 * TILE,
        "DRAWS": variant.LANDING != Landing.NONE and variant.FAMILY in DRAWING,
        "fma": cpu_parts.llvm_fma,
    }

    def part(template, **parts):
        return njit(error_model="numpy")(cpu_parts.bind(template, variant, _MARK, **constants, **parts))

    small = {"multiply_add": part(cpu_parts._multiply_add), "rounded": cpu_loops.rounding_of(landing)}
    small |= {"no_counts": part(cpu_parts._no_counts), "with_weight": part(cpu_parts._with_weight)}
    small |= {"within": part(cpu_parts._within), "aim_at": part(cpu_rules._aim_at)}
    small |= {"lerp": part(cpu_parts._lerp, **small), "spacing": part(cpu_parts._spacing)}
    small |= {"normalised": part(cpu_parts._normalised), "exponential": part(cpu_parts._exponential)}
    rules = {
        "adam": cpu_rules._adam,
        "signs": cpu_rules._signs,
        "madam": cpu_rules._madam,
        "land": cpu_rules._land,
        "gather": cpu_self_rounding._gather,
        "rungs": cpu_self_rounding._rungs,
        "land_rungs": cpu_self_rounding._land_rungs,
        "pulls": cpu_self_rounding._pulls,
        "tally": cpu_parts._tally,
    }
    loops = {name: part(template, **small) for name, template in rules.items()}
    loops |= {
        "lns": part(cpu_self_rounding._lns, EXACT=True),
        "lns_anywhere": part(cpu_self_rounding._lns, EXACT=False),
    }
    step = cpu_parts.bind(_step, variant, _MARK, **constants, **loops)
    entry = cfunc(_SIGNATURE, cache=True, error_model="numpy")(step)
    _kept.append(entry)
    return entry.address
