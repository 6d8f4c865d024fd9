"""Operands and products of quantized layers on tensor cores: what a GPU multiplies, and how little it moves for that.

An operand goes from the tensor to payload * 2^p in bf16, or in float16 where its format has 9 to 11 significant bits, in
one pass (a second, before it, finds a current scale), and is kept like that for the backward; or, where the recipe says
`save_codes`, as codes that the same pass writes and the backward decodes. Sums are float32; what was pulled out of the
scales, the bias and the output's dtype follow in one more pass. Nothing waits for the device. NaN and inf travel inside
the operand.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.formats.block import BlockFormat
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import special_codes
from altgrad.nn.layer.gemm import Route, power_range
from altgrad.nn.layer.operand import Operand, Saved
from altgrad.nn.recipe.scaling_choice import CurrentScaling, DelayedScaling, NoScaling
from altgrad.quantization import Want
from altgrad.quantization import tensor_cores as kernels
from altgrad.quantization.checks import traced
from altgrad.quantization.products.units import NORMAL_EMIN, SIGNIFICANT_BITS

SMALLEST, LARGEST = -133, 127  # exponents of bf16, subnormals included
ALL_POWERS = (-126, LARGEST)
HALF_BITS, HALF_SMALLEST, HALF_LARGEST = 11, -24, 15  # of float16: significant bits, exponents, subnormals included


def powers_of(operand: Operand) -> tuple[int, int] | None:
    """Lowest and highest p for which a scalar operand's payload * 2^p are bf16 numbers; None where that is not so."""
    fmt = operand.fmt
    if not isinstance(fmt, FloatFormat) or fmt.significant_bits > SIGNIFICANT_BITS or not fmt.has_zero:
        return None
    low, high = power_range(fmt)
    if low <= high:
        return ALL_POWERS if has_power_of_two(operand) else (low, min(high, LARGEST))
    held = math.frexp(fmt.min_subnormal)[1] - 1 >= SMALLEST and fmt.emax <= LARGEST
    return (0, 0) if held and isinstance(operand.spec.scaling, NoScaling) else None


def powers_of_half(fmt: object) -> tuple[int, int] | None:
    """Lowest and highest p for which a format's values times 2^p are float16 numbers; None where none are, or bf16 holds them.

    (0, 0) for FP16 itself, whose subnormals and largest value are float16's.
    """
    if not isinstance(fmt, FloatFormat) or not SIGNIFICANT_BITS < fmt.significant_bits <= HALF_BITS or not fmt.has_zero:
        return None
    low, high = HALF_SMALLEST - (fmt.emin - fmt.mantissa_bits), HALF_LARGEST - fmt.emax
    return (low, high) if low <= high else None


def powers_of_blocks(fmt: BlockFormat) -> tuple[int, int] | None:
    """Lowest and highest p for which element * block's scale * 2^p are bf16 numbers; None where they are not.

    For scales that are short but no powers of two (NVFP4).
    """
    scale = fmt.scale_format
    if fmt.has_float_scale or fmt.element.significant_bits + scale.significant_bits > SIGNIFICANT_BITS:
        return None
    smallest = sum(math.frexp(one.min_subnormal)[1] - 1 for one in (fmt.element, scale))
    low, high = NORMAL_EMIN - smallest, LARGEST - fmt.element.emax - scale.emax - 1
    return (low, high) if low <= high and (fmt.tensor_scale or low <= 0 <= high) else None


def has_power_of_two(operand: Operand) -> bool:
    """Whether every scale of an operand is a power of two by its policy, so that nothing is left to multiply afterwards."""
    policy = operand.spec.scaling
    return isinstance(policy, CurrentScaling | DelayedScaling) and policy.power_of_two


def taken_as(operand: Operand, along_sums: bool) -> Route | None:
    """As what tensor cores multiply an operand, bf16 or float16 numbers; None where they do not.

    They take one scale, or one for each row or column that the product keeps (not `along_sums`); as bf16 also blocks whose
    scales are powers of two or short. Where scales are powers of two, values below 2^-126 are rounded to bf16's subnormals.
    """
    if operand.fmt is None:
        return None
    if operand.block:
        fmt = operand.fmt
        if not fmt.power_of_two:
            return None if powers_of_blocks(fmt) is None else Route.BF16
        held = fmt.element.significant_bits <= SIGNIFICANT_BITS and fmt.element.emin >= -126
        return Route.BF16 if held else None
    if along_sums:
        return None
    if powers_of(operand) is not None:
        return Route.BF16
    return None if powers_of_half(operand.fmt) is None else Route.FP16


def kept(operand: Operand, x: Tensor, scale: Tensor | float, key: Tensor | None) -> Saved | None:
    """What a gradient on tensor cores keeps of x where the forward, beside an operand that those do not take, has float32.

    None where codes are kept, or where no tensor core multiplies it.
    """
    if operand.saves_codes or operand.cores is None or x.dtype == torch.float64 or not kernels.serve(x):
        return None
    if not isinstance(scale, float | int) and scale.numel() > 1 and x.ndim != 2:
        return None
    return quantized(operand, x, scale, key, False, operand.cores).saved


