"""An oracle for block formats: exact fractions and search, block by block, sharing nothing with the kernels."""

import math
from fractions import Fraction

import numpy as np
import torch

from altgrad.quantization import BlockFormat, ScaleRule

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
