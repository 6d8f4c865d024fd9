"""What the numeric tests share: inputs, comparisons bit by bit, and an oracle for block formats that shares nothing
with the kernels."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch

from altgrad.formats.rounding import Rounding
from altgrad.quantization import FORMAT_REGISTRY, BlockFormat, FloatFormat, ScaleRule

ELEMENT_FORMATS = [fmt for fmt in FORMAT_REGISTRY.values() if fmt.has_zero]
LISTED_FORMATS = [fmt for fmt in ELEMENT_FORMATS if fmt.bits <= 19]
EIGHT_BIT_FORMATS = [fmt for fmt in ELEMENT_FORMATS if fmt.bits <= 8]
DETERMINISTIC = [mode for mode in Rounding if mode is not Rounding.STOCHASTIC]
SPECIALS = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38]
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a floating tensor, every NaN made the same."""
    canonical = torch.where(torch.isnan(x), torch.full_like(x, torch.nan), x)
    return canonical.contiguous().view(_INTEGERS[x.element_size()])


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor | None = None) -> None:
    """Equality of every bit, NaN payloads apart; a failure shows the first element that differs."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    wrong = (bits(found) != bits(expected)).flatten().nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        given = "" if x is None else f" from {x.flatten()[i].item()!r}"
        raise AssertionError(
            f"{len(wrong)} of {found.numel()} differ; element {i}{given}: "
            f"{found.flatten()[i].item()!r} instead of {expected.flatten()[i].item()!r}"
        )


def random_patterns(count: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Floats of uniformly random bit patterns: all magnitudes, subnormals, inf and NaN."""
    words = np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)
    integers = {torch.float32: np.uint32, torch.float64: np.uint64}.get(dtype, np.uint16)
    signed = {np.uint32: np.int32, np.uint64: np.int64, np.uint16: np.int16}[integers]
    return torch.from_numpy(words.astype(integers).view(signed)).view(dtype)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def critical_points(fmt: FloatFormat) -> torch.Tensor:
    """Every value and every midpoint of neighbours, the overflow threshold's too, each with its float32 neighbours."""
    values = fmt.values()
    top = values[-1] + fmt.ulp(values[-1])
    ladder = np.concatenate([[-top], values, [top, 2 * top]])
    with np.errstate(over="ignore"):
        points = np.concatenate([ladder, (ladder[1:] + ladder[:-1]) / 2]).astype(np.float32)
        around = [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    return torch.from_numpy(np.concatenate([*around, np.array(SPECIALS, np.float32)]))


def dense_around(fmt: FloatFormat, count: int, seed: int) -> torch.Tensor:
    """Random float32 values whose magnitudes lie in and around the format's range."""
    generator = np.random.default_rng(seed)
    exponents = generator.uniform(np.log2(fmt.min_subnormal) - 3, np.log2(fmt.max) + 2, count)
    with np.errstate(over="ignore", under="ignore"):
        x = np.exp2(exponents) * generator.choice([-1.0, 1.0], count)
        return torch.from_numpy(x.astype(np.float32))


FLOOR, CEIL, NEAREST, EVEN = ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.NEAREST, ScaleRule.EVEN


def floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def power_of_two_exponent(amax: float, fmt: BlockFormat) -> int:
    """The exponent of an E8M0 scale, by the rule's definition in words."""
    if amax == 0:
        return -127
    value, largest = Fraction(amax), Fraction(fmt.element.max)
    emax = floor_log2(largest)
    exponent = floor_log2(value)
    if fmt.rule is FLOOR:
        shared = exponent - emax
    elif fmt.rule is CEIL:
        shared = exponent - emax - 2
        while value > largest * Fraction(2) ** shared:
            shared += 1
    elif fmt.rule is NEAREST:
        below, above = Fraction(2) ** exponent, Fraction(2) ** (exponent + 1)
        shared = (exponent if value - below < above - value else exponent + 1) - emax
    else:
        step = Fraction(fmt.element.ulp(fmt.element.max)) * Fraction(2) ** (exponent - emax)
        shared = floor_log2(math.floor(value / step + Fraction(1, 2)) * step) - emax
    return max(-127, min(127, shared))


def nearest(value: float, grid: np.ndarray) -> float:
    """The nearest entry of an ascending grid of non-negative values in code order; ties go to the even code."""
    place = int(np.searchsorted(grid, value))
    if place == 0 or place == len(grid):
        return float(grid[min(place, len(grid) - 1)])
    low, high = Fraction(float(grid[place - 1])), Fraction(float(grid[place]))
    below, above = Fraction(value) - low, high - Fraction(value)
    return float(low if below < above or (below == above and place % 2 == 1) else high)


def block_scale(amax: float, fmt: BlockFormat, tensor_scale: float | None) -> np.float32:
    """The multiplier of a block of that amax."""
    if fmt.power_of_two:
        return np.float32(math.ldexp(1.0, power_of_two_exponent(amax, fmt)))
    largest = np.float32(fmt.element.max)
    if fmt.has_float_scale:
        return max(np.float32(amax if amax > 0 else 1.0) / largest, np.float32(2.0**-126))
    ideal = np.float32(amax) / largest
    if tensor_scale is not None:
        ideal = ideal / np.float32(tensor_scale)
    stored = nearest(float(ideal), fmt.scale_format.magnitudes()[1:])
    # without zero the grid starts at code 1: its places are odd codes where nearest() counts even ones
    if fmt.scale_format.magnitudes()[1] < ideal < fmt.scale_format.max:
        stored = nearest(float(ideal), fmt.scale_format.magnitudes())
    return np.float32(stored) * np.float32(1.0 if tensor_scale is None else tensor_scale)


def quantize_block(block: np.ndarray, fmt: BlockFormat, tensor_scale: float | None) -> tuple[np.ndarray, np.float32]:
    """(values, multiplier) of one block of finite float32 values, nearest even, saturating."""
    scale = block_scale(float(np.abs(block).max()), fmt, tensor_scale)
    grid = fmt.element.magnitudes()
    values = np.empty_like(block)
    for place, x in np.ndenumerate(block):
        quotient = np.float32(x) / scale
        magnitude = np.float32(nearest(abs(float(quotient)), grid)) * scale
        keeps_sign = magnitude > 0 or fmt.element.has_negative_zero
        values[place] = -magnitude if np.signbit(quotient) and keeps_sign else magnitude
    return values, scale


def quantize_last_axis(x: torch.Tensor, fmt: BlockFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, multipliers [rows, blocks]) of a 2-D float32 tensor of finite values in blocks along its last axis."""
    upper = None
    if fmt.tensor_scale:
        amax = np.float32(x.abs().max()) if x.abs().max() > 0 else np.float32(1)
        upper = float(amax / np.float32(fmt.element.max * fmt.scale_format.max))
    _, size = fmt.tile
    array = x.numpy()
    values, scales = np.empty_like(array), np.empty((len(array), array.shape[1] // size), np.float32)
    for row in range(len(array)):
        for block in range(array.shape[1] // size):
            part = slice(block * size, (block + 1) * size)
            values[row, part], scales[row, block] = quantize_block(array[row, part], fmt, upper)
    return torch.from_numpy(values), torch.from_numpy(scales)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, NaN equal to any NaN."""
    both_nan = a.isnan() & b.isnan()
    equal = (a == b) & (torch.signbit(a) == torch.signbit(b))
    return a.shape == b.shape and a.dtype == b.dtype and bool((equal | both_nan).all())


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """`same_bits` of tensors anywhere, integers as well; or both None."""
    if a is None or b is None:
        return a is b
    return same_bits(a.cpu(), b.cpu()) if a.dtype.is_floating_point else torch.equal(a.cpu(), b.cpu())
