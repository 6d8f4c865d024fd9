"""Rounding to a grid in plain torch operations, for any device: readable, exact, not fast.

All steps run in float64, where every quantity of a float32 carrier is exact; only the division by the scale and the
multiplication by it are done in the tensor's own compute dtype, as the definition says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat, Specials
from altgrad.jit.grid_table import INF_PROBLEM, NAN_PROBLEM
from altgrad.jit.subnormals import unflushed
from altgrad.quantization.codec import code_dtype, value_tensor
from altgrad.quantization.plan import Plan
from altgrad.quantization.powers import power_of_two
from altgrad.quantization.quantized import Quantized
from altgrad.quantization.stats import measure
from altgrad.randomness import random_bits as draw_bits

_NEAREST = (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that x / scale and scale * q are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_payload(
    x: Tensor,
    fmt: FloatFormat,
    scale: Tensor | float,
    rounding: Rounding,
    overflow: Overflow,
    key: tuple[int, int] | Tensor | None = None,
    random_bits: int = 24,
    clamp: bool = False,
) -> tuple[Tensor, Tensor]:
    """x / scale rounded to the grid of `fmt`, as float64 of x's shape, and the mask of overflowed elements."""
    work = x.to(compute_dtype(x.dtype))
    divisor = torch.as_tensor(scale, dtype=work.dtype, device=x.device)  # CUDA multiplies by a number's reciprocal
    y = (work / divisor).double()
    finite_input = torch.isfinite(work)
    if clamp:
        y = torch.where(finite_input, y.clamp(-fmt.max, fmt.max), y)
    magnitude = y.abs()
    bounded = torch.where(torch.isfinite(y), magnitude, 0.0)

    exponent = torch.frexp(bounded)[1].to(torch.int64) - 1
    exponent = torch.where(bounded == 0, fmt.emin, exponent)
    digits = torch.full_like(exponent, fmt.mantissa_bits)
    if not fmt.has_subnormals:
        digits = torch.where(exponent < fmt.emin, 0, digits)
    shift = digits - exponent.clamp(min=fmt.emin)
    steps = bounded * power_of_two(shift)
    whole = steps.floor()
    rest = steps - whole
    odd = torch.remainder(whole, 2) == 1
    negative = torch.signbit(y)

    if rounding is Rounding.NEAREST_EVEN:
        away = (rest > 0.5) | ((rest == 0.5) & odd)
    elif rounding is Rounding.NEAREST_AWAY:
        away = rest >= 0.5
    elif rounding is Rounding.TOWARD_ZERO:
        away = torch.zeros_like(odd)
    elif rounding is Rounding.UP:
        away = (rest > 0) & ~negative
    elif rounding is Rounding.DOWN:
        away = (rest > 0) & negative
    elif rounding is Rounding.ODD:
        away = (rest > 0) & ~odd
    else:
        assert key is not None
        words = key if isinstance(key, Tensor) else torch.tensor(key, dtype=torch.int64, device="cpu")
        drawn = draw_bits(words, x.numel(), random_bits).view(x.shape).to(x.device)
        away = (rest * 2.0**random_bits).floor().to(torch.int64) + drawn >= 2**random_bits
    result = (whole + away) * power_of_two(-shift)

    over = finite_input & ((result > fmt.max) | torch.isinf(y))
    infinite = torch.isinf(work)
    if overflow in (Overflow.SATURATE, Overflow.NAN):
        over = over | infinite
    beyond = overflow_value(fmt, rounding, overflow, negative)
    result = torch.where(over, beyond, torch.where(infinite, magnitude, result))
    result = torch.where(torch.isnan(y), y, torch.where(negative, -result, result))
    if not fmt.has_negative_zero:
        result = torch.where(result == 0, 0.0, result)
    return result, over


