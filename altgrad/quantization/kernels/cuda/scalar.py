"""The CUDA kernel: one fused pass over a tensor in Triton, for scalar formats.

Tested on a CPU through Triton's interpreter (`TRITON_INTERPRET=1` before the first import), which then also takes CPU
tensors. Division is IEEE division (`div_rn`) and fused multiply-add is switched off, so results have the CPU's bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.formats.rounding import Overflow
from altgrad.jit.grid_table import float32_arithmetic_suffices
from altgrad.quantization.codec import value_tensor
from altgrad.quantization.kernels.cuda.bits import (
    STOCHASTIC,
    code_of,
    count,
    divisor_of,
    float_of,
    key_words,
    lean_code,
    lean_finite,
    lean_problem,
    lean_quotient,
    lean_round,
    narrow,
    random_words,
    read_grid,
    round_element,
    signed_as,
    store_counts,
    widen,
)
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

READS_ANY_CODE = True  # NaN where a number is no code: checking them would wait for the device
ELEMENTS = 4096  # per program: 32 for a thread, which the preparations are divided by


@triton.jit
def _process(
    x,
    out,
    codes,
    problems,
    partials,
    scales,
    table,
    key,
    random_bits,
    size,
    inner,
    channels,
    MODE: tl.constexpr,
    LEAN: tl.constexpr,
    KEEPS_INF: tl.constexpr,
    LACKS: tl.constexpr,
    WIDE: tl.constexpr,
    DOUBLE: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    VALUES: tl.constexpr,
    CODES: tl.constexpr,
    STATS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """ELEMENTS neighbouring elements, a divisor of 2^32: one block of the random words."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * ELEMENTS
    offset = tl.arange(0, ELEMENTS)
    index = start + offset
    valid = index < size
    grid = read_grid(table, WIDE)
    v = widen(tl.load(x + index, mask=valid, other=0.0))
    word = offset.to(tl.uint32)
    if MODE >= STOCHASTIC:
        before, between = key_words(key, (start >> 32).to(tl.uint64))
        word = random_words(start.to(tl.uint32) + word, before, between)
    scale = tl.load(scales) if ONE_SCALE else tl.load(scales + (index // inner) % channels, mask=valid, other=1.0)
    if LEAN:
        y = lean_quotient(v, divisor_of(scale)) if ONE_SCALE else tl.math.div_rn(tl.abs(v), scale)
        magnitude, steps = lean_round(y, word, grid, MODE)
        if VALUES:
            result = tl.where(lean_finite(v, KEEPS_INF), signed_as(magnitude, v), v) * scale
            tl.store(out + index, narrow(result, out.dtype.element_ty), mask=valid)
        if CODES:
            code = lean_code(steps, v, grid, KEEPS_INF)
            tl.store(codes + index, code.to(codes.dtype.element_ty), mask=valid)
            if LACKS:
                tl.store(problems + program, lean_problem(v, grid, KEEPS_INF))
    else:
        y = v / scale if DOUBLE else tl.math.div_rn(v, scale + tl.zeros_like(v))
        wide_v = v.to(tl.float64) if WIDE else v
        wide_y = y.to(tl.float64) if WIDE else y
        payload, over = round_element(wide_v, wide_y, word, random_bits, grid, MODE, WIDE)
        result = float_of(payload, WIDE).to(v.dtype) * scale
        if VALUES:
            tl.store(out + index, narrow(result, out.dtype.element_ty), mask=valid)
        if CODES:
            code, problem = code_of(payload, grid, WIDE)
            tl.store(codes + index, code.to(codes.dtype.element_ty), mask=valid)
            if LACKS:
                tl.store(problems + program, tl.max(tl.where(valid, problem, problem * 0).to(tl.int32)))
        if STATS:
            kept = widen(narrow(result, x.dtype.element_ty))
            amax, overflows, underflows, nonfinites, errors, squares = count(v, kept, over, valid, over & False)
            store_counts(partials, program, amax, overflows, underflows, nonfinites, errors, squares)


@triton.jit
def _decode(
    codes,
    out,
    scales,
    values,
    size,
    last,
    inner,
    channels,
    ONE_SCALE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """scale * value of codes 0 .. last, and NaN of any other."""
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = index < size
    code = tl.load(codes + index, mask=valid, other=0).to(tl.int64)
    scale = tl.load(scales) if ONE_SCALE else tl.load(scales + (index // inner) % channels, mask=valid, other=1.0)
    value = tl.load(values + code, mask=(code >= 0) & (code <= last), other=float("nan"))
    tl.store(out + index, narrow(value * scale, out.dtype.element_ty), mask=valid)


def _scales(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> tuple[Tensor, int, int]:
    """(scales, inner, channels): element i in C order of x has scales[i // inner % channels]."""
    if not isinstance(scale, Tensor):
        return torch.full((1,), scale, dtype=dtype, device=x.device), 1, 1
    scale = scale.to(device=x.device, dtype=dtype)
    if scale.numel() == 1 or not x.numel():
        return scale.reshape(-1), 1, 1
    lead = x.ndim - scale.ndim
    axes = [lead + d for d, n in enumerate(scale.shape) if n > 1]
    if axes == list(range(axes[0], axes[-1] + 1)):
        inner = 1
        for n in x.shape[axes[-1] + 1 :]:
            inner *= n
        return scale.contiguous(), inner, scale.numel()
    return scale.expand(x.shape).contiguous(), 1, max(x.numel(), 1)


def run(
    plan: Plan, x: Tensor, scale: Tensor | float, key: tuple[int, int] | Tensor | None, out: Tensor | None
) -> Quantized:
    """One pass: values, codes and statistics, as the plan wants them; arguments as `cpu.scalar.run`."""
    fmt, rounding, overflow = plan.grid, plan.rounding, plan.overflow
    double = x.dtype == torch.float64
    wide = double or not float32_arithmetic_suffices(fmt)
    lean = not plan.stats and is_lean(fmt, rounding, overflow, plan.random_bits, wide)
    source = x.contiguous()
    size = source.numel()
    programs = -(-size // ELEMENTS)
    found = outputs(plan, source, out, programs)
    scales, inner, channels = _scales(source, scale, plan.compute_dtype)
    if size:
        with on_device(source):
            _process[(programs,)](
                source,
                *found,
                scales,
                device_table(fmt, rounding, overflow, plan.clamp, wide, False, x.device),
                key_tensor(key, x.device),
                plan.random_bits,
                size,
                inner,
                channels,
                MODE=mode_of(fmt, rounding, overflow, plan.random_bits, wide, lean),
                LEAN=lean,
                KEEPS_INF=overflow is not Overflow.SATURATE,
                LACKS=found.problems is not None,
                WIDE=wide,
                DOUBLE=double,
                ONE_SCALE=scales.numel() == 1,
                VALUES=plan.values,
                CODES=plan.codes,
                STATS=plan.stats,
                ELEMENTS=ELEMENTS,
                enable_fp_fusion=False,
            )
    return collected(found, out, size)


def decode(plan: Plan, codes: Tensor, scale: Tensor | float, upper: None, out: Tensor | None) -> Tensor:
    """scale * value(code) in the plan's dtype; as `cpu.scalar.decode`."""
    source = codes.contiguous()
    fits = out is not None and out.is_contiguous()
    target = out if fits else torch.empty_like(source, dtype=plan.dtype)
    size = source.numel()
    scales, inner, channels = _scales(source, scale, plan.compute_dtype)
    if size:
        values = value_tensor(plan.format, plan.compute_dtype, codes.device)
        with on_device(source):
            _decode[(-(-size // ELEMENTS),)](
                source,
                target,
                scales,
                values,
                size,
                len(values) - 1,
                inner,
                channels,
                ONE_SCALE=scales.numel() == 1,
                ELEMENTS=ELEMENTS,
                enable_fp_fusion=False,
            )
    return target if out is None or target is out else out.copy_(target)
