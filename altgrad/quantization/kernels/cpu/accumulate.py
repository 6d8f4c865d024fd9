"""The product of two operands as an accumulator adds it up, on a CPU: whole numbers held in floats, 64 columns at a time.

A term cut at exponent E is trunc(a * b * 2^(F - E)): the factor is a power of two and the product of the two significands
fits the carrier, so the float is the exact integer, and the sum of a step's integers is exact as well, in float32 lanes
where it has at most 24 bits, in float64 lanes up to 53. `reference.accumulate` does the same on Python's integers.

A unit of work is ROWS rows of a and one panel of LANES columns of b; the panel's products of one step stay in the
first-level cache while all rows take that step.
"""

# ruff: noqa: F821  (names are bound to the templates)
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from altgrad.formats.accumulator import Accumulator, Promote
from altgrad.formats.rounding import Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.machine import band, bits_of, float_of, low_word, narrowed, sub, whole_part, widened
from altgrad.jit.memory import compute_zero, load, reload, scratch, store, table_reader
from altgrad.jit.storage import FLOAT32, FLOAT64, ITEM_BYTES
from altgrad.jit.template import loop, part
from altgrad.jit.threads import ELEMENTS_PER_THREAD, run_table, threads_for

LANES = 64  # columns of a panel
ROWS = 32  # rows of a unit of work
GROUPS = 64  # most groups in one step
_ROUNDINGS = {Rounding.TOWARD_ZERO: 0, Rounding.NEAREST_EVEN: 1, Rounding.NEAREST_AWAY: 2}
_PROMOTIONS = {Promote.ADD: 1, Promote.FMA_SCALED: 2, Promote.SCALED_FMA: 3}


class Variant(NamedTuple):
    """The constants of an accumulating loop."""

    WIDE: bool  # float64 lanes
    EXACT: bool  # nothing is cut
    ROUNDING: int
    PROMOTE: int  # 0: never
    GROUP: bool
    NORMALIZE: bool


class Parameters(NamedTuple):
    """What the loop finds in its table: addresses and sizes, then float64 numbers."""

    a: int  # [rows, reduced]
    a_powers: int  # 2^exponent of each, 0 for zero; of each group where there are groups
    b: int  # [panels, reduced, LANES]
    b_powers: int
    a_scales: int  # float32 [rows, blocks]: of the promotion; values of the groups' scales
    b_scales: int  # [panels, blocks, LANES]
    out: int  # float64 [panels, rows, LANES]
    rows: int
    reduced: int
    blocks: int
    products: int
    group: int
    promote_every: int
    cut: float  # 2^F
    step: float  # 2^-f of the running sum's f fraction bits, its smallest normal and largest values
    least: float
    largest: float
    main_step: float
    main_least: float
    main_largest: float


_FIRST_NUMBER = Parameters._fields.index("cut")
_read = table_reader(Parameters, floats=Parameters._fields[_FIRST_NUMBER:])


class _Rounded(NamedTuple):
    ROUNDING: int


def _power(x):
    """The power of two in the leading bit of |x|; 0 for zero and subnormals of the carrier, inf for inf and NaN."""
    bits = bits_of(x)
    mask = np.uint64(0x7FF0000000000000) if WIDE else np.uint64(0x7F800000)
    return float_of(band(bits, low_word(bits, mask)))


def _rounded(d, step, least, largest):
    """d rounded to a sum's format; beyond its largest value infinite, inf and NaN as they are."""
    half, one = narrowed(d, 0.5), narrowed(d, 1.0)
    size = abs(d)
    leading = power(d)
    ulp = (leading if leading > least else least) * step
    steps = size / ulp
    whole = whole_part(steps)
    rest = steps - whole
    if ROUNDING == 1:
        pairs = whole_part(whole * half)
        up = rest > half or (rest == half and whole > pairs + pairs)
    else:
        up = ROUNDING == 2 and rest >= half
    value = (whole + one if up else whole) * ulp
    value = value if value <= largest else narrowed(d, np.inf)
    value = value if size < narrowed(d, np.inf) else size
    return -value if bits_of(d) != bits_of(size) else value


