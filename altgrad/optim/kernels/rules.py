"""The rules that say where a weight should go: AdamW and its relatives, Lion and Signum, Madam; and the landing there.

Two loops over a tile that stays in the first-level cache. A rule updates its moments and writes the *aim* of every
weight, with a random word where the landing is stochastic: its divisions and square roots leave the multipliers of the
random words free. The landing rounds by the quantization kernel's own arithmetic (`jit.element._rounded`), counts, and
feeds its error back. (In one loop the chain of operations of an element outgrows the processor's window.)

`n` holds a rule's numbers; `place` is (scale, grid in units of it, largest weight, index of element 0, two key words).
"""

# ruff: noqa: F821  (names are bound to the templates, and Numba compiles what is plain)
from __future__ import annotations

import numpy as np

from altgrad.jit.grid_rounding import random_word
from altgrad.jit.machine import add, bits_of, float_of, low_word
from altgrad.jit.memory import keep, kept, load, reload, store
from altgrad.jit.storage import BFLOAT16, FLOAT32


def _aim_at(w, aim, words, i, target, place):
    """Keep where weight i should go: in `aim` with its random word, or in place where nothing lands."""
    if LANDING == NONE:
        store(w, i, target, FLOAT32)
    else:
        keep(aim, i, target)
    if DRAWS:
        index, one, two = place[3:]
        keep(words, i, float_of(random_word(add(index, low_word(index, i)), one, two)))


def _adam(w, g, m, v, extra, aim, rest, words, count, n, place):
    """Aim `count` weights by AdamW; see `altgrad.optim.adam_math`."""
    emin_bits, relative, part, beta2, rest2, root, eps, size, decayed = n
    for i in range(count):
        x = load(w, i, FLOAT32)
        pull = load(g, i, FLOAT32)
        step = spacing(x, place[0], emin_bits, relative) if SPACING else np.float32(1)
        if ON_GRADIENT:
            pull = pull * step
        first = lerp(load(m, i, FLOAT32), pull, part)
        second = multiply_add(rest2 * pull, pull, load(v, i, FLOAT32) * beta2)
        bottom = np.sqrt(second) / root + (eps * step if ON_GRADIENT and ON_STEP else eps)
        bottom = np.float32(np.inf) if bottom == np.float32(0) else bottom
        moved = (size * (first * step if ON_STEP else first)) / bottom
        store(v, i, second, FLOAT32)
        store(m, i, first, FLOAT32)
        if LANDING == KAHAN:
            total = load(extra, i, BFLOAT16) + (moved + (-decayed) * x)
            keep(rest, i, total)
            aim_at(w, aim, words, i, x + total, place)
        else:
            aim_at(w, aim, words, i, x * decayed + moved, place)
        if LANDING == ECO:
            keep(rest, i, np.float32(0) if bottom == np.float32(np.inf) else bottom)


def _signs(w, g, m, aim, words, count, n, place):
    """Aim `count` weights by the sign of an average: Lion, and Signum."""
    part, rest2, size, decayed = n
    zero = np.float32(0)
    for i in range(count):
        pull = load(g, i, FLOAT32)
        held = load(m, i, FLOAT32)
        average = lerp(held, pull, part)
        store(m, i, lerp(held, pull, rest2) if RULE == LION else average, FLOAT32)
        step = size if average > zero else (-size if average < zero else zero)
        aim_at(w, aim, words, i, load(w, i, FLOAT32) * decayed + step, place)


def _madam(w, g, v, aim, words, count, n, place):
    """Aim `count` weights by factors: Madam."""
    beta2, rest2, root, size, clip, bound = n
    zero = np.float32(0)
    for i in range(count):
        x = load(w, i, FLOAT32)
        pull = load(g, i, FLOAT32)
        second = multiply_add(rest2 * pull, pull, load(v, i, FLOAT32) * beta2)
        store(v, i, second, FLOAT32)
        pull = normalised(pull, second, root, clip)
        pull = pull if x > zero else (-pull if x < zero else pull * zero)
        target = within(x * exponential(pull * size), bound)
        aim_at(w, aim, words, i, target if abs(x) < np.float32(np.inf) else x, place)


def _land(w, m, extra, aim, rest, words, count, share, place):
    """Round `count` aims to the grid, put the errors where they will be worked off, and return the counts.

    What lies beyond the largest weight is dropped, not worked off.
    """
    s, grid, limit = place[:3]
    counts = no_counts()
    for i in range(count):
        x = load(w, i, FLOAT32)
        target = kept(aim, i)
        word = bits_of(kept(words, i)) if DRAWS else place[3]
        payload, _, _, _ = rounded(target, target if POWER else target / s, word, grid)
        landed = float_of(payload) if POWER else float_of(payload) * s
        store(w, i, landed, FLOAT32)
        counts = with_weight(counts, target != x, x, landed, abs(target) > limit)
        if LANDING == ECO:
            lost = within(target, limit) - landed
            store(m, i, reload(m, i, FLOAT32) + share * kept(rest, i) * lost, FLOAT32)
        if LANDING == KAHAN:
            exact = kept(rest, i) - (landed - x)
            reached = within(target, limit)
            store(extra, i, exact if reached == target else reached - landed, BFLOAT16)
    return counts
