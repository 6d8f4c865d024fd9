"""Block formats in Triton: amax, scale and rounding of each tile in one kernel, from one read of device memory.

One kernel: with STRIPS it works on blocks along another axis, a strip of neighbouring columns per program, else on tiles
whose rows are contiguous. A tile that fits a program's registers is loaded once; a larger one is read
again from the cache. Tested on a CPU through Triton's interpreter (`TRITON_INTERPRET=1` before the first import).
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.quantization.block_layout import BlockLayout
from altgrad.quantization.codec import scale_values, stored_scale_dtype, value_tensor
from altgrad.quantization.kernels.cuda.bits import (
    STOCHASTIC,
    code_of,
    count,
    finite_bits,
    float_of,
    key_words,
    lean_code,
    lean_finite,
    lean_problem,
    lean_round,
    narrow,
    pulled_apart,
    random_words,
    read_grid,
    round_element,
    signed_as,
    store_counts,
    widen,
)
from altgrad.quantization.kernels.cuda.block_scales import PLAIN_FLOAT, POWER_OF_TWO, ROUNDED, scale_of
from altgrad.quantization.kernels.cuda.launch import (
    collected,
    device_table,
    is_lean,
    key_tensor,
    mode_of,
    on_device,
    outputs,
)
from altgrad.quantization.plan import Plan
from altgrad.quantization.quantized import Quantized

READS_ANY_CODE = True  # as `cuda.scalar`
PATCH = 2048  # elements that a program holds at once
LARGEST_PATCH = 4096  # a tile up to this size is loaded once


@triton.jit
def emit(
    v,
    index,
    valid,
    multiplier,
    reciprocal,
    lift,
    out,
    codes,
    key,
    random_bits,
    grid,
    MODE: tl.constexpr,
    LEAN: tl.constexpr,
    KEEPS_INF: tl.constexpr,
    LACKS: tl.constexpr,
    POISONS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    VALUES: tl.constexpr,
    CODES: tl.constexpr,
    STATS: tl.constexpr,
    STORED: tl.constexpr,
):
    """Round and store a patch, as payload * lift; (nonzero if an element had no code, the statistics of `count`)."""
    zeros = tl.zeros_like(v)
    word = index.to(tl.uint32)
    if MODE >= STOCHASTIC:
        # a block of random words is 2^32 elements, so that small tensors have one key
        block = tl.full((), 0, tl.uint64) if ONE_BLOCK else (index >> 32).to(tl.uint64)
        before, between = key_words(key, block)
        word = random_words(word, before, between)
    poisoned = multiplier + zeros != multiplier + zeros
    none = tl.full((), 0.0, tl.float64)
    counted = (none, none, none, none, none, none)
    if LEAN:
        size = tl.abs(v)
        y = size * reciprocal if SCALE == POWER_OF_TWO else tl.math.div_rn(size, multiplier + zeros)
        magnitude, steps = lean_round(y, word, grid, MODE)
        result = tl.where(lean_finite(v, KEEPS_INF), signed_as(magnitude, v), v) * lift
        if CODES:
            code = lean_code(steps, v, grid, KEEPS_INF)
    else:
        y = v * reciprocal if SCALE == POWER_OF_TWO else tl.math.div_rn(v, multiplier + zeros)
        payload, over = round_element(v, y, word, random_bits, grid, MODE, False)
        result = float_of(payload, False) * lift
        if CODES:
            code, problem = code_of(payload, grid, False)
        if STATS:
            counted = count(v, widen(narrow(result, STORED)), over, valid, poisoned)
    if VALUES:
        tl.store(out + index, narrow(result, out.dtype.element_ty), mask=valid)
    found = 0
    if CODES:
        if POISONS:
            code = tl.where(poisoned, code * 0, code)
        tl.store(codes + index, code.to(codes.dtype.element_ty), mask=valid)
        if LACKS and LEAN:
            found = lean_problem(tl.where(poisoned, 0.0, v) if POISONS else v, grid, KEEPS_INF)
        elif LACKS:
            found = tl.max(tl.max(tl.where(valid & (poisoned == 0), problem, problem * 0).to(tl.int32), 1), 0)
    return found, counted


@triton.jit
def amaxes(v, AXIS: tl.constexpr):
    """(largest magnitude bits, largest finite magnitude bits) of a patch along an axis; masked elements are 0."""
    return tl.max(v.to(tl.uint32, bitcast=True) & 0x7FFFFFFF, AXIS), tl.max(finite_bits(v), AXIS)


@triton.jit
def _process(
    x,
    out,
    codes,
    problems,
    partials,
    scales,
    element_table,
    scale_table,
    upper,
    factor,
    key,
    random_bits,
    emax,
    up_from,
    element_max,
    smallest,
    low,
    high,
    outer_tiles,
    rows,
    columns,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr,
    TILES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    MODE: tl.constexpr,
    LEAN: tl.constexpr,
    KEEPS_INF: tl.constexpr,
    LACKS: tl.constexpr,
    POISONS: tl.constexpr,
    SETTLES: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    VALUES: tl.constexpr,
    CODES: tl.constexpr,
    STATS: tl.constexpr,
    PAYLOAD: tl.constexpr,
):
    """One program: TILES tiles, each in CHUNKS patches of ELEMENTS elements.

    PAYLOAD: scales are not stored; values are those of the elements and their blocks' own scales; of the tensor's scale
    m * 2^p, with p within low .. high, they take the 2^p, and m goes to `factor`.

    POISONS: the scale of a tile with a NaN is one; with SETTLES also that of a tile with an inf.

    STRIPS: the tiles are TILE_ROWS x 1, neighbours along the columns, and axis 0 of a patch runs down a tile. Otherwise
    axis 1 of a patch runs through a tile in C order.
    """
    program = tl.program_id(0)
    tiles_down = (rows + TILE_ROWS - 1) // TILE_ROWS
    if STRIPS:
        strips = (columns + TILES - 1) // TILES
        column = (program % strips) * TILES + tl.arange(0, TILES)
        band = (program // strips).to(tl.int64)  # which row of tiles, over all of outer
        down, outer = band % tiles_down, band // tiles_down
        height = tl.minimum(rows - down * TILE_ROWS, TILE_ROWS)
        corner = (outer * rows + down * TILE_ROWS) * columns
        tile_valid = column < columns
        tile = band * columns + column
        down_patch = tl.arange(0, ELEMENTS)[:, None]
        offset = corner + column[None, :].to(tl.int64)
    else:
        tile = program.to(tl.int64) * TILES + tl.arange(0, TILES)
        tiles_across = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS
        tile_valid = tile < outer_tiles * tiles_across
        across = tile % tiles_across
        band = tile // tiles_across
        down, outer = band % tiles_down, band // tiles_down
        height = tl.minimum(rows - down * TILE_ROWS, TILE_ROWS)[:, None]
        width = tl.minimum(columns - across * TILE_COLUMNS, TILE_COLUMNS)[:, None]
        offset = ((outer * rows + down * TILE_ROWS) * columns + across * TILE_COLUMNS)[:, None]
        down_patch = tl.arange(0, ELEMENTS)[None, :]
    AXIS: tl.constexpr = 0 if STRIPS else 1

    largest = tl.zeros((TILES,), tl.uint32)
    finite = tl.zeros((TILES,), tl.uint32)
    v = tl.zeros((ELEMENTS, TILES) if STRIPS else (TILES, ELEMENTS), tl.float32)
    for chunk in range(CHUNKS):
        position = chunk * ELEMENTS + down_patch
        if STRIPS:
            index = offset + position * tl.cast(columns, tl.int64)
            valid = (position < height) & tile_valid[None, :]
        else:
            row, col = position // TILE_COLUMNS, position % TILE_COLUMNS
            index = offset + row * tl.cast(columns, tl.int64) + col
            valid = (row < height) & (col < width) & tile_valid[:, None]
        v = widen(tl.load(x + index, mask=valid, other=0.0))
        found, found_finite = amaxes(v, AXIS)
        largest = tl.where(found > largest, found, largest)
        finite = tl.where(found_finite > finite, found_finite, finite)

    poisoned = largest > (0x7F7FFFFF if SETTLES else 0x7F800000) if POISONS else largest != largest
    raw, multiplier, reciprocal, lift = scale_of(
        finite, poisoned, scale_table, upper, emax, up_from, element_max, smallest, SCALE, TWO_LEVELS
    )
    if PAYLOAD:
        pass  # nobody reads the scales of an operand
    elif SCALE == PLAIN_FLOAT:
        tl.store(scales + tile, multiplier, mask=tile_valid)
    else:
        tl.store(scales + tile, raw.to(scales.dtype.element_ty), mask=tile_valid)
    if not PAYLOAD:
        lift = multiplier
    elif TWO_LEVELS:
        power, significand = pulled_apart(tl.load(upper), low, high)
        lift = lift * power
        if program == 0:
            tl.store(factor, significand)
    if STRIPS:
        multiplier, reciprocal, lift = multiplier[None, :], reciprocal[None, :], lift[None, :]
    else:
        multiplier, reciprocal, lift = multiplier[:, None], reciprocal[:, None], lift[:, None]

    grid = read_grid(element_table, False)
    problem = 0
    amax = tl.full((), 0.0, tl.float64)
    overflows, underflows, nonfinites, errors, squares = amax, amax, amax, amax, amax
    for chunk in range(CHUNKS):
        position = chunk * ELEMENTS + down_patch
        if STRIPS:
            index = offset + position * tl.cast(columns, tl.int64)
            valid = (position < height) & tile_valid[None, :]
        else:
            row, col = position // TILE_COLUMNS, position % TILE_COLUMNS
            index = offset + row * tl.cast(columns, tl.int64) + col
            valid = (row < height) & (col < width) & tile_valid[:, None]
        if CHUNKS > 1:
            v = widen(tl.load(x + index, mask=valid, other=0.0))
        missing, counted = emit(
            v,
            index,
            valid,
            multiplier,
            reciprocal,
            lift,
            out,
            codes,
            key,
            random_bits,
            grid,
            MODE,
            LEAN,
            KEEPS_INF,
            LACKS,
            POISONS,
            ONE_BLOCK,
            SCALE,
            VALUES,
            CODES,
            STATS,
            x.dtype.element_ty,
        )
        if LACKS:
            problem = tl.maximum(problem, missing)
        if STATS:
            amax = tl.maximum(amax, counted[0])
            overflows += counted[1]
            underflows += counted[2]
            nonfinites += counted[3]
            errors += counted[4]
            squares += counted[5]
    if LACKS:
        tl.store(problems + program, problem)
    if STATS:
        store_counts(partials, program, amax, overflows, underflows, nonfinites, errors, squares)


def _patches(layout: BlockLayout, strips: bool) -> tuple[int, int, int]:
    """(tiles per program, elements of a tile per patch, patches per tile); the first two are powers of two."""
    elements = layout.tile_rows * layout.tile_columns
    patch = min(triton.next_power_of_2(elements), 64 if strips else LARGEST_PATCH)
    tiles = max(1, PATCH // patch)
    if strips:
        tiles = min(tiles, max(16, triton.next_power_of_2(layout.columns)))
    return tiles, patch, -(-elements // patch)


def run(
    plan: Plan, x: Tensor, scale: Tensor | None, key: tuple[int, int] | Tensor | None, out: Tensor | None
) -> Quantized:
    """One pass, as `kernels.eager.blocks.run`, bit for bit."""
    return _run(plan, x, scale, key, out, None, None)


def payload(
    plan: Plan, x: Tensor, scale: Tensor | None, key: tuple[int, int] | Tensor | None, powers: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """x rounded as the plan says, as an operand of a tensor core: (element * block's scale * 2^p in bf16, m).

    Args:
        scale: that of the whole tensor, m * 2^p, 0-d float32; None: there is none, nor an m.
        powers: lowest and highest p for which these values are bf16 numbers.
    """
    factor = None if scale is None else torch.empty((), dtype=torch.float32, device=x.device)
    if scale is not None and not x.numel():
        factor = torch.ones((), dtype=torch.float32, device=x.device)
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    return _run(plan, x, scale, key, out, factor, powers).values, factor


def encoded(plan: Plan, x: Tensor, scale: Tensor | None, key: Tensor | None) -> tuple[Tensor, Tensor]:
    """(codes, stored scales) of x as a plan for codes says, for somebody who cannot wait to hear that something has no code.

    Such an inf becomes NaN, by its own code or by its block's scale, as a NaN does. scale: as for `payload`.
    """
    found = _run(plan, x, scale, key, None, None, None, settles=True)
    return found.codes, found.scales


def _run(
    plan: Plan,
    x: Tensor,
    scale: Tensor | None,
    key: tuple[int, int] | Tensor | None,
    out: Tensor | None,
    factor: Tensor | None,
    powers: tuple[int, int] | None,
    settles: bool = False,
) -> Quantized:
    """`run`, or with powers `payload`, or `encoded`, which `settles`."""
    fmt, element, layout = plan.format, plan.grid, plan.layout(x.shape)
    x = x.contiguous()
    device = x.device
    scales = None if powers else torch.empty(layout.scale_shape, dtype=stored_scale_dtype(fmt), device=device)
    strips = layout.tile_columns == 1 and layout.columns > 1
    tiles, patch, chunks = _patches(layout, strips)
    outer, down, across = layout.grid
    programs = outer * down * -(-layout.columns // tiles) if strips else -(-outer * down * across // tiles)
    found = outputs(plan, x, out, programs)
    found = found._replace(problems=None) if settles else found
    native_inf = plan.overflow is Overflow.NATIVE and element.has_inf
    overflow = Overflow.SATURATE_FINITE if native_inf else plan.overflow
    inf_as_nan = settles and element.has_nan
    lean = not plan.stats and is_lean(element, plan.rounding, overflow, plan.random_bits, False)
    rounded_scale = not (fmt.power_of_two or fmt.has_float_scale)
    scale_grid = fmt.scale_format if rounded_scale else fmt.element
    if x.numel():
        with on_device(x):
            _process[(programs,)](
                x,
                *found,
                scales,
                device_table(
                    element, plan.rounding, plan.overflow, fmt.has_float_scale, False, native_inf, device, inf_as_nan
                ),
                device_table(scale_grid, Rounding.NEAREST_AWAY, Overflow.SATURATE, False, False, False, device),
                scale,
                factor,
                key_tensor(key, device),
                plan.random_bits,
                fmt.element_emax,
                fmt.round_up_from(23),
                float(np.float32(fmt.element.max)),
                fmt.scale_format.min_subnormal if rounded_scale else 0.0,
                *(powers or (0, 0)),
                outer * down,
                layout.rows,
                layout.columns,
                TILE_ROWS=layout.tile_rows,
                TILE_COLUMNS=layout.tile_columns,
                STRIPS=strips,
                TILES=tiles,
                ELEMENTS=patch,
                CHUNKS=chunks,
                MODE=mode_of(
                    element, plan.rounding, overflow if lean else plan.overflow, plan.random_bits, False, lean
                ),
                LEAN=lean,
                KEEPS_INF=overflow is not Overflow.SATURATE,
                LACKS=found.problems is not None,
                POISONS=not element.has_nan,
                SETTLES=settles and overflow is not Overflow.SATURATE,
                ONE_BLOCK=x.numel() <= 2**32,
                SCALE=POWER_OF_TWO if fmt.power_of_two else PLAIN_FLOAT if fmt.has_float_scale else ROUNDED,
                TWO_LEVELS=scale is not None,
                VALUES=plan.values,
                CODES=plan.codes,
                STATS=plan.stats,
                PAYLOAD=powers is not None,
                enable_fp_fusion=False,
            )
    return collected(found, out, x.numel(), scales, scale)


@triton.jit
def _decode(
    codes,
    scales,
    values,
    out,
    count,
    rows,
    columns,
    tiles_down,
    tiles_across,
    last,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """ELEMENTS neighbouring elements: a table's value times the multiplier of their tile; NaN of no code 0 .. last."""
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = index < count
    line, column = index // columns, index % columns
    outer, row = line // rows, line % rows
    tile = (outer * tiles_down + row // TILE_ROWS) * tiles_across + column // TILE_COLUMNS
    code = tl.load(codes + index, mask=valid, other=0).to(tl.int64)
    value = tl.load(values + code, mask=(code >= 0) & (code <= last), other=float("nan"))
    value = value * tl.load(scales + tile, mask=valid, other=0.0)
    tl.store(out + index, narrow(value, out.dtype.element_ty), mask=valid)


def decode(plan: Plan, codes: Tensor, scale: Tensor, upper: Tensor | None, out: Tensor | None) -> Tensor:
    """Element values times their block's multiplier; as `kernels.eager.blocks.decode`, bit for bit."""
    scale = scale_values(scale, plan.format, upper).contiguous()
    codes, layout = codes.contiguous(), plan.layout(codes.shape)
    direct = out is not None and out.is_contiguous()
    written = out if direct else torch.empty(codes.shape, dtype=plan.dtype, device=codes.device)
    values = value_tensor(plan.format.element, torch.float32, codes.device)
    _, down, across = layout.grid
    if codes.numel():
        with on_device(codes):
            _decode[(-(-codes.numel() // PATCH),)](
                codes,
                scale,
                values,
                written,
                codes.numel(),
                layout.rows,
                layout.columns,
                down,
                across,
                len(values) - 1,
                TILE_ROWS=layout.tile_rows,
                TILE_COLUMNS=layout.tile_columns,
                ELEMENTS=PATCH,
                enable_fp_fusion=False,
            )
    return written if out is None or direct else out.copy_(written)
