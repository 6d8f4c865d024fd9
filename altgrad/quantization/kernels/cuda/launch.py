"""What the host does around a launch: tables of facts on the device, room for results, random keys."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import (
    GRID_FIELDS,
    Family,
    addition_rounds,
    family_of,
    grid_table,
    settles_plainly,
    special_codes,
)
from altgrad.quantization.codec import code_dtype
from altgrad.quantization.kernels.cuda.bits import ADDITION, MODES, SHORT_CHANCE, Grid
from altgrad.quantization.plan import Plan
from altgrad.quantization.quantized import Quantized
from altgrad.quantization.stats import QuantStats

_PICKED = [GRID_FIELDS.index(name) for name in Grid._fields]


@cache
def device_table(
    fmt: FloatFormat,
    rounding: Rounding,
    overflow: Overflow,
    clamp: bool,
    wide: bool,
    saturate_finite: bool,
    device: torch.device,
    inf_as_nan: bool = False,
) -> torch.Tensor:
    """The facts that `read_grid` reads, as an int64 tensor on the device; kept for the life of the process.

    saturate_finite: finite elements become max even where the policy would give inf. inf_as_nan: an inf without a code
    takes NaN's.
    """
    table = grid_table(fmt, rounding, overflow, clamp, 24, wide).copy()
    if saturate_finite:
        for name in ("overflow_positive", "overflow_negative"):
            table[GRID_FIELDS.index(name)] = table[GRID_FIELDS.index("max_bits")]
    if inf_as_nan and special_codes(fmt)[0] < 0:
        table[GRID_FIELDS.index("inf_code")] = table[GRID_FIELDS.index("nan_code")]
        table[GRID_FIELDS.index("inf_problem")] = 0
    return torch.from_numpy(table[_PICKED].view(np.int64)).to(device)


LEAN_EXPONENTS = (-70, 70)  # grids within them are far from where the quotient of `bits.lean_quotient` underflows


def mode_of(fmt: FloatFormat, rounding: Rounding, overflow: Overflow, random_bits: int, wide: bool, lean: bool) -> int:
    """The arithmetic that a kernel is compiled with."""
    family = family_of(fmt, rounding, overflow, random_bits, wide, lean)
    if family is Family.BY_ADDITION:
        return ADDITION.value
    return SHORT_CHANCE.value if lean and family is Family.BY_SHORT_CHANCE else MODES[rounding]


def is_lean(fmt: FloatFormat, rounding: Rounding, overflow: Overflow, random_bits: int, wide: bool) -> bool:
    """Whether the arithmetic for the casts of training serves: float32, an 8-bit grid or narrower, saturation to max."""
    low, high = LEAN_EXPONENTS
    if wide or not settles_plainly(fmt, rounding, overflow) or fmt.emin - fmt.mantissa_bits < low or fmt.emax > high:
        return False
    if rounding is Rounding.NEAREST_EVEN:
        return addition_rounds(fmt, wide)
    return family_of(fmt, rounding, overflow, random_bits, wide, plain=True) is Family.BY_SHORT_CHANCE


def total(partials: torch.Tensor, elements: int) -> torch.Tensor:
    """The vector of `QuantStats` from rows of partial statistics."""
    sums = partials[:, 1:].sum(dim=0)
    amax = partials[:, :1].amax(dim=0) if len(partials) else partials.new_zeros(1)
    return torch.cat([amax, partials.new_full((1,), float(elements)), sums])


def on_device(x: torch.Tensor):
    """Context in which kernels launch on x's GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def key_tensor(key: tuple[int, int] | torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """(seed, stream) as an int64 tensor on the device."""
    if key is None or isinstance(key, torch.Tensor):
        return None if key is None else key.to(device)
    words = torch.empty(2, dtype=torch.int64, device=device)
    for place, word in zip(words, key, strict=True):  # a copy of host memory would wait for the device
        place.fill_(word)
    return words


class Outputs(NamedTuple):
    """What a launch writes to; None for what the plan does not want."""

    values: torch.Tensor | None
    codes: torch.Tensor | None
    problems: torch.Tensor | None  # int32, one per program; also None where everything has a code
    partials: torch.Tensor | None  # float64, six per program


def _lacks_codes(plan: Plan) -> bool:
    """Whether a NaN or inf that the policy lets pass has no code."""
    inf_code, nan_code = special_codes(plan.grid)
    return nan_code < 0 or (inf_code < 0 and plan.overflow is not Overflow.SATURATE)


def outputs(plan: Plan, x: torch.Tensor, out: torch.Tensor | None, programs: int) -> Outputs:
    """Room for the results of so many programs over the contiguous x; values go straight to an `out` that is contiguous."""
    direct = out is not None and out.is_contiguous()
    return Outputs(
        (out if direct else torch.empty_like(x)) if plan.values else None,
        torch.empty_like(x, dtype=code_dtype(plan.grid)) if plan.codes else None,
        torch.empty(programs, dtype=torch.int32, device=x.device) if plan.codes and _lacks_codes(plan) else None,
        torch.empty((programs, 6), dtype=torch.float64, device=x.device) if plan.stats else None,
    )


def collected(
    found: Outputs,
    out: torch.Tensor | None,
    elements: int,
    scales: torch.Tensor | None = None,
    upper: torch.Tensor | None = None,
) -> Quantized:
    """The results of a launch over so many elements."""
    values, codes, problems, partials = found
    if out is not None and values is not None and values is not out:
        values = out.copy_(values)
    stats = None if partials is None else QuantStats(total(partials, elements))
    missing = 0 if problems is None or not len(problems) else problems.amax()
    return Quantized(values, codes, scales, stats, upper, missing)
