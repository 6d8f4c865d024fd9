"""Geometry of a number grid, element by element: spacing, code positions, and values at positions, as tensor functions.

A weight w on the grid `scale * format` has an ordered code index (`FloatFormat.index_of`): ..., -1, 0, 1, ... The code
position extends the index to every real w by interpolating between neighbours, so dw / d(position) is the spacing S(w).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from altgrad.errors import FormatError
from altgrad.quantization import Cast, FloatFormat, Overflow, get_format
from altgrad.quantization.parameter_grid import ParameterGrid
from altgrad.quantization.powers import power_of_two

# integer view, position of the exponent field, mask of the exponent field, bias, least exponent of a normal number
_LAYOUT = {
    torch.float32: (torch.int32, 23, 0x7F800000, 127, -126),
    torch.float64: (torch.int64, 52, 0x7FF0000000000000, 1023, -1022),
}


def scalar_format(name: FloatFormat | str) -> FloatFormat:
    """The scalar format of that name.

    Raises:
        FormatError: unknown, a block format, or a format without zero or sign.
    """
    fmt = get_format(name)
    if not isinstance(fmt, FloatFormat) or not fmt.has_zero or not fmt.signed:
        raise FormatError(f"optimizers step along signed scalar formats such as E4M3, not along {fmt}")
    return fmt


@cache
def landing_cast(fmt: FloatFormat, rounding: str, random_bits: int) -> Cast:
    """How an attempted weight is rounded to its grid: what lies beyond max becomes max, a NaN or inf stays."""
    return Cast(fmt, rounding, Overflow.SATURATE_FINITE, random_bits=random_bits)  # type: ignore[arg-type]


def _smallest_gap(fmt: FloatFormat) -> float:
    """Spacing at 0: the least positive value."""
    return fmt.min_subnormal


def _binade(y: Tensor, fmt: FloatFormat) -> Tensor:
    """2^max(floor(log2 y), emin) for y >= 0, exactly, in y's dtype (float32 needs emin >= -126)."""
    view, shift, mask, bias, _ = _LAYOUT[y.dtype]
    least = (fmt.emin + bias) << shift
    return (y.contiguous().view(view) & mask).clamp(min=least).view(y.dtype)


def _work(w: Tensor, fmt: FloatFormat) -> Tensor:
    """w in a dtype whose exponent field can be read for this format: its own, or float64."""
    if w.dtype in _LAYOUT and fmt.emin >= _LAYOUT[w.dtype][4]:
        return w
    return w.to(torch.float64)


def spacing(w: Tensor, grid: ParameterGrid) -> Tensor:
    """S(w) = scale * 2^(max(floor(log2|w/scale|), emin) - M): distance between grid neighbours where w lies.

    It saturates at the smallest step of the format, so a weight can cross zero; at a power of two it is the spacing
    above. Uniform formats (E0M7) have one spacing. Formats without subnormals have one gap from 0 to `min_normal`.

    Args:
        w: tensor of any shape, float32 or float64 (others are computed in float64).

    Returns:
        Tensor of w's shape and dtype. inf and NaN give inf.
    """
    fmt, scale = grid.format, grid.scale
    if fmt.bias is None:
        step = torch.as_tensor(scale, dtype=w.dtype, device=w.device) * 2.0**-fmt.mantissa_bits
        return step.expand(w.shape)
    work = _work(w, fmt)
    y = (work / scale).abs_()
    step = _binade(y, fmt) * 2.0**-fmt.mantissa_bits
    if not fmt.has_subnormals and fmt.mantissa_bits:
        step = torch.where(y < fmt.min_normal, fmt.min_normal, step)
    return (step * scale).to(w.dtype)


def position(w: Tensor, grid: ParameterGrid) -> Tensor:
    """Code position of each weight, float64: the ordered code index on the grid, interpolated linearly between.

    Beyond max the positions continue as if the exponent were unbounded.
    """
    fmt = grid.format
    y = w.double() / grid.scale
    magnitude = y.abs()
    if fmt.bias is None:
        return y * 2.0**fmt.mantissa_bits
    binade = _binade(magnitude, fmt)
    exponent = torch.frexp(binade)[1].double() - 1
    steps = magnitude / binade * 2.0**fmt.mantissa_bits  # in [2^M, 2^(M+1)) for normal numbers, below for subnormal
    index = (exponent - fmt.emin) * 2.0**fmt.mantissa_bits + steps
    if not fmt.has_subnormals:
        index = torch.where(magnitude < fmt.min_normal, magnitude / fmt.min_normal * 2.0**fmt.mantissa_bits, index)
    return torch.copysign(index, y)


def value_at(index: Tensor, grid: ParameterGrid) -> Tensor:
    """Value of each integer code index, float64; indices beyond the finite range are clamped to it.

    In a format without subnormals the codes between 0 and `min_normal` all mean zero, as its codec reads them.
    """
    fmt = grid.format
    magnitude = index.double().abs().clamp(max=float(fmt.index_of(fmt.max)))
    if fmt.bias is None:
        value = magnitude * 2.0**-fmt.mantissa_bits
    else:
        per_binade = 2.0**fmt.mantissa_bits
        above = torch.floor(magnitude / per_binade) - 1  # binades above the lowest normal one
        significand = magnitude - above * per_binade
        normal = significand * power_of_two(above + (fmt.emin - fmt.mantissa_bits))
        below = magnitude * _smallest_gap(fmt) if fmt.has_subnormals else torch.zeros_like(magnitude)
        value = torch.where(magnitude >= per_binade, normal, below)
    return torch.copysign(value, index.double()) * grid.scale


def scale_as_rows(scale: Tensor | float, w: Tensor) -> tuple[Tensor, int] | None:
    """(scales as a flat float32 tensor, elements of w per scale), or None where a scale's elements are not contiguous."""
    scales = torch.as_tensor(scale).detach().to(torch.float32)
    if scales.numel() == 1:
        return scales.reshape(1), max(w.numel(), 1)
    shape = (1,) * (w.ndim - scales.ndim) + tuple(scales.shape)
    lead = max(d for d in range(w.ndim) if shape[d] != 1) + 1
    if shape[:lead] != tuple(w.shape[:lead]):
        return None
    return scales.reshape(-1).contiguous(), math.prod(w.shape[lead:])
