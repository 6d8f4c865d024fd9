"""Codes of block formats in Triton, from what a backward kept to what a tensor core multiplies; nothing in float32 is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.quantization.codec import value_tensor
from altgrad.quantization.kernels.cuda.bits import narrow, pulled_apart
from altgrad.quantization.kernels.cuda.codes import digits_of, value_of
from altgrad.quantization.kernels.cuda.launch import on_device
from altgrad.quantization.plan import Plan

ROWS, COLUMNS = 32, 128  # of a program's patch


@triton.jit
def _decoded(
    codes,
    scales,
    out,
    upper,
    factor,
    values,
    last,
    scale_values,
    last_scale,
    lift,
    lines,
    rows,
    columns,
    tiles_down,
    tiles_across,
    low,
    high,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    TABLE: tl.constexpr,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    SPECIAL: tl.constexpr,
    HAS_INF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """element * block's scale * 2^p of a patch of `lines` lines, of which every `rows` are a matrix of their own.

    TWO_LEVELS: the scale of the tensor is m * 2^p with p within low .. high, and m goes to `factor`; else p is 0.
    """
    program = tl.program_id(0)
    across = (columns + COLUMNS - 1) // COLUMNS
    line = ((program // across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = ((program % across) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    valid = (line < lines)[:, None] & (column < columns)[None, :]
    place = line[:, None] * columns + column[None, :]
    band = (line // rows) * tiles_down + (line % rows) // TILE_ROWS
    tile = band[:, None] * tiles_across + (column // TILE_COLUMNS)[None, :]
    stored = tl.load(scales + tile, mask=valid, other=0)
    if POWER_OF_TWO:
        field = stored.to(tl.uint32)
        bits = tl.where(field == 0, 0x400000, tl.where(field == 255, 0x7FC00000, field << 23))
        scale = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        known = stored.to(tl.int64)
        scale = tl.load(scale_values + known, mask=known <= last_scale, other=float("nan"))
    if TWO_LEVELS:
        power, significand = pulled_apart(tl.load(upper), low, high)
        scale = scale * power
        if program == 0:
            tl.store(factor, significand)
    code = tl.load(codes + place, mask=valid, other=0)
    result = value_of(code, values, last, lift, TABLE, BITS, SHIFT, SPECIAL, HAS_INF) * scale
    tl.store(out + place, narrow(result, out.dtype.element_ty), mask=valid)


def decoded(
    plan: Plan, codes: Tensor, scales: Tensor, upper: Tensor | None, powers: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """(element * block's scale * 2^p in bf16, factor) of codes and stored scales, as `blocks.payload` gives them.

    upper: the scale of the whole tensor, 0-d float32; None: there is none, nor a factor.
    """
    fmt, layout, digits = plan.format, plan.layout(codes.shape), digits_of(plan.grid)
    source, device = codes.contiguous(), codes.device
    out = torch.empty_like(source, dtype=torch.bfloat16)
    factor = None if upper is None else torch.ones_like(upper) if not codes.numel() else torch.empty_like(upper)
    table = value_tensor(plan.grid, torch.float32, device) if digits is None else None
    of_scales = None if fmt.power_of_two else value_tensor(fmt.scale_format, torch.float32, device)
    outer, down, across = layout.grid
    lines = outer * layout.rows
    if source.numel():
        with on_device(source):
            _decoded[(-(-lines // ROWS) * -(-layout.columns // COLUMNS),)](
                source,
                scales.contiguous(),
                out,
                upper,
                factor,
                table,
                0 if table is None else len(table) - 1,
                of_scales,
                0 if of_scales is None else len(of_scales) - 1,
                1.0 if digits is None else digits.lift,
                lines,
                layout.rows,
                layout.columns,
                down,
                across,
                *powers,
                TILE_ROWS=layout.tile_rows,
                TILE_COLUMNS=layout.tile_columns,
                POWER_OF_TWO=fmt.power_of_two,
                TWO_LEVELS=upper is not None,
                TABLE=digits is None,
                BITS=plan.grid.bits,
                SHIFT=0 if digits is None else digits.shift,
                SPECIAL=0 if digits is None else digits.special,
                HAS_INF=digits is not None and digits.has_inf,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                enable_fp_fusion=False,
            )
    return out, factor