def overflow_value(fmt: FloatFormat, rounding: Rounding, overflow: Overflow, negative: Tensor) -> Tensor:
    """Magnitude that an overflowing element gets, float64 of the shape of `negative`."""
    saturates = overflow in (Overflow.SATURATE, Overflow.SATURATE_FINITE)
    if saturates or (overflow is Overflow.NATIVE and not fmt.has_inf):
        to_inf = torch.zeros_like(negative)
    elif overflow is Overflow.NAN:
        return torch.full_like(negative, torch.nan, dtype=torch.float64)
    elif overflow is Overflow.INF or rounding in (*_NEAREST, Rounding.STOCHASTIC):
        to_inf = torch.ones_like(negative)
    elif rounding is Rounding.UP:
        to_inf = ~negative
    elif rounding is Rounding.DOWN:
        to_inf = negative
    else:
        to_inf = torch.zeros_like(negative)
    largest = torch.full(negative.shape, fmt.max, dtype=torch.float64, device=negative.device)
    return torch.where(to_inf, torch.inf, largest)


@unflushed
def run(
    plan: Plan, x: Tensor, scale: Tensor | float, key: tuple[int, int] | Tensor | None, out: Tensor | None
) -> Quantized:
    """One pass: values, codes and statistics, as the plan wants them."""
    x = x.detach()
    payload, over = round_payload(x, plan.grid, scale, plan.rounding, plan.overflow, key, plan.random_bits, plan.clamp)
    value = (payload.to(plan.compute_dtype) * scale).to(x.dtype)
    stats = measure(x, value, over) if plan.stats else None
    coded, problems = None, 0
    if plan.codes:
        found = payload_codes(payload, plan.grid)
        missing = found < 0
        problems = (missing & torch.isnan(payload)).any() * NAN_PROBLEM + (
            missing & torch.isinf(payload)
        ).any() * INF_PROBLEM
        coded = torch.where(missing, 0, found).to(code_dtype(plan.grid))
    if out is not None:
        value = out.copy_(value)
    return Quantized(value if plan.values else None, coded, None, stats, None, problems)


@unflushed
def decode(plan: Plan, codes: Tensor, scale: Tensor | float, upper: None, out: Tensor | None) -> Tensor:
    """scale * value(code), by a table of values."""
    table = value_tensor(plan.format, plan.compute_dtype, codes.device)
    result = (table[codes.to(torch.int64)] * scale).to(plan.dtype)
    return result if out is None else out.copy_(result)


def payload_codes(payload: Tensor, fmt: FloatFormat) -> Tensor:
    """Codes (int64) of float64 grid values; inf and NaN get their codes, -1 where the format has none."""
    magnitude = payload.abs()
    finite = torch.where(torch.isfinite(magnitude), magnitude, 0.0)
    exponent = torch.where(finite == 0, fmt.emin, torch.frexp(finite)[1].to(torch.int64) - 1)
    significand = (finite * power_of_two(fmt.mantissa_bits - exponent.clamp(min=fmt.emin))).to(torch.int64)
    binade = exponent - fmt.emin
    code = significand if fmt.bias is None else significand + (binade.clamp(min=0) << fmt.mantissa_bits)
    if not fmt.has_zero:
        code = code - 2**fmt.mantissa_bits
    all_ones = 2**fmt.magnitude_bits - 1
    sign_bit = 2**fmt.magnitude_bits if fmt.signed else 0
    inf_code = {Specials.IEEE: all_ones >> fmt.mantissa_bits << fmt.mantissa_bits, Specials.P3109: all_ones}
    code = torch.where(torch.isinf(payload), inf_code.get(fmt.specials, -1), code)
    if fmt.twos_complement:
        code = torch.where(torch.signbit(payload) & (code >= 0), (-code) & (2 * sign_bit - 1), code)
    elif fmt.signed:
        signed = torch.signbit(payload) & (code >= 0)
        if not fmt.has_negative_zero:
            signed = signed & (code > 0)
        code = torch.where(signed, code + sign_bit, code)
    return torch.where(torch.isnan(payload), nan_code(fmt), code)


def nan_code(fmt: FloatFormat) -> int:
    """The canonical (quiet, positive) NaN code, or -1 where the format has none."""
    all_ones = 2**fmt.magnitude_bits - 1
    if fmt.specials is Specials.IEEE:
        half = 2 ** (fmt.mantissa_bits - 1) if fmt.mantissa_bits else 0
        return (all_ones >> fmt.mantissa_bits << fmt.mantissa_bits) + half if fmt.mantissa_bits else -1
    if fmt.specials is Specials.NAN_ONLY:
        return all_ones
    if fmt.specials in (Specials.FNUZ, Specials.P3109):
        return all_ones + 1
    return -1