class Found(NamedTuple):
    """What `quantized` made of x.

    saved: payload and factor; for an FP8 unit codes and factor. other: those codes in a second layout. codes: what the
    backward keeps in place of a payload.
    """

    saved: Saved
    scale: Tensor | float
    other: Tensor | None = None
    codes: Saved = ()


def quantized(
    operand: Operand,
    x: Tensor,
    scale: Tensor | float | None,
    key: Tensor | None,
    observed: bool,
    route: Route,
    inner: tuple[int, ...] = (-1,),
    keep: bool = False,
    multiplied: bool = True,
) -> Found:
    """x as an operand of tensor cores.

    Args:
        scale: None if it is x's own current one; under a format with a tensor scale that one, if it is known.
        inner: for an FP8 unit, which wants the axis that a product reduces innermost: that of each product that will take x.
        keep: whether the backward keeps x, as codes if the operand says so; then they alone are made unless `multiplied` now.
    """
    other, codes = None, ()
    assert operand.cast is not None
    x = x if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x.float()
    key = None if key is None else key.to(x.device)
    if operand.block:
        powers = (powers_of_blocks(operand.fmt) if operand.fmt.tensor_scale else None) or (0, 0)
        upper = scale if isinstance(scale, Tensor) else None
        found: Saved = ()
        if keep and not multiplied and is_compact(operand) and not traced(x):
            codes = kernels.block_codes(x, operand.cast, key, upper)
        else:
            values, factor = kernels.block_payload(x, operand.cast, powers, key, upper)
            found = (values,) if factor is None else (values, factor)
        scale = 1.0 if upper is None else upper
    else:
        if scale is None:
            policy = operand.spec.scaling
            assert isinstance(policy, CurrentScaling)
            scale = kernels.largest(x, operand.fmt.max, policy.power_of_two, operand.channel)
        if route is Route.FP8:
            values, *others = kernels.codes(x, operand.cast, scale, key, operand.collected(x), inner)
            other, factor = others[0] if others else None, scale
            if not isinstance(factor, Tensor):
                factor = None if scale == 1 else torch.full((), factor, dtype=torch.float32, device=x.device)
            found = (values,) if factor is None else (values, factor)
        else:
            half = route is Route.FP16
            powers = powers_of_half(operand.fmt) if half else powers_of(operand)
            assert powers is not None
            dtype, amax = torch.float16 if half else torch.bfloat16, operand.collected(x)
            if keep and saved_as_codes(operand, x, scale):
                values, factor, codes = kernels.payload_and_codes(
                    x, operand.cast, scale, powers, key, amax, values=multiplied
                )
            else:
                values, factor = kernels.payload(x, operand.cast, scale, powers, key, amax, dtype)
            known = factor is None or (has_power_of_two(operand) and not half)
            found = () if values is None else (values,) if known else (values, factor)
    if observed:
        operand.publish(operand.cast(x.float(), scale, key=key, want=Want.STATS).stats, scale)
    return Found(found, scale, other, codes)


def saved_as_codes(operand: Operand, x: Tensor, scale: Tensor | float) -> bool:
    """Whether a backward on tensor cores keeps the codes of x, scaled as a whole or, a matrix, line by line."""
    one = isinstance(scale, float | int) or scale.numel() == 1
    return is_compact(operand) and (one or x.ndim == 2)


def is_compact(operand: Operand) -> bool:
    """Whether a backward on tensor cores keeps an operand's codes: the recipe says so, and they are one byte each."""
    if not operand.compact or not operand.block:
        return operand.compact and operand.saves_codes
    fmt = operand.fmt
    has_nan = fmt.element.has_nan or special_codes(fmt.scale_format)[1] >= 0
    return has_nan and fmt.element.bits <= 8 and not fmt.has_float_scale


def decoded(operand: Operand, saved: Saved, scale: Tensor | float) -> tuple[Tensor, Tensor | None] | None:
    """Codes that were kept as (payload, factor), made in one pass; None where they are not decoded so."""
    if operand.block:
        if traced(saved[0]) or operand.fmt.has_float_scale or operand.fmt.element.bits > 8:
            return None
        assert operand.cast is not None
        powers = (powers_of_blocks(operand.fmt) if operand.fmt.tensor_scale else None) or (0, 0)
        return kernels.decoded_blocks(saved, operand.cast, powers) if kernels.serve(saved[0]) else None
    powers = powers_of(operand)
    one = isinstance(scale, float | int) or scale.numel() == 1
    if powers is None or not kernels.serve(saved[0]) or not (one or saved[0].ndim == 2):
        return None
    assert operand.cast is not None
    values, factor = kernels.decoded(saved, operand.cast, scale, powers)
    return values, None if has_power_of_two(operand) else factor
