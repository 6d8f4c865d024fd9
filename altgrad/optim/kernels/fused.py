"""The torch side of the fused CPU steps: which parameters can take one, and the call.

Rule, by capability alone and never by timing: a CPU parameter in float32 with a dense contiguous gradient, moments kept
in full, one scale or one per contiguous row, and a grid whose exponents float32 has as normal numbers. All others take
the plain torch path, which gives the same results (to an ulp of the attempted weight, where a compiler's fused
multiply-add differs).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altgrad.errors import OptionError
from altgrad.jit.grid_table import SETTLED_ALIKE, family_of, float32_arithmetic_suffices, grid_table, settles_plainly
from altgrad.optim import moments
from altgrad.optim.grid import landing_cast, scale_as_rows
from altgrad.quantization import FP32, Cast, FloatFormat, Rounding
from altgrad.quantization.parameter_grid import ParameterGrid

SHORTEST_ROW = 16
_REALS = ParameterGrid(FP32)
# As Rule, Landing and Pull in `optim.kernels.parts`, which imports Numba and is loaded on first use.
ADAM, GRID_STEPS, LION, SIGN, MADAM, LNS, GATHER = range(7)
NONE, ROUND, KAHAN, ECO = range(4)
MOMENTUM, NESTEROV, READY = range(3)


def why_not(slot: Any, group: dict[str, Any]) -> str | None:
    """Why a parameter cannot take a fused step, or None if it can."""
    weight, grid = slot.weight, slot.grid
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or slot.parameter.dtype != torch.float32:
        return f"it is {slot.parameter.dtype} on {weight.device}, not float32 on a CPU"
    if not (weight.is_contiguous() and slot.grad.is_contiguous()):
        return "weight or gradient is not contiguous"
    if any(moments.moment_formats(group["moment_format"])):
        return "its moments have a format"
    if grid is None:
        return None
    if not float32_arithmetic_suffices(grid.format):
        return f"{grid.format} reaches into float32's subnormal numbers"
    if not grid.format.has_subnormals and grid.format.mantissa_bits:
        return f"{grid.format} has a gap around zero"
    rows = scale_as_rows(grid.scale, weight)
    if rows is None or (rows[0].numel() > 1 and rows[1] < SHORTEST_ROW):
        return "its scales do not cover contiguous rows"
    return None


def takes_fused(slot: Any, group: dict[str, Any]) -> bool:
    """Whether the fused step runs.

    Raises:
        OptionError: `fused=True` was asked for and cannot be had.
    """
    if group["fused"] is False:
        return False
    reason = why_not(slot, group)
    if reason is not None and group["fused"]:
        raise OptionError(f"fused=True, but parameter {slot.index} cannot take a fused step: {reason}; use fused=None")
    return reason is None


@cache
def _has_fma() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # torch's own kernels fuse there


@cache
def _step(*fields: Any) -> int:
    from altgrad.optim.kernels.parts import Variant
    from altgrad.optim.kernels.steps import compiled

    return compiled(Variant(*fields, _has_fma()))


@cache
def _landing_on(cast: Cast) -> tuple[int, bool, int]:
    """(rounding family, whether it settles plainly, address of the grid's table) of a cast of float32 values."""
    facts = cast.grid, cast.rounding, cast.overflow
    plain = settles_plainly(*facts)
    family = family_of(*facts, cast.random_bits, False, plain)
    table = grid_table(*facts, cast.clamp, cast.random_bits, False)
    return int(family), plain and family in SETTLED_ALIKE, table.ctypes.data


def run(
    slot: Any,
    first: Tensor,
    second: Tensor | None = None,
    extra: Tensor | None = None,
    *,
    rule: int,
    landing: int = NONE,
    cast: Cast | None = None,
    key: tuple[int, int] | None = None,
    spacing: bool = False,
    on_gradient: bool = False,
    on_step: bool = False,
    pull: int = MOMENTUM,
    **numbers: float,
) -> Tensor | None:
    """One fused step of one parameter, in place.

    Args:
        first, second, extra: the state that the rule updates.
        rule, landing: `optim.kernels.parts.Rule` and `optim.kernels.parts.Landing`.
        cast, key: of the landing.
        spacing, on_gradient, on_step: whether the grid spacing is used, and on what.
        pull: `optim.kernels.parts.Pull`, of the rule GRID_STEPS.
        numbers: hyperparameters by `optim.kernels.parts.Field` name, in lower case.

    Returns:
        float64 [6], the counts of the landing; None without one.
    """
    from altgrad.jit import threads
    from altgrad.optim.kernels.parts import COUNT_FIELDS, COUNT_TILE, Field

    grid = slot.grid or _REALS
    fmt, count = grid.format, slot.weight.numel()
    kind = 0 if not spacing else (2 if fmt.bias is None else 1)
    by_itself = rule in (GRID_STEPS, LNS) and cast is not None and cast.rounding is Rounding.STOCHASTIC
    rows = scale_as_rows(grid.scale, slot.weight)
    assert rows is not None
    scales, inner = rows
    lands_by_kernel = landing != NONE and rule not in (GRID_STEPS, LNS)
    unused = landing_cast(
        fmt, "nearest_even", 24
    )  # a loop that rounds by itself, or not at all, reads a table and no more
    family, plain, grid_address = _landing_on(cast if lands_by_kernel and cast is not None else unused)
    family, plain = (family, plain) if lands_by_kernel else (0, False)
    power = _is_one(scales) or (_powers_of_two(scales, fmt) and (plain or not lands_by_kernel))
    loop = _step(rule, landing, kind, on_gradient, on_step, by_itself, family, plain, pull, power)
    table = np.zeros(len(Field), np.uint64)
    values = table.view(np.float64)
    table[Field.SECOND] = 0 if second is None else second.data_ptr()
    table[Field.EXTRA] = 0 if extra is None else extra.data_ptr()
    table[Field.ROUND_TABLE] = grid_address
    table[Field.EMIN_BITS] = max(fmt.emin + 127, 0) << 23
    table[Field.EMIN_FIELD] = fmt.emin + 1023
    table[Field.MANTISSA_FIELD] = fmt.mantissa_bits << 52
    values[Field.RELATIVE] = 2.0**-fmt.mantissa_bits
    values[Field.LIMIT] = fmt.max
    for name, number in numbers.items():
        values[Field[name.upper()]] = number
    partials = torch.empty(-(-count // COUNT_TILE), COUNT_FIELDS, dtype=torch.float64) if landing else None
    seed, stream = signed(key or (0, 0))
    threads.run(
        loop,
        count,
        table.ctypes.data,
        slot.weight.data_ptr(),
        slot.grad.data_ptr(),
        first.data_ptr(),
        scales.data_ptr() if scales.numel() > 1 else 0,
        float(scales[0]),
        inner,
        scales.numel(),
        seed,
        stream,
        0 if partials is None else partials.data_ptr(),
    )
    for written in (slot.parameter, first, second, extra):
        if written is not None:
            torch.autograd.graph.increment_version(written)
    return None if partials is None else partials.sum(dim=0)


def _powers_of_two(scales: Tensor, fmt: FloatFormat) -> bool:
    """Whether the grid can be scaled in place of the weights: powers of two that leave all its numbers normal."""
    if bool((scales.view(torch.int32) & 0x7FFFFF).any()):
        return False
    lowest, highest = (math.frexp(float(end))[1] - 1 for end in (scales.min(), scales.max()))
    bottom = fmt.emin - fmt.mantissa_bits
    return bottom + min(lowest, 0) >= -100 and fmt.emax + 25 - fmt.mantissa_bits + highest <= 127 and lowest >= -100


def _is_one(scales: Tensor) -> bool:
    return bool((scales == 1.0).all())


def signed(key: tuple[int, int]) -> tuple[int, int]:
    """Both words as signed 64-bit integers."""
    seed, stream = ((word + 2**63) % 2**64 - 2**63 for word in key)
    return seed, stream
