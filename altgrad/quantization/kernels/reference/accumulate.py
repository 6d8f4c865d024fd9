"""The oracle of accumulators: one sum at a time on Python's integers, to judge the kernels by.

A number is an integer n and an exponent q, n * 2^q. A term is cut by shifting n, a sum is a sum of integers, and it is
rounded by dividing integers: no float is added, multiplied or scaled.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from altgrad.formats.accumulator import Accumulator, Promote
from altgrad.formats.rounding import Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.formats.scalar_rows import FP32


def _integer(x: float) -> tuple[int, int]:
    """(n, q) with x = n * 2^q."""
    n, divisor = x.as_integer_ratio()
    return n, 1 - divisor.bit_length()


def _exponent(x: float, grid: FloatFormat) -> int:
    """floor(log2 |x|), not below the format's smallest normal exponent."""
    n, q = _integer(x)
    return max(abs(n).bit_length() - 1 + q, grid.emin)


def _shifted(n: int, by: int) -> int:
    """n * 2^by without what falls below 1, toward zero."""
    size = abs(n) << by if by >= 0 else abs(n) >> -by
    return -size if n < 0 else size


def _rounded(n: int, q: int, fmt: FloatFormat, mode: Rounding) -> float:
    """n * 2^q in a sum's format."""
    if n == 0:
        return 0.0
    ulp = max(abs(n).bit_length() - 1 + q, fmt.emin) - fmt.mantissa_bits
    if q >= ulp:
        value = Fraction(abs(n)) * Fraction(2) ** q
    else:
        steps, rest = divmod(abs(n), 1 << (ulp - q))
        twice = 2 * rest - (1 << (ulp - q))
        up = {
            Rounding.TOWARD_ZERO: False,
            Rounding.NEAREST_EVEN: twice > 0 or (twice == 0 and steps % 2 == 1),
            Rounding.NEAREST_AWAY: twice >= 0,
        }[mode]
        value = Fraction(steps + up) * Fraction(2) ** ulp
    size = float(value) if value <= Fraction(fmt.max) else math.inf
    return -size if n < 0 else size


def _step(pairs: list[tuple[int, int, int]], c: float, accumulator: Accumulator) -> float:
    """One step: terms (n, q, exponent) and the running sum."""
    fmt = accumulator.output_format
    if not math.isfinite(c):
        return c
    if c:
        pairs = [*pairs, (*_integer(c), _exponent(c, fmt))]
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        return 0.0
    if accumulator.fraction_bits is None:
        low = min(q for _, q, _ in pairs)
    else:
        low = max(exponent for _, _, exponent in pairs) - accumulator.fraction_bits
    return _rounded(sum(_shifted(n, q - low) for n, q, _ in pairs), low, fmt, accumulator.rounding)


def _nearest(x: Fraction, fmt: FloatFormat) -> float:
    return _rounded(x.numerator, 1 - x.denominator.bit_length(), fmt, Rounding.NEAREST_EVEN)


def _promoted(main: float, partial: float, sa: float, sb: float, accumulator: Accumulator) -> float:
    """main + partial, scaled where the accumulator says so, rounded once to the main sum's format."""
    if not all(map(math.isfinite, (main, partial, sa, sb))):
        return main + partial * sa * sb
    total = Fraction(partial)
    if accumulator.promote is Promote.FMA_SCALED:
        total *= Fraction(_nearest(Fraction(sa) * Fraction(sb), FP32))
    elif accumulator.promote is Promote.SCALED_FMA:
        total = Fraction(_nearest(total * Fraction(sa), FP32)) * Fraction(sb)
    return _nearest(total + Fraction(main), accumulator.main_format)


def _sum(a: list[float], b: list[float], ea: list[int], eb: list[int], sa, sb, accumulator: Accumulator) -> float:
    """One element of the product; ea, eb are exponents of elements, or of groups with scales sa, sb."""
    if not all(map(math.isfinite, (*a, *b))):
        return sum(x * y for x, y in zip(a, b))
    running, main, count = 0.0, 0.0, len(a)
    every, group = accumulator.promote_every, accumulator.group
    for begin in range(0, count, accumulator.products):
        end = min(begin + accumulator.products, count)
        pairs = []
        for first in range(begin, end, group):
            total = sum((Fraction(a[k]) * Fraction(b[k]) for k in range(first, first + group)), Fraction(0))
            at = first // group
            if group > 1:
                total *= Fraction(sa[at]) * Fraction(sb[at])
            exponent = ea[at] + eb[at]
            if accumulator.normalize_products and total:
                exponent = math.floor(math.log2(abs(total)))
            pairs.append((total.numerator, 1 - total.denominator.bit_length(), exponent))
        running = _step(pairs, running, accumulator)
        if every and (end % every == 0 or end == count):
            scales = (sa[(end - 1) // every], sb[(end - 1) // every]) if accumulator.scaled_promotion else (1.0, 1.0)
            running, main = 0.0, _promoted(main, running, *scales, accumulator)
    return main if every else running


def run(a, b, accumulator: Accumulator, wide: bool) -> Tensor:
    """As `kernels.cpu.accumulate.run`, bit for bit but for the sign of a NaN."""

    def rows(operand):
        exponents = [[round(math.log2(p)) if p else 0 for p in row] for row in operand.powers.tolist()]
        scales = operand.scales.tolist() if operand.scales is not None else [None] * len(exponents)
        return list(zip(operand.values.tolist(), exponents, scales))

    found = [[_sum(x, y, ex, ey, sx, sy, accumulator) for y, ey, sy in rows(b)] for x, ex, sx in rows(a)]
    return torch.tensor(found, dtype=torch.float64)
