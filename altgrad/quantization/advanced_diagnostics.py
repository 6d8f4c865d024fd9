"""How weights and updates lie on a number grid: stiffness, alignment, ULP movement, gradient-stiffness correlation.

Pure functions of tensors on any device. Statistics come back as 0-d float64 tensors, so nothing waits for the device
until a caller reads one. A statistic over no elements is NaN: it was not measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altgrad.errors import DtypeError, FormatError, OptionError
from altgrad.formats.catalog import get_format
from altgrad.formats.rounding import Overflow
from altgrad.formats.scalar import FloatFormat
from altgrad.formats.scalar_rows import E0M7
from altgrad.jit.subnormals import unflushed
from altgrad.quantization.checks import FLOAT_DTYPES, check_scale
from altgrad.quantization.memory import detached, readable
from altgrad.quantization.ops import encode, quantize
from altgrad.quantization.powers import floor_log2, power_of_two


@unflushed
def compute_stiffness_field(weights: Tensor, mantissa_bits_or_format: int | FloatFormat | str) -> Tensor:
    """Stiffness S(w) = 2^(floor(log2|w|) - M): the spacing, at each weight, of a grid of M mantissa bits.

    An update smaller than about half of S(w) cannot move w on that grid. Uniform grids (E0M7: 1/128) have one
    spacing for every nonzero weight. The exponent range is not looked at; `grid_spacing` gives the spacing of the
    scaled format with its subnormals.

    Args:
        weights: any shape, float32, float64, bfloat16 or float16.
        mantissa_bits_or_format: M, where 7 means E0M7 as it always has in this measure; or a format (BF16, which also
            has 7 bits, is then BF16).

    Returns:
        Tensor of the weights' shape; float64 for float64, else float32. Exact, also at and next to powers of two.
        NaN for zero, inf and NaN weights. A stiffness below the dtype's smallest subnormal is 0.

    Raises:
        OptionError: a negative number of bits. DtypeError: weights that are not floating. FormatError: an unknown
            format, or one without a grid of its own.
    """
    w = _floating(weights)
    if isinstance(mantissa_bits_or_format, int) and not isinstance(mantissa_bits_or_format, bool):
        mantissa_bits = mantissa_bits_or_format
        if mantissa_bits < 0:
            raise OptionError(f"{mantissa_bits} mantissa bits; stiffness needs 0 or more")
        uniform = mantissa_bits == E0M7.mantissa_bits
    else:
        fmt = _scalar(mantissa_bits_or_format)  # type: ignore[arg-type]  # which refuses a bool
        mantissa_bits, uniform = fmt.mantissa_bits, fmt.bias is None
    exponent = torch.zeros_like(w, dtype=torch.int64) if uniform else floor_log2(w)
    stiffness = _any_power_of_two(exponent - mantissa_bits)
    stiffness = torch.where((w == 0) | ~torch.isfinite(w), torch.nan, stiffness)
    return stiffness.to(torch.float64 if w.dtype == torch.float64 else torch.float32)


@unflushed
def grid_spacing(weights: Tensor, format: FloatFormat | str, scale: Tensor | float = 1.0) -> Tensor:
    """Exact spacing of the scaled format's grid at each weight: scale * 2^(max(floor(log2|w/scale|), emin) - M).

    This is the distance that a weight has to travel to the next code, subnormals and scale included. Defined at 0 (the
    smallest step); NaN for inf and NaN weights. Shape, dtype and errors as for `compute_stiffness_field`.
    """
    w = _floating(weights)
    fmt = _scalar(format)
    work = w if w.dtype == torch.float64 else w.float()
    scale = check_scale(w, scale, w.dtype)
    y = work / scale
    exponent = torch.where(y == 0, fmt.emin, floor_log2(y)).clamp(min=fmt.emin)
    if fmt.bias is None:
        exponent = torch.full_like(exponent, fmt.emin)
    step = _any_power_of_two(exponent - fmt.mantissa_bits)
    if fmt.bias is not None and not fmt.has_subnormals:
        step = torch.where(y.abs() < fmt.min_normal, fmt.min_normal, step)
    return torch.where(torch.isfinite(w), (step * scale), torch.nan).to(work.dtype)


@unflushed
def grid_alignment_error(
    weights: Tensor, format: FloatFormat | str, scale: Tensor | float, *, overflow: Overflow | str = Overflow.NATIVE
) -> Tensor:
    """|w - quantize(w)|: how far each weight is from the grid value that it rounds to (nearest, ties to even).

    Args:
        weights: any shape.
        format: a scalar format.
        scale: multiplier of the grid, as for `quantize`.
        overflow: policy beyond the format's range; `native` turns an overflow to inf (E5M2) into an error of inf,
            `saturate` measures the distance to the largest value.

    Returns:
        Tensor of the weights' shape and dtype. NaN for NaN weights and for infinite weights that stay infinite.
    """
    w = _floating(weights)
    return (w - quantize(w, format, scale, overflow=overflow)).abs()


@unflushed
def grid_alignment_statistics(
    weights: Tensor, format: FloatFormat | str, scale: Tensor | float, *, overflow: Overflow | str = Overflow.NATIVE
) -> dict[str, Tensor]:
    """Mean, largest and standard deviation (of the population) of the alignment error, and the fraction on the grid.

    Returns:
        `grid_error_mean`, `grid_error_max`, `grid_error_std`, `on_grid_frac` over the weights whose error is a number;
        NaN for all where there is none.
    """
    error = grid_alignment_error(weights, format, scale, overflow=overflow).double().flatten()
    valid = ~torch.isnan(error)
    mean = _mean(error, valid)
    return {
        "grid_error_mean": mean,
        "grid_error_max": _max(error, valid),
        "grid_error_std": _mean((error - mean) ** 2, valid).sqrt(),
        "on_grid_frac": _mean((error == 0).double(), valid),
    }


@unflushed
def grid_index(x: Tensor, format: FloatFormat | str, scale: Tensor | float = 1.0) -> Tensor:
    """Ordered code index (int64) of each element's nearest grid value: sign * magnitude code, 0 for both zeros.

    Overflow saturates. NaN elements have no index; they give 0 and are the caller's to mask.
    """
    fmt = _scalar(format)
    x = _floating(x, "x")
    finite = torch.where(torch.isnan(x), 0.0, x)
    magnitude: Any = encode(finite.abs(), fmt, scale, overflow=Overflow.SATURATE)
    return magnitude.to(torch.int64) * torch.sign(finite).to(torch.int64)


@unflushed
def compute_ulp_distance(
    before: Tensor, after: Tensor, format: FloatFormat | str | None = None, scale: Tensor | float = 1.0
) -> Tensor:
    """How far each weight moved, in units in the last place.

    Without a format: |after - before| / (nextafter(|before|, inf) - |before|), in ULPs of the tensors' own dtype. A
    move down from a power of two takes half-size steps, so one code down is 0.5. With a format:
    |index(after) - index(before)|, steps along the format's ordered codes under `scale`; only this says whether a
    weight moved on its grid. Crossing zero takes no extra step, as +0 and -0 share an index.

    Args:
        before, after: tensors of one shape and dtype.
        format: the grid to count on; values between grid points count from where they round to (nearest, saturating).
        scale: multiplier of the grid, the same for before and after.

    Returns:
        float64 tensor of that shape, non-negative; NaN where `before` or `after` is inf or NaN.

    Raises:
        OptionError: shapes or dtypes differ. DtypeError: they are not floating.
    """
    before, after = _floating(before, "before"), _floating(after, "after")
    if before.shape != after.shape or before.dtype != after.dtype:
        raise OptionError(
            f"before is {before.dtype} {list(before.shape)}, after {after.dtype} {list(after.shape)}; "
            "pass the same weights at two times"
        )
    finite = torch.isfinite(before) & torch.isfinite(after)
    if format is not None:
        distance = (grid_index(after, format, scale) - grid_index(before, format, scale)).abs().double()
        return torch.where(finite, distance, torch.nan)
    magnitude = before.abs()
    above = torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf))
    largest = torch.isinf(above)  # the dtype's largest value: its ulp is the spacing below it
    below = torch.nextafter(magnitude, torch.zeros_like(magnitude))
    ulp = torch.where(largest, magnitude.double() - below.double(), above.double() - magnitude.double())
    return torch.where(finite, (after.double() - before.double()).abs() / ulp, torch.nan)


@unflushed
def ulp_statistics(
    before: Tensor, after: Tensor, format: FloatFormat | str | None = None, scale: Tensor | float = 1.0
) -> dict[str, Tensor]:
    """Mean, median (the lower one), largest ULP distance, and the fraction of weights that did not move.

    Returns:
        `ulp_mean`, `ulp_median`, `ulp_max`, `ulp_zero_frac` over finite weights; NaN for all where there is none.
        Arguments as for `compute_ulp_distance`.
    """
    distance = compute_ulp_distance(before, after, format, scale).flatten()
    valid = ~torch.isnan(distance)
    median = torch.nanmedian(distance) if distance.numel() else distance.new_full((), torch.nan)
    return {
        "ulp_mean": _mean(distance, valid),
        "ulp_median": median,
        "ulp_max": _max(distance, valid),
        "ulp_zero_frac": _mean((distance == 0).double(), valid),
    }


@unflushed
def gradient_stiffness_correlation(
    weights: Tensor, gradients: Tensor, mantissa_bits_or_format: int | FloatFormat | str
) -> dict[str, Tensor]:
    """Do large gradients sit where the grid is coarse? Over nonzero weights, with S the stiffness field:

    Args:
        weights, gradients: tensors of one shape.
        mantissa_bits_or_format: as for `compute_stiffness_field`.

    Returns:
        `grad_stiff_correlation`: Pearson correlation of |g| and S, in [-1, 1]; NaN (undefined) where either is constant
        (always so on a uniform grid) or fewer than two pairs are left.
        `grad_stiff_ratio_mean`: mean of |g| / S. `grad_below_stiffness_frac`: fraction with |g| < S.
        Zero and non-finite weights and non-finite gradients are left out; NaN where no pair is left.

    Raises:
        OptionError: the shapes differ.
    """
    if weights.shape != gradients.shape:
        raise OptionError(f"weights are {list(weights.shape)}, gradients {list(gradients.shape)}; pass one shape")
    stiffness = compute_stiffness_field(weights, mantissa_bits_or_format).double().flatten()
    gradient = gradients.detach().double().abs().flatten()
    valid = torch.isfinite(stiffness) & (stiffness > 0) & torch.isfinite(gradient)
    g = torch.where(valid, gradient, 0.0)
    s = torch.where(valid, stiffness, 1.0)
    g_offset = torch.where(valid, g - _mean(g, valid), 0.0)
    s_offset = torch.where(valid, s - _mean(s, valid), 0.0)
    spread = ((g_offset**2).sum() * (s_offset**2).sum()).sqrt()
    varies = (_max(g, valid) > -_max(-g, valid)) & (_max(s, valid) > -_max(-s, valid))
    pearson = ((g_offset * s_offset).sum() / spread).clamp(-1.0, 1.0)
    return {
        "grad_stiff_correlation": torch.where(varies & (spread > 0), pearson, torch.nan),
        "grad_stiff_ratio_mean": _mean(g / s, valid),
        "grad_below_stiffness_frac": _mean((g < s).double(), valid),
    }


def _floating(x: Tensor, name: str = "weights") -> Tensor:
    """The tensor, detached, with its values in memory.

    Raises:
        DtypeError: no dense tensor of float32, float64, bfloat16 or float16.
    """
    if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES:
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise DtypeError(f"{name} is {what}, not a tensor of float32, float64, bfloat16 or float16; cast it first")
    x = readable(x, name)
    return detached(x)


def _any_power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, subnormal numbers too; 0 below 2^-1074."""
    small = exponent < -1022  # subnormal: take 2^(exponent + 200), then scale it down
    normal = power_of_two(torch.where(small, exponent + 200, exponent).clamp(min=-1022))
    return torch.where(small, normal * 2.0**-200, normal)


def _scalar(format: FloatFormat | str) -> FloatFormat:
    fmt = get_format(format)
    if not isinstance(fmt, FloatFormat) or not fmt.has_zero:
        raise FormatError(
            f"{fmt} has no grid of its own (block or scale format); name its element format, such as E2M1"
        )
    return fmt


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, x, 0.0).sum() / valid.sum()


def _max(x: Tensor, valid: Tensor) -> Tensor:
    if not x.numel():
        return x.new_full((), torch.nan)
    largest = torch.where(valid, x, -torch.inf).amax()
    return torch.where(valid.any(), largest, torch.nan)
