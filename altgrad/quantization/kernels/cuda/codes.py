"""Codes of operands in Triton: in the layouts that an FP8 unit reads, and from what a backward kept to what it multiplies.

    codes     rows one after another, columns one after another, or both in one pass
    decoded   codes as payload * 2^p in bf16, as `operands.payload` made them beside the codes; nothing in float32 is written

A unit wants the axis that it adds up innermost in both operands. A tensor that two products reduce along different axes is
therefore wanted in both layouts; a patch of it is read and rounded once and written twice.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.subnormals import gradual_underflow
from altgrad.quantization.codec import value_table, value_tensor
from altgrad.quantization.kernels.cuda import operands
from altgrad.quantization.kernels.cuda.bits import (
    STOCHASTIC,
    finite_bits,
    key_words,
    narrow,
    pulled_apart,
    random_words,
    read_grid,
    rounded,
    widen,
)
from altgrad.quantization.kernels.cuda.launch import device_table, is_lean, key_tensor, mode_of, on_device
from altgrad.quantization.plan import Plan

ROWS, COLUMNS, WARPS = 128, 64, 4  # of a program's patch: a column of it is written as 128 bytes, a row as 64
ONE_BLOCK = 2**32  # elements that have the same key words


@triton.jit
def _turned(
    x,
    codes,
    turned,
    amax,
    scale,
    number,
    table,
    key,
    random_bits,
    rows,
    columns,
    row_step,
    column_step,
    MODE: tl.constexpr,
    LEAN: tl.constexpr,
    KEEPS_INF: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLLECTS: tl.constexpr,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A patch of x, at most 2^32 elements: its codes to `turned`, column after column; with BOTH to `codes`, too, row after row.

    row_step, column_step: 1 along an axis that has scales of its own (CHANNELS), else 0. Others are as for
    `operands._payload`.
    """
    program = tl.program_id(0)
    across = (columns + COLUMNS - 1) // COLUMNS
    row = ((program // across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = ((program % across) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    valid = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    grid = read_grid(table, False)
    v = widen(tl.load(x + place, mask=valid, other=0.0))
    if CHANNELS:
        s = tl.load(scale + row[:, None] * row_step + column[None, :] * column_step, mask=valid, other=1.0)
    else:
        s = tl.load(scale) if ON_DEVICE else tl.cast(number, tl.float32)
    word = place.to(tl.uint32)
    if MODE >= STOCHASTIC:
        before, between = key_words(key, tl.full((), 0, tl.uint64))
        word = random_words(word, before, between)
    _, code, _ = rounded(v, s, 1.0, word, random_bits, grid, MODE, LEAN, KEEPS_INF, CHANNELS, True)
    code = code.to(tl.uint8)
    if BOTH:
        tl.store(codes + place, code, mask=valid)
    there = column[:, None] * rows + row[None, :]
    tl.store(turned + there, tl.trans(code), mask=(column < columns)[:, None] & (row < rows)[None, :])
    if COLLECTS:
        tl.atomic_max(amax, tl.max(finite_bits(v)).to(tl.int32, bitcast=True))


def codes(
    plan: Plan,
    x: Tensor,
    scale: Tensor | float,
    *,
    inner: tuple[int, ...] = (-1,),
    key: Tensor | None = None,
    amax: Tensor | None = None,
) -> list[Tensor]:
    """The codes of x rounded as the plan says, uint8 of x's shape, once for each axis of `inner`.

    Args:
        inner: axes whose elements are neighbours in memory: -1 or 1, rows one after another; 0, columns (of a matrix).
        scale, key, amax: as for `operands.payload`.

    An inf that the policy lets pass, and that has no code, has that of NaN.
    """
    by_column = [axis == 0 for axis in inner]
    if not any(by_column):
        return [operands.codes(plan, x, scale, key=key, amax=amax)] * len(inner)
    if plan.rounding is Rounding.STOCHASTIC and x.numel() > ONE_BLOCK:
        plain = operands.codes(plan, x, scale, key=key, amax=amax)
        return [plain.t().contiguous().t() if is_turned else plain for is_turned in by_column]
    plain, turned = _both(plan, x.contiguous(), scale, not all(by_column), key, amax)
    return [turned.t() if is_turned else plain for is_turned in by_column]  # type: ignore[list-item]


def _both(
    plan: Plan, x: Tensor, scale: Tensor | float, both: bool, key: Tensor | None, amax: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """(codes of a matrix if `both`, those of its transpose), both contiguous."""
    fmt, rounding, overflow = plan.grid, plan.rounding, plan.overflow
    (rows, columns), on_host = x.shape, not isinstance(scale, Tensor)
    plain = torch.empty_like(x, dtype=torch.uint8) if both else None
    turned = torch.empty((columns, rows), dtype=torch.uint8, device=x.device)
    lean = is_lean(fmt, rounding, overflow, plan.random_bits, False)
    channels = not on_host and scale.numel() > 1
    if not x.numel():
        return plain, turned
    with on_device(x):
        _turned[(-(-rows // ROWS) * -(-columns // COLUMNS),)](
            x,
            plain,
            turned,
            None if amax is None else amax.view(torch.int32),
            None if on_host else scale,
            scale if on_host else 1.0,
            device_table(fmt, rounding, overflow, plan.clamp, False, False, x.device, True),
            key_tensor(key, x.device),
            plan.random_bits,
            rows,
            columns,
            int(channels and scale.shape[1] == 1),
            int(channels and scale.shape[1] > 1),
            MODE=mode_of(fmt, rounding, overflow, plan.random_bits, False, lean),
            LEAN=lean,
            KEEPS_INF=overflow is not Overflow.SATURATE,
            ON_DEVICE=not on_host,
            CHANNELS=channels,
            COLLECTS=amax is not None,
            BOTH=both,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return plain, turned


class Digits(NamedTuple):
    """How the values of a format of sign and magnitude follow from its codes.

    The magnitude's bits, shifted, are a float32 number; times `lift` it is the value, also where it is subnormal. special: the
    lowest magnitude that is no number; 2^7 or more where all are. has_inf: whether that one is inf.
    """

    bits: int
    shift: int
    lift: float
    special: int
    has_inf: bool


@cache
def digits_of(fmt: FloatFormat) -> Digits | None:
    """The digits of a format of at most 8 bits; None where its codes are read from a table of values."""
    values = value_table(fmt).astype(np.float32)
    half = len(values) // 2
    magnitudes, finite = np.arange(half, dtype=np.int32), np.isfinite(values[:half])
    shift, special = 23 - fmt.mantissa_bits, int(half if finite.all() else np.argmin(finite))
    floats = (magnitudes << shift).view(np.float32)
    if special < 2 or len(values) != 2**fmt.bits:
        return None
    lift = float(values[1]) / math.ldexp(1.0, shift - 149)
    has_inf = special < half and bool(np.isinf(values[special]))
    if not 0 < lift <= 2.0**127:
        return None
    with gradual_underflow():
        made = floats * np.float32(lift)
    made[special:] = np.nan
    if has_inf:
        made[special] = np.inf
    made = np.concatenate([made, -made])
    same = np.array_equal(made, values, equal_nan=True) and np.array_equal(np.signbit(made), np.signbit(values))
    return Digits(fmt.bits, shift, lift, special, has_inf) if same else None


@triton.jit
def value_of(
    code,
    values,
    last,
    lift,
    TABLE: tl.constexpr,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    SPECIAL: tl.constexpr,
    HAS_INF: tl.constexpr,
):
    """The values of codes, float32, by `Digits` or from a TABLE."""
    if TABLE:
        place = code.to(tl.int64)
        return tl.load(values + place, mask=place <= last, other=float("nan"))
    digits = code.to(tl.uint32)
    magnitude = digits & ((1 << (BITS - 1)) - 1)
    value = (magnitude << SHIFT).to(tl.float32, bitcast=True) * lift
    if SPECIAL < 1 << (BITS - 1):
        value = tl.where(magnitude >= SPECIAL, float("nan"), value)
        if HAS_INF:
            value = tl.where(magnitude == SPECIAL, float("inf"), value)
    sign = (digits >> (BITS - 1)) << 31
    return (value.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _decoded(
    codes,
    out,
    factor,
    poison,
    scale,
    number,
    values,
    last,
    lift,
    size,
    inner,
    channels,
    low,
    high,
    TABLE: tl.constexpr,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    SPECIAL: tl.constexpr,
    HAS_INF: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    CHANNELS: tl.constexpr,
    POISONED: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """payload * 2^p of the codes of ELEMENTS neighbouring elements; arguments as for `operands._payload`."""
    program = tl.program_id(0)
    index = program.to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = index < size
    if CHANNELS:
        line = index // inner
        s = tl.load(scale + line % channels, mask=valid, other=1.0)
    else:
        s = tl.load(scale) if ON_DEVICE else tl.cast(number, tl.float32)
    up, significand = pulled_apart(s, low, high)
    if CHANNELS:
        tl.store(factor + line, significand, mask=valid & (line < channels) & (index % inner == 0))
    elif ON_DEVICE and program == 0:
        tl.store(factor, significand)
    code = tl.load(codes + index, mask=valid, other=0)
    result = value_of(code, values, last, lift, TABLE, BITS, SHIFT, SPECIAL, HAS_INF) * up
    if POISONED:
        added = tl.load(poison)
        result = tl.where(added == added, result, added)  # -0 + 0 would be 0
    tl.store(out + index, narrow(result, out.dtype.element_ty), mask=valid)


def decoded(
    plan: Plan, codes: Tensor, scale: Tensor | float, powers: tuple[int, int], poison: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(payload * 2^p in bf16, factor) of codes, uint8, as `operands.payload` gives them; other arguments as there.

    poison: 0-d float32, what is added to all.
    """
    source, fmt = codes.contiguous(), plan.grid
    out = torch.empty_like(source, dtype=torch.bfloat16)
    factor, (inner, channels) = operands.factor_like(scale, powers, source), operands.lines_of(scale, source.shape)
    on_host, digits = not isinstance(scale, Tensor), digits_of(fmt)
    table = value_tensor(fmt, torch.float32, source.device) if digits is None else None
    if source.numel():
        with on_device(source):
            _decoded[(-(-source.numel() // operands.ELEMENTS),)](
                source,
                out,
                factor,
                poison,
                None if on_host else scale,
                scale if on_host else 1.0,
                table,
                0 if table is None else len(table) - 1,
                1.0 if digits is None else digits.lift,
                source.numel(),
                inner,
                channels,
                *powers,
                TABLE=digits is None,
                BITS=fmt.bits,
                SHIFT=0 if digits is None else digits.shift,
                SPECIAL=0 if digits is None else digits.special,
                HAS_INF=digits is not None and digits.has_inf,
                ON_DEVICE=not on_host,
                CHANNELS=channels > 1,
                POISONED=poison is not None,
                ELEMENTS=operands.ELEMENTS,
                enable_fp_fusion=False,
            )
    return out, factor