def _two_sum(x, y):
    """(fl(x + y), the error) of two float64 numbers, exactly; the error of a sum that is not finite is 0."""
    total = x + y
    part_of_y = total - x
    error = (x - (total - part_of_y)) + (y - part_of_y)
    return total, (error if total - total == 0.0 else 0.0)


def _to_odd(total, error):
    """A rounded float64 sum and its error as the float64 that rounds once more as the exact sum would."""
    bits = bits_of(total)
    inexact = (error != 0.0) and (band(bits, np.uint64(1)) == np.uint64(0))
    toward_zero = (error > 0.0) != (total > 0.0)
    nearer = float_of(sub(bits, np.uint64(1)) if toward_zero else sub(bits, np.uint64(0xFFFFFFFFFFFFFFFF)))
    return nearer if inexact else total


def _cut_step(a, a_powers, b, b_powers, sums, tops, scales, totals, count, cut, step, least, largest):
    """One step of one row: `count` products and the running sums, cut at the largest exponent."""
    zero, one, inf = compute_zero(KIND), narrowed(cut, 1.0), narrowed(cut, np.inf)
    for j in range(LANES):
        c = reload(sums, j, KIND)
        leading = power(c)
        leading = leading if leading > least else least
        store(tops, j, leading if abs(c) < inf and c != zero else zero, KIND)
    for k in range(count):
        mine = load(a_powers, k, KIND)
        value = load(a, k, KIND)
        for j in range(LANES):
            if NORMALIZE:
                exponent = power(value * load(b, k * LANES + j, KIND))
            else:
                exponent = mine * load(b_powers, k * LANES + j, KIND)
            top = reload(tops, j, KIND)
            store(tops, j, exponent if exponent > top else top, KIND)
    for j in range(LANES):
        top = reload(tops, j, KIND)
        scale = cut / (top if top > zero else one)
        store(scales, j, scale, KIND)
        store(totals, j, whole_part(reload(sums, j, KIND) * scale), KIND)
    for k in range(count):
        value = load(a, k, KIND)
        for j in range(LANES):
            term = whole_part(value * load(b, k * LANES + j, KIND) * reload(scales, j, KIND))
            store(totals, j, reload(totals, j, KIND) + term, KIND)
    for j in range(LANES):
        store(sums, j, rounded(reload(totals, j, KIND) / reload(scales, j, KIND), step, least, largest), KIND)


def _exact_step(a, b, sums, totals, lows, count, step, least, largest):
    """One step of one row without a cut: the exact sum as two float64 numbers, rounded once."""
    for j in range(LANES):
        store(totals, j, reload(sums, j, KIND), KIND)
        store(lows, j, 0.0, KIND)
    for k in range(count):
        value = load(a, k, KIND)
        for j in range(LANES):
            total, error = two_sum(reload(totals, j, KIND), value * load(b, k * LANES + j, KIND))
            store(totals, j, total, KIND)
            store(lows, j, reload(lows, j, KIND) + error, KIND)
    for j in range(LANES):
        total, error = two_sum(reload(totals, j, KIND), reload(lows, j, KIND))
        store(sums, j, rounded(to_odd(total, error), step, least, largest), KIND)


def _group_step(a, a_powers, a_scales, b, b_powers, b_scales, sums, terms, powers, groups, group, p):
    """One step of one row on whole groups: each is summed exactly, then cut at the exponents of the scales alone."""
    for g in range(groups):
        for j in range(LANES):
            store(terms, g * LANES + j, 0.0, KIND)
        for k in range(g * group, g * group + group):
            value = load(a, k, KIND)
            for j in range(LANES):
                term = reload(terms, g * LANES + j, KIND) + value * load(b, k * LANES + j, KIND)
                store(terms, g * LANES + j, term, KIND)
        mine, scale = load(a_powers, g, KIND), load(a_scales, g, FLOAT64)
        for j in range(LANES):
            term = reload(terms, g * LANES + j, KIND) * scale * load(b_scales, g * LANES + j, FLOAT64)
            store(terms, g * LANES + j, term, KIND)
            store(powers, g * LANES + j, mine * load(b_powers, g * LANES + j, KIND) if term != 0.0 else 0.0, KIND)
    for j in range(LANES):
        c = reload(sums, j, KIND)
        top = power(c)
        top = top if top > p.least else p.least
        top = top if abs(c) < np.inf and c != 0.0 else 0.0
        for g in range(groups):
            exponent = reload(powers, g * LANES + j, KIND)
            top = exponent if exponent > top else top
        scale = p.cut / (top if top > 0.0 else 1.0)
        total = whole_part(c * scale)
        for g in range(groups):
            total += whole_part(reload(terms, g * LANES + j, KIND) * scale)
        store(sums, j, rounded(total / scale, p.step, p.least, p.largest), KIND)


