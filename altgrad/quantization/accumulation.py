"""Matrix products as a hardware accumulator adds them up: `accumulate(a, b, "hopper_fp8", formats=("E4M3", "E4M3"))`.

`altgrad.formats.accumulator` says what an accumulator is. A product is made of two operands' `Terms`: what the unit
multiplies, and at which exponent it sees each number. Three implementations give the same bits: `cpu` (compiled), `eager`
(any device, in torch) and `reference` (Python's integers).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from altgrad.errors import DtypeError, FormatError, KernelError, OptionError
from altgrad.formats.accumulator import CARRIER_BITS, Accumulator
from altgrad.formats.catalog import get_format
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.subnormals import gradual_underflow
from altgrad.quantization.kernels.choose import load
from altgrad.quantization.powers import leading_power

_FLOAT32_BITS = 24
_FLOAT32_SPAN = 40  # exponents within which no product of two operands leaves float32's normal numbers


class Terms(NamedTuple):
    """One operand of an accumulated product, the reduced axis last.

    values: [rows, reduced], what is multiplied. powers: of the same shape, 2^exponent at which the unit sees each; 0 for
    zeros (with groups: [rows, groups], of the groups' scales). scales: float32 [rows, blocks]: of each group, or of each
    `promote_every` products where the promotion is scaled; else None. grid: the format of the values.
    """

    values: Tensor
    powers: Tensor
    scales: Tensor | None
    grid: FloatFormat

    @property
    def narrow(self) -> bool:
        """Whether float32 holds every product of two such operands as a normal number."""
        return self.values.dtype == torch.float32


def terms(
    values: Tensor, grid: FloatFormat, *, multipliers: Tensor | None = None, scales: Tensor | None = None
) -> Terms:
    """An operand from values on its format's grid.

    Args:
        values: float [rows, reduced], without their scale.
        grid: their format; its smallest normal number bounds the exponents that the unit sees.
        multipliers: powers of two that broadcast to `values` (scales of MX blocks), whose exponents the unit adds.
        scales: see `Terms`.
    """
    work = values.double() if multipliers is not None or not _stays_narrow(grid) else values.float()
    powers = leading_power(work).clamp(grid.min_normal, 2.0**grid.emax)
    if multipliers is not None:
        powers, work = powers * multipliers, work * multipliers
    return Terms(work, torch.where(values == 0, 0, powers), scales, grid)


def group_terms(values: Tensor, grid: FloatFormat, scales: Tensor, group: int) -> Terms:
    """An operand whose groups of `group` values along the last axis have scales [rows, groups]; the last is filled up."""
    work, scales = pad(values.double(), (0, -values.shape[1] % group)), scales.double()
    return Terms(work, leading_power(scales), scales, grid)


@lru_cache(maxsize=256)
def _stays_narrow(grid: FloatFormat) -> bool:
    return grid.emax <= _FLOAT32_SPAN and math.frexp(grid.min_subnormal)[1] > -_FLOAT32_SPAN


@lru_cache(maxsize=1024)
def check_accumulator(accumulator: Accumulator, a: FloatFormat, b: FloatFormat) -> None:
    """Refuse formats whose products the accumulator's arithmetic here does not hold exactly.

    Raises:
        OptionError: with the limit.
    """
    bits = a.significant_bits + b.significant_bits
    if bits > CARRIER_BITS - 12 or accumulator.sum_bits > CARRIER_BITS:
        raise OptionError(
            f"accumulator {accumulator} on {a} and {b}: products of {bits} bits in sums of {accumulator.sum_bits}; "
            f"exact are products of up to {CARRIER_BITS - 12} bits and sums of up to {CARRIER_BITS}"
        )
    if accumulator.fraction_bits is None:
        lowest = sum(math.frexp(fmt.min_subnormal)[1] - 1 for fmt in (a, b))
        span = a.emax + b.emax + 2 - lowest + 2 * math.ceil(math.log2(accumulator.products + 1))
        if span > 2 * CARRIER_BITS:
            raise OptionError(
                f"accumulator {accumulator} adds exactly, and products of {a} and {b} span {span} bits; at most "
                f"{2 * CARRIER_BITS} are exact here: use narrower formats or fraction_bits"
            )


def accumulate_terms(a: Terms, b: Terms, accumulator: Accumulator, kernel: str | None = None) -> Tensor:
    """The sums of products of a [rows, reduced] and b [columns, reduced], as float64 [rows, columns].

    Raises:
        OptionError: the formats do not suit the accumulator; KernelError: no such kernel, or not on that device.
    """
    check_accumulator(accumulator, a.grid, b.grid)
    name = kernel or ("cpu" if a.values.device.type == "cpu" else "eager")
    if name not in ("cpu", "eager", "reference"):
        raise KernelError(f"kernel {kernel!r} does not accumulate; use cpu, eager or reference")
    if name == "cpu" and a.values.device.type != "cpu":
        raise KernelError(f'kernel "cpu" works on cpu tensors, a is on {a.values.device}; leave kernel out')
    narrow = a.narrow and b.narrow and accumulator.sum_bits <= _FLOAT32_BITS
    narrow &= a.grid.significant_bits + b.grid.significant_bits <= _FLOAT32_BITS
    if 0 in (*a.values.shape, b.values.shape[0]):
        return a.values.new_zeros((a.values.shape[0], b.values.shape[0]), dtype=torch.float64)
    with gradual_underflow():
        return load(name, "accumulate").run(a, b, accumulator, not narrow)


def accumulate(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator | str,
    *,
    formats: tuple[FloatFormat | str, FloatFormat | str],
    kernel: str | None = None,
) -> Tensor:
    """a @ b with the products added up as the accumulator does, for matrices [..., m, k] and [..., k, n].

    Args:
        a, b: floating tensors on one device whose values lie on their formats' grids: payloads, as a unit multiplies them
            (the scales of two tensors multiply the result). NaN and inf go where they would in plain torch.
        accumulator: an `Accumulator`, a preset's name such as "hopper_fp8", or its text.
        formats: of a and b: scalar formats, whose exponents the unit aligns by.

    Returns:
        float32 [..., m, n].

    Raises:
        DtypeError: no floating tensors. FormatError: a block format (recipes take those).
        OptionError: shapes that do not multiply, or formats too wide for the accumulator.
    """
    accumulator = Accumulator.parse(accumulator)
    grids = [get_format(fmt) for fmt in formats]
    for name, tensor, grid in zip(("a", "b"), (a, b), grids):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise DtypeError(f"{name} is {getattr(tensor, 'dtype', type(tensor).__name__)}; pass a floating tensor")
        if not isinstance(grid, FloatFormat):
            raise FormatError(f"{grid} is a block format; name a scalar format, or use a recipe with an accumulator")
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise OptionError(
            f"a of shape {list(a.shape)} and b of shape {list(b.shape)} do not multiply; pass [m, k], [k, n]"
        )
    if accumulator.group > 1 or accumulator.scaled_promotion:
        raise OptionError(f"accumulator {accumulator} needs scales of blocks, which plain tensors lack; use a recipe")
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    left, right = (
        x.detach().expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:])
        for x in (a, b.transpose(-2, -1))
    )
    found = [
        accumulate_terms(terms(one, grids[0]), terms(other, grids[1]), accumulator, kernel)
        for one, other in zip(left, right)
    ]
    made = torch.stack(found) if found else a.new_zeros((0, a.shape[-2], b.shape[-1]))
    return made.view(*batch, a.shape[-2], b.shape[-1]).float()
