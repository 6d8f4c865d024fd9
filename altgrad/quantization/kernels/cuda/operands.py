"""Operands and results of tensor cores in Triton: a tensor's scale, its payload in 16 bits, and the sums of a product.

    largest       one pass and one small program: the amax of a tensor, or the scale that follows from it
    largest_of_channels   the same of each row of a matrix (one pass), or of each column (and one small program)
    roll          one small program: a step's amax into the history of a delayed scale, and the next scale, all in place
    payload       one pass: x rounded to the grid, as payload * 2^p in bf16 or float16; nothing in float32 is written or
                  read again
    finished      one pass over a product's float32 sums: times both operands' factors, plus the bias, in the output's dtype

Nothing here waits for the device. Magnitudes are compared as unsigned integers, so a maximum does not depend on the order
that programs come in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.formats.rounding import Overflow
from altgrad.jit.grid_table import special_codes
from altgrad.quantization.kernels.cuda.bits import (
    STOCHASTIC,
    balanced,
    finite_bits,
    key_words,
    lean_problem,
    narrow,
    pulled_apart,
    random_words,
    read_grid,
    rounded,
    widen,
)
from altgrad.quantization.kernels.cuda.launch import device_table, is_lean, key_tensor, mode_of, on_device
from altgrad.quantization.plan import Plan
from altgrad.quantization.powers import factor_of

ELEMENTS = 4096  # per program
MOST_PARTIALS = 1024  # programs of `largest`: the small program that ends it reads as many numbers
FINISHED = 1024  # elements of a row for each program of `finished`


@triton.jit
def _largest(x, partials, size, stride, ELEMENTS: tl.constexpr):
    """The bits of the largest finite magnitude of every `stride`-th piece of ELEMENTS elements."""
    program = tl.program_id(0)
    offset = tl.arange(0, ELEMENTS)
    found = tl.zeros((ELEMENTS,), tl.uint32)
    for start in range(program.to(tl.int64) * ELEMENTS, size, tl.cast(stride, tl.int64)):
        v = widen(tl.load(x + start + offset, mask=start + offset < size, other=0.0))
        found = tl.maximum(found, finite_bits(v))
    tl.store(partials + program, tl.max(found).to(tl.int32, bitcast=True))


@triton.jit
def _scale_of(amax, divisor, POWER_OF_TWO: tl.constexpr):
    """As `scaling.scale_from_amax`, for formats whose max is `divisor`."""
    scale = tl.math.div_rn(tl.where(amax > 0, amax, 1.0), divisor + amax * 0.0)
    scale = tl.maximum(scale, 1.1754943508222875e-38)
    if POWER_OF_TWO:
        up = (scale.to(tl.uint32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = tl.minimum(up, 0x7F000000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _scale(partials, out, count, divisor, SCALES: tl.constexpr, POWER_OF_TWO: tl.constexpr, PARTIALS: tl.constexpr):
    """The largest of the partials, or the scale that follows from it."""
    index = tl.arange(0, PARTIALS)
    bits = tl.load(partials + index, mask=index < count, other=0).to(tl.uint32, bitcast=True)
    amax = tl.max(bits).to(tl.float32, bitcast=True)
    tl.store(out, _scale_of(amax, divisor, POWER_OF_TWO) if SCALES else amax)


def largest(x: Tensor, fmt_max: float | None = None, power_of_two: bool = False) -> Tensor:
    """Largest finite magnitude of a float32, bf16 or fp16 tensor, 0-d float32; with a format's max, the scale from it."""
    source, size = x.contiguous(), x.numel()
    out = torch.empty((), dtype=torch.float32, device=x.device)
    pieces = -(-size // ELEMENTS)
    programs = min(pieces, MOST_PARTIALS)
    partials = torch.empty(max(programs, 1), dtype=torch.int32, device=x.device)
    with on_device(x):
        if size:
            _largest[(programs,)](source, partials, size, programs * ELEMENTS, ELEMENTS=ELEMENTS)
        _scale[(1,)](
            partials,
            out,
            programs,
            float(fmt_max or 1.0),
            SCALES=fmt_max is not None,
            POWER_OF_TWO=power_of_two,
            PARTIALS=MOST_PARTIALS,
            enable_fp_fusion=False,
        )
    return out


CHANNELS, ALONG = 32, 128  # of a patch of a matrix whose rows, or columns, are channels
MOST_PIECES = 64  # that the columns of a matrix are cut into, each for one program


@triton.jit
def _largest_of_rows(
    x,
    out,
    rows,
    columns,
    divisor,
    SCALES: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALONG: tl.constexpr,
):
    """The amax of each of CHANNELS rows, or the scale that follows from it."""
    row = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    step = tl.arange(0, ALONG)
    found = tl.zeros((CHANNELS,), tl.uint32)
    for start in range(0, columns, ALONG):
        column = start + step
        place = row[:, None].to(tl.int64) * columns + column[None, :]
        valid = (row < rows)[:, None] & (column < columns)[None, :]
        found = tl.maximum(found, tl.max(finite_bits(widen(tl.load(x + place, mask=valid, other=0.0))), 1))
    amax = found.to(tl.float32, bitcast=True)
    tl.store(out + row, _scale_of(amax, divisor, POWER_OF_TWO) if SCALES else amax, mask=row < rows)


@triton.jit
def _largest_of_columns(x, partials, rows, columns, piece, CHANNELS: tl.constexpr, ALONG: tl.constexpr):
    """The bits of the largest finite magnitude of ALONG columns in one piece of so many rows."""
    column = tl.program_id(0) * ALONG + tl.arange(0, ALONG)
    first = tl.program_id(1).to(tl.int64) * piece
    step = tl.arange(0, CHANNELS)
    found = tl.zeros((ALONG,), tl.uint32)
    for start in range(0, piece, CHANNELS):
        row = first + start + step
        place = row[:, None] * columns + column[None, :]
        valid = ((start + step < piece) & (row < rows))[:, None] & (column < columns)[None, :]
        found = tl.maximum(found, tl.max(finite_bits(widen(tl.load(x + place, mask=valid, other=0.0))), 0))
    place = tl.program_id(1).to(tl.int64) * columns + column
    tl.store(partials + place, found.to(tl.int32, bitcast=True), mask=column < columns)


@triton.jit
def _scales(
    partials, out, pieces, columns, divisor, SCALES: tl.constexpr, POWER_OF_TWO: tl.constexpr, ALONG: tl.constexpr
):
    """The amax of each column from those of its pieces, or the scale that follows from it."""
    column = tl.program_id(0) * ALONG + tl.arange(0, ALONG)
    found = tl.zeros((ALONG,), tl.int32)
    for piece in range(pieces):
        found = tl.maximum(found, tl.load(partials + piece * columns + column, mask=column < columns, other=0))
    amax = found.to(tl.float32, bitcast=True)
    tl.store(out + column, _scale_of(amax, divisor, POWER_OF_TWO) if SCALES else amax, mask=column < columns)


def largest_of_channels(x: Tensor, axis: int, fmt_max: float | None = None, power_of_two: bool = False) -> Tensor:
    """`largest` of each row (axis 0) or column (axis 1) of a matrix: float32, [rows, 1] or [1, columns]."""
    (rows, columns), source = x.shape, x.contiguous()
    out = torch.empty((rows, 1) if axis == 0 else (1, columns), dtype=torch.float32, device=x.device)
    facts = {"SCALES": fmt_max is not None, "POWER_OF_TWO": power_of_two, "ALONG": ALONG, "enable_fp_fusion": False}
    divisor = float(fmt_max or 1.0)
    if not out.numel():
        return out
    with on_device(x):
        if axis == 0:
            _largest_of_rows[(-(-rows // CHANNELS),)](source, out, rows, columns, divisor, CHANNELS=CHANNELS, **facts)
            return out
        pieces = max(1, min(-(-rows // CHANNELS), MOST_PIECES))
        strips, piece = -(-columns // ALONG), -(-rows // pieces)
        partials = torch.empty((pieces, columns), dtype=torch.int32, device=x.device)
        _largest_of_columns[(strips, pieces)](source, partials, rows, columns, piece, CHANNELS=CHANNELS, ALONG=ALONG)
        _scales[(strips,)](partials, out, pieces, columns, divisor, **facts)
    return out


@triton.jit
def _roll(window, pending, scale, history, divisor, headroom, POWER_OF_TWO: tl.constexpr, ENTRIES: tl.constexpr):
    """`pending`, unless it is negative, in front of the window, the scale of the largest there times `headroom`."""
    entry = tl.arange(0, ENTRIES)
    valid = entry < history
    seen = tl.load(pending)
    before = tl.load(window + entry, mask=valid, other=0.0)
    rolled = tl.where(entry == 0, seen, tl.load(window + entry - 1, mask=valid & (entry > 0), other=0.0))
    rolled = tl.where(seen >= 0, rolled, before)
    tl.debug_barrier()  # all have read what is written now
    tl.store(window + entry, rolled, mask=valid)
    tl.store(pending, seen * 0.0 - 1.0)
    tl.store(scale, _scale_of(tl.max(tl.where(valid, rolled, 0.0)) * headroom, divisor, POWER_OF_TWO))


def roll(window: Tensor, pending: Tensor, scale: Tensor, fmt_max: float, margin: int, power_of_two: bool) -> None:
    """Close a step of a delayed scale in place: `pending` enters the history if it is an amax, and becomes -1.

    Args:
        window: float32 [history], newest first, with -1 where no step was yet. pending, scale: 0-d float32; the scale
            is that of the next step.
        margin: binary digits of headroom.
    """
    with on_device(window):
        _roll[(1,)](
            window,
            pending,
            scale,
            len(window),
            float(fmt_max),
            2.0**margin,
            POWER_OF_TWO=power_of_two,
            ENTRIES=triton.next_power_of_2(len(window)),
            enable_fp_fusion=False,
        )


@triton.jit
def _payload(
    x,
    out,
    codes,
    poison,
    factor,
    amax,
    scale,
    number,
    table,
    key,
    random_bits,
    size,
    inner,
    channels,
    low,
    high,
    MODE: tl.constexpr,
    LEAN: tl.constexpr,
    KEEPS_INF: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLLECTS: tl.constexpr,
    VALUES: tl.constexpr,
    CODES: tl.constexpr,
    LACKS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """payload * 2^p of ELEMENTS neighbouring elements; scale = m * 2^p with p within low .. high, m goes to `factor`.

    ON_DEVICE: the scale is read from memory, else it is `number`. CHANNELS: element i has scale i // inner % channels, and
    there are as many factors. COLLECTS: raise `amax` to the largest finite magnitude. CODES: their codes, too, or without
    VALUES those alone and no factor. LACKS: `poison` becomes NaN where an element has no code.
    """
    program = tl.program_id(0)
    start = program.to(tl.int64) * ELEMENTS
    offset = tl.arange(0, ELEMENTS)
    valid = start + offset < size
    grid = read_grid(table, False)
    if CHANNELS:
        line = (start + offset) // inner
        s = tl.load(scale + line % channels, mask=valid, other=1.0)
    else:
        s = tl.load(scale) if ON_DEVICE else tl.cast(number, tl.float32)
    up, significand = pulled_apart(s, low, high)
    if not VALUES:
        pass
    elif CHANNELS:
        tl.store(factor + line, significand, mask=valid & (line < channels) & ((start + offset) % inner == 0))
    elif ON_DEVICE and program == 0:
        tl.store(factor, significand)
    v = widen(tl.load(x + start + offset, mask=valid, other=0.0))
    word = offset.to(tl.uint32)
    if MODE >= STOCHASTIC:
        before, between = key_words(key, (start >> 32).to(tl.uint64))
        word = random_words(start.to(tl.uint32) + word, before, between)
    result, code, problem = rounded(v, s, up, word, random_bits, grid, MODE, LEAN, KEEPS_INF, CHANNELS, CODES)
    if VALUES:
        tl.store(out + start + offset, narrow(result, out.dtype.element_ty), mask=valid)
    if CODES:
        tl.store(codes + start + offset, code.to(tl.uint8), mask=valid)
    if LACKS:
        if LEAN:
            missing = lean_problem(v, grid, KEEPS_INF)
        else:
            missing = tl.max(tl.where(valid, problem, problem * 0).to(tl.int32))
        tl.atomic_max(poison, tl.where(missing > 0, 0x7FC00000, 0))
    if COLLECTS:
        tl.atomic_max(amax, tl.max(finite_bits(v)).to(tl.int32, bitcast=True))


class Payload(NamedTuple):
    """An operand of a tensor core: x is about values * factor.

    values: payload * 2^p, bf16 or float16, of x's shape; a NaN or inf stands where it stood. factor: the m of the scale m * 2^p,
    float32 of its shape; None where it is 1. scale: as given, or as found. codes: uint8, where they were asked for. poison: what
    is added to what codes are decoded to, NaN where an element has none, else 0; None where every NaN has a code.
    """

    values: Tensor | None
    factor: Tensor | None
    scale: Tensor | float
    codes: Tensor | None = None
    poison: Tensor | None = None


def payload(
    plan: Plan,
    x: Tensor,
    scale: Tensor | float,
    powers: tuple[int, int],
    *,
    key: Tensor | None = None,
    amax: Tensor | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    codes: bool = False,
) -> Payload:
    """x rounded as the plan says, as an operand of a tensor core.

    Args:
        scale: a number, or a float32 tensor of one element or, of a matrix, of one for each row or column.
        powers: lowest and highest p for which the format's values times 2^p are numbers of `dtype`, bf16 or float16.
        amax: 0-d float32 that is raised to x's largest finite magnitude, in place.
        dtype: None: no values are made, nor a factor.
        codes: whether codes are made, too. An inf that the policy lets pass, and that has no code, has that of NaN.
    """
    source = x.contiguous()
    made = Payload(
        None if dtype is None else torch.empty(x.shape, dtype=dtype, device=x.device),
        None if dtype is None else factor_like(scale, powers, x),
        scale,
        torch.empty(x.shape, dtype=torch.uint8, device=x.device) if codes else None,
        torch.zeros((), device=x.device) if codes and special_codes(plan.grid)[1] < 0 else None,
    )
    _rounded(plan, source, made, powers, key, amax)
    return made


def factor_like(scale: Tensor | float, powers: tuple[int, int], x: Tensor) -> Tensor | None:
    """Room for the factors of a scale of x on the device, or the factor of a number."""
    if not isinstance(scale, Tensor):
        return factor_of(scale, powers, x.device)
    return (torch.empty if x.numel() else torch.ones)(scale.shape, dtype=torch.float32, device=x.device)


def codes(
    plan: Plan, x: Tensor, scale: Tensor | float, *, key: Tensor | None = None, amax: Tensor | None = None
) -> Tensor:
    """The codes of x rounded as the plan says, uint8 of x's shape; arguments as for `payload`."""
    return payload(plan, x, scale, (0, 0), key=key, amax=amax, dtype=None, codes=True).codes


def lines_of(scale: Tensor | float, shape: torch.Size) -> tuple[int, int]:
    """(inner, channels): element i of a matrix has scale i // inner % channels."""
    if not isinstance(scale, Tensor) or scale.numel() == 1:
        return 1, 1
    return (shape[1] if scale.shape[1] == 1 else 1), scale.numel()


def _rounded(
    plan: Plan, source: Tensor, made: Payload, powers: tuple[int, int], key: Tensor | None, amax: Tensor | None
) -> None:
    """Launch `_payload` into what was made for it."""
    fmt, rounding, overflow = plan.grid, plan.rounding, plan.overflow
    size, scale, on_host = source.numel(), made.scale, not isinstance(made.scale, Tensor)
    inner, channels = lines_of(scale, source.shape)
    lean = is_lean(fmt, rounding, overflow, plan.random_bits, False)
    if not size:
        return
    with on_device(source):
        _payload[(-(-size // ELEMENTS),)](
            source,
            made.values,
            made.codes,
            None if made.poison is None else made.poison.view(torch.int32),
            made.factor,
            None if amax is None else amax.view(torch.int32),
            None if on_host else scale,
            scale if on_host else 1.0,
            device_table(fmt, rounding, overflow, plan.clamp, False, False, source.device, made.poison is None),
            key_tensor(key, source.device),
            plan.random_bits,
            size,
            inner,
            channels,
            *powers,
            MODE=mode_of(fmt, rounding, overflow, plan.random_bits, False, lean),
            LEAN=lean,
            KEEPS_INF=overflow is not Overflow.SATURATE,
            ON_DEVICE=not on_host,
            CHANNELS=channels > 1,
            COLLECTS=amax is not None,
            VALUES=made.values is not None,
            CODES=made.codes is not None,
            LACKS=made.poison is not None,
            ELEMENTS=ELEMENTS,
            enable_fp_fusion=False,
        )


@triton.jit
def _finished(
    sums,
    out,
    of_a,
    of_b,
    bias,
    columns,
    a_step,
    b_step,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """A piece of a row: (sums * a) * b + bias, each step rounded; a_step, b_step: 0 for one factor, 1 for one a row or column.

    HAS_A, HAS_B: whether there is that factor; of two no order of them matters to what overflows (`bits.balanced`).
    """
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = column < columns
    place = row * tl.cast(columns, tl.int64) + column
    v = tl.load(sums + place, mask=valid, other=0.0)
    if HAS_A and HAS_B:
        first, second = balanced(tl.load(of_a + row * a_step), tl.load(of_b + column * b_step, mask=valid, other=1.0))
        v = (v * first) * second
    elif HAS_A:
        v = v * tl.load(of_a + row * a_step)
    elif HAS_B:
        v = v * tl.load(of_b + column * b_step, mask=valid, other=1.0)
    if HAS_BIAS:
        v = v + widen(tl.load(bias + column, mask=valid, other=0.0))
    tl.store(out + place, narrow(v, out.dtype.element_ty), mask=valid)


def epilogue(a: Tensor | None, b: Tensor | None, bias: Tensor | None) -> dict[str, object]:
    """Arguments of a kernel that ends as `_finished` does: factors, their steps, and which of them there are."""

    def step(factor: Tensor | None) -> int:
        return 0 if factor is None or factor.numel() == 1 else 1

    return {
        "of_a": a,
        "of_b": b,
        "bias": None if bias is None else bias.contiguous(),
        "a_step": step(a),
        "b_step": step(b),
        "HAS_A": a is not None,
        "HAS_B": b is not None,
        "HAS_BIAS": bias is not None,
    }


def finished(sums: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(sums * a) * b + bias in `dtype`; float32 is written over the sums.

    Args:
        sums: float32 [..., rows, columns], contiguous.
        a, b: one factor each, or of one matrix one for each row (a) or column (b).
        bias: [columns].
    """
    columns = sums.shape[-1]
    rows = sums.numel() // columns if columns else 0
    out = sums if dtype == torch.float32 else torch.empty_like(sums, dtype=dtype)
    if rows:
        with on_device(sums):
            _finished[(rows, -(-columns // FINISHED))](
                sums, out, columns=columns, **epilogue(a, b, bias), ELEMENTS=FINISHED, enable_fp_fusion=False
            )
    return out
