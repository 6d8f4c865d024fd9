"""Nearest rounding in torch's own pointwise operations, which a compiler fuses with what makes x: the kernels' bits.

    nearest    values, as `quantize` gives them
    payload    an operand of a tensor core, as `kernels.cuda.operands.payload` gives it
    codes      an operand of an FP8 unit, as `kernels.cuda.operands.codes` gives it

Adding 2^(e + 23 - M) to a quotient in [2^e, 2^(e + 1)) leaves it in steps of 2^(e - M), rounded to nearest even, as
`kernels.cuda.bits.lean_round` does. Where that does not serve (`facts_of`) a graph has the kernel as one operator.

A GPU's compiler divides float32 by a reciprocal. `addcmul` and `addcdiv` are what it keeps as torch computes them: a fused
multiply-add, and a division that rounds.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import addition_rounds, settles_plainly

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY, LARGEST = 2.0**-126, 2.0**127  # scales outside are left to the kernel
SHORT_EXPONENTS = (-70, 70)  # of grids that lie where the quotient of `_by_reciprocal` is rounded once


class Facts(NamedTuple):
    """What `nearest` needs to know of a cast.

    largest: max. least: 2^emin. lift: 2^(23 - M). keeps_inf: whether an inf keeps its place. short: see `SHORT_EXPONENTS`.
    """

    largest: float
    least: float
    lift: float
    keeps_inf: bool
    short: bool


def facts_of(fmt: object, grid: FloatFormat, rounding: Rounding, overflow: Overflow) -> Facts | None:
    """What `nearest` needs to know of a cast; None where its result would be another."""
    if fmt is not grid or rounding is not Rounding.NEAREST_EVEN or not settles_plainly(grid, rounding, overflow):
        return None
    if not addition_rounds(grid, False) or grid.emin < -126 or not grid.has_zero:
        return None
    low, high = SHORT_EXPONENTS
    return Facts(
        grid.max,
        math.ldexp(1.0, grid.emin),
        math.ldexp(1.0, 23 - grid.mantissa_bits),
        overflow is not Overflow.SATURATE,
        low <= grid.emin - grid.mantissa_bits and grid.emax <= high,
    )


def as_tensor(scale: Any, x: Tensor) -> Tensor:
    """A scale as a float32 tensor where x is."""
    return scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float32, device=x.device)


def takes(x: Tensor, scale: Any) -> bool:
    """Whether a scale is known to be good when the graph is made, or is not read on x's device anyway."""
    if not isinstance(scale, Tensor):
        return isinstance(scale, float | int) and not isinstance(scale, bool) and TINY <= scale <= LARGEST
    beside = x.device.type == "cuda" and scale.device == x.device
    return beside and scale.dtype == torch.float32 and scale.ndim <= x.ndim


def _by_reciprocal(size: Tensor, scale: Tensor) -> Tensor:
    """size / scale of magnitudes, as `kernels.cuda.bits.lean_quotient`: rounded once where that is at least 2^-70.

    With scale = m * 2^p, r = fl(1 / m) and what r lacks, the first quotient is within one ulp; its remainder is exact.
    """
    field = ((scale.view(torch.int32) >> 23) & 0xFF).clamp(1, 254)
    down = torch.where(field < 254, (254 - field) << 23, 0x400000).view(torch.float32)
    m, one, none = scale * down, scale.new_ones(()), scale.new_zeros(())
    r = torch.addcdiv(none, one, m)
    rest = torch.addcmul(one, -r, m) * r
    a = (size * down).clamp(max=2.0**100)
    near = torch.addcmul(a * rest, a, r)
    return torch.addcmul(near, torch.addcmul(a, near, -m), r)


def _quotient(size: Tensor, scale: Tensor | float, short: bool) -> Tensor:
    """size / scale of magnitudes in float32, rounded once where the grid tells."""
    if not isinstance(scale, Tensor) and math.frexp(scale)[0] == 0.5:
        return size if scale == 1 else size * (1 / scale)
    given = as_tensor(scale, size)
    if size.device.type != "cuda":
        return size / given
    return _by_reciprocal(size, given) if short else torch.addcdiv(size.new_zeros(()), size, given)


def _payload(x: Tensor, scale: Tensor | float, facts: Facts) -> Tensor:
    """x / scale on the grid, in float32; a NaN or inf that is kept is x's own."""
    size = x.abs()
    quotient = _quotient(size, scale, facts.short).clamp(max=facts.largest)
    pivot = (quotient.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=facts.least) * facts.lift
    magnitude = (quotient + pivot) - pivot
    kept = size < math.inf if facts.keeps_inf else size == size
    return torch.where(kept, torch.copysign(magnitude, x), x)


def nearest(x: Tensor, scale: Tensor | float, facts: Facts) -> Tensor:
    """`quantize(x, format, scale)` of a float32, bf16 or fp16 tensor.

    scale: one that `takes` takes.
    """
    return (_payload(x.float(), scale, facts) * as_tensor(scale, x)).to(x.dtype)


def payload(
    x: Tensor, scale: Tensor | float, facts: Facts, powers: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """x as an operand of a tensor core: (payload * 2^p in bf16 or float16, m), scale = m * 2^p and p within `powers`."""
    given = as_tensor(scale, x)
    exponent = ((given.view(torch.int32) >> 23) & 0xFF).sub(127).clamp(*powers)
    up = ((exponent + 127) << 23).view(torch.float32)
    down = torch.where(exponent < 127, (127 - exponent) << 23, 0x400000).view(torch.float32)
    return (_payload(x.float(), scale, facts) * up).to(dtype), given * down


def codes(x: Tensor, scale: Tensor | float, facts: Facts, dtype: torch.dtype) -> Tensor:
    """x as an operand of an FP8 unit in a float8 dtype without inf, which becomes NaN."""
    x = x.float()
    found = _payload(x, scale, facts)
    return torch.where(x.isinf(), torch.nan, found).to(dtype) if facts.keeps_inf else found.to(dtype)
