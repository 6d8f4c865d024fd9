"""Codes of a matrix in Triton, in the layouts that an FP8 unit reads: rows one after another, columns, or both in one pass.

A unit wants the axis that it adds up innermost in both operands. A tensor that two products reduce along different axes is
therefore wanted in both layouts; a patch of it is read and rounded once and written twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.quantization.kernels.cuda import operands
from altgrad.quantization.kernels.cuda.bits import STOCHASTIC, finite_bits, key_words, random_words, read_grid, widen
from altgrad.quantization.kernels.cuda.launch import device_table, is_lean, key_tensor, mode_of, on_device
from altgrad.quantization.kernels.cuda.operands import rounded
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
    _, code = rounded(v, s, 1.0, word, random_bits, grid, MODE, LEAN, KEEPS_INF, CHANNELS, True)
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