def _promote(sums, mains, a_scale, b_scales, p):
    """The running sums go to the main sums, and start again at 0."""
    for j in range(LANES):
        partial = widened(reload(sums, j, KIND), True)
        main = reload(mains, j, FLOAT64)
        if PROMOTE == 2:
            pair = np.float64(np.float32(a_scale) * np.float32(load(b_scales, j, FLOAT64)))
            partial = partial * pair
        elif PROMOTE == 3:
            partial = np.float64(np.float32(partial) * np.float32(a_scale)) * load(b_scales, j, FLOAT64)
        total, error = two_sum(main, partial)
        store(mains, j, rounded_main(to_odd(total, error), p.main_step, p.main_least, p.main_largest), FLOAT64)
        store(sums, j, compute_zero(KIND), KIND)


def _loop(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Units start .. stop - 1 in C order of (panels, blocks of ROWS rows)."""
    p = read(0, table)
    zero = compute_zero(KIND)
    cut, step, least, largest = (
        narrowed(zero, p.cut),
        narrowed(zero, p.step),
        narrowed(zero, p.least),
        narrowed(zero, p.largest),
    )
    sums, mains = scratch(SUM_BYTES), scratch(MAIN_BYTES)
    tops, multipliers, totals = scratch(LANE_BYTES), scratch(LANE_BYTES), scratch(LANE_BYTES)
    terms, powers = scratch(GROUP_BYTES), scratch(GROUP_BYTES)
    row_blocks = (p.rows + ROWS - 1) // ROWS
    groups = p.reduced // p.group
    for unit in range(start, stop):
        panel = unit // row_blocks
        first = (unit % row_blocks) * ROWS
        rows = min(ROWS, p.rows - first)
        for i in range(ROWS * LANES):
            store(sums, i, zero, KIND)
            store(mains, i, 0.0, FLOAT64)
        begin = 0
        while begin < p.reduced:
            end = min(begin + p.products, p.reduced)
            b = (panel * p.reduced + begin) * LANES * ITEM
            for r in range(rows):
                at = ((first + r) * p.reduced + begin) * ITEM
                mine = sums + r * LANES * ITEM
                if EXACT:
                    exact_step(p.a + at, p.b + b, mine, totals, tops, end - begin, step, least, largest)
                elif GROUP:
                    g = begin // p.group
                    row, column = (first + r) * groups + g, (panel * groups + g) * LANES
                    group_step(
                        p.a + at,
                        p.a_powers + row * ITEM,
                        p.a_scales + row * 8,
                        p.b + b,
                        p.b_powers + column * ITEM,
                        p.b_scales + column * 8,
                        mine,
                        terms,
                        powers,
                        (end - begin) // p.group,
                        p.group,
                        p,
                    )
                else:
                    cut_step(
                        p.a + at,
                        p.a_powers + at,
                        p.b + b,
                        p.b_powers + b,
                        mine,
                        tops,
                        multipliers,
                        totals,
                        end - begin,
                        cut,
                        step,
                        least,
                        largest,
                    )
            if PROMOTE and (end % p.promote_every == 0 or end == p.reduced):
                block = (end - 1) // p.promote_every
                for r in range(rows):
                    a_scale = load(p.a_scales, (first + r) * p.blocks + block, FLOAT64) if PROMOTE > 1 else 1.0
                    b_scales = p.b_scales + (panel * p.blocks + block) * LANES * 8
                    promote(sums + r * LANES * ITEM, mains + r * LANES * 8, a_scale, b_scales, p)
            begin = end
        for r in range(rows):
            for j in range(LANES):
                at = r * LANES + j
                found = reload(mains, at, FLOAT64) if PROMOTE else widened(reload(sums, at, KIND), True)
                store(p.out, (panel * p.rows + first) * LANES + at, found, FLOAT64)
    return np.int64(0)


class _Lanes(NamedTuple):
    WIDE: bool


@cache
def _compiled(variant: Variant) -> int:
    kind = FLOAT64 if variant.WIDE else FLOAT32
    item = ITEM_BYTES[kind]
    power, wide_power = part(_power, _Lanes(variant.WIDE)), part(_power, _Lanes(True))
    two_sum, to_odd = part(_two_sum, _Lanes(True)), part(_to_odd, _Lanes(True))
    rounded = part(_rounded, _Rounded(variant.ROUNDING), power=power)
    rounded_main = part(_rounded, _Rounded(1), power=wide_power)
    shared = {"KIND": kind, "LANES": LANES, "power": power, "rounded": rounded, "two_sum": two_sum, "to_odd": to_odd}
    return loop(
        _loop,
        variant,
        KIND=kind,
        ITEM=item,
        LANES=LANES,
        ROWS=ROWS,
        SUM_BYTES=ROWS * LANES * item,
        MAIN_BYTES=ROWS * LANES * 8,
        LANE_BYTES=LANES * item,
        GROUP_BYTES=GROUPS * LANES * 8 if variant.GROUP else 64,
        read=_read,
        cut_step=part(_cut_step, variant, **shared),
        exact_step=part(_exact_step, variant, **shared),
        group_step=part(_group_step, variant, **shared),
        promote=part(_promote, variant, rounded_main=rounded_main, **shared),
    )


def run(a, b, accumulator: Accumulator, wide: bool) -> Tensor:
    """The sums as float64 [rows, columns]; a and b are `accumulation.Terms` of [rows, reduced] and [columns, reduced]."""
    kind = torch.float64 if wide else torch.float32
    rows, reduced = a.values.shape
    columns = b.values.shape[0]
    variant = Variant(
        WIDE=wide,
        EXACT=accumulator.fraction_bits is None,
        ROUNDING=_ROUNDINGS[accumulator.rounding],
        PROMOTE=0 if accumulator.promote_every is None else _PROMOTIONS[accumulator.promote],
        GROUP=accumulator.group > 1,
        NORMALIZE=accumulator.normalize_products,
    )
    panels = -(-columns // LANES)
    left = [a.values.to(kind).contiguous(), a.powers.to(kind).contiguous()]
    right = [_panels(b.values.to(kind), panels), _panels(b.powers.to(kind), panels)]
    blocks, scales = 0, []
    if a.scales is not None:
        blocks = a.scales.shape[1]
        scales = [a.scales.double().contiguous(), _panels(b.scales.double(), panels)]
    found = torch.empty((panels, rows, LANES), dtype=torch.float64)
    facts = Parameters(
        *(t.data_ptr() for t in (left[0], left[1], right[0], right[1])),
        *(t.data_ptr() for t in scales or (found, found)),
        found.data_ptr(),
        rows,
        reduced,
        blocks,
        accumulator.products,
        accumulator.group,
        accumulator.promote_every or reduced,
        2.0 ** (accumulator.fraction_bits or 0),
        *_limits(accumulator.output_format),
        *_limits(accumulator.main_format),
    )
    table = np.zeros(len(facts), dtype=np.int64)
    table[:_FIRST_NUMBER] = facts[:_FIRST_NUMBER]
    table[_FIRST_NUMBER:].view(np.float64)[:] = facts[_FIRST_NUMBER:]
    units = panels * -(-rows // ROWS)
    work = max(rows * columns * reduced, 2 * ELEMENTS_PER_THREAD) if units > 1 else 1
    run_table(_compiled(variant), table.ctypes.data, units, threads=min(units, threads_for(work)))
    return found.transpose(0, 1).reshape(rows, panels * LANES)[:, :columns]


def _panels(rows: Tensor, panels: int) -> Tensor:
    """[columns, n] as [panels, n, LANES], the last panel filled up with zeros."""
    columns, across = rows.shape
    return pad(rows, (0, 0, 0, panels * LANES - columns)).view(panels, LANES, across).transpose(1, 2).contiguous()


def _limits(fmt: FloatFormat) -> tuple[float, float, float]:
    return 2.0**-fmt.mantissa_bits, fmt.min_normal, fmt.max
