"""The CPU kernel: one fused pass over a tensor's memory, compiled by Numba on first use.

This module is the torch side: it finds a memory order to walk, describes the scale to the loop, allocates results and
nothing else. The arithmetic is in `jit.grid_rounding`, the loops are in `kernels.cpu.loops`, threads in `jit.threads`; those import
Numba and are loaded on first use.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import SETTLED_ALIKE, family_of, float32_arithmetic_suffices, grid_table, settles_plainly
from altgrad.quantization.codec import code_dtype, value_table
from altgrad.quantization.quantized import Outputs

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as cpu_llvm names them
_STATS_FIELDS = 7
_NO_KEY = (0, 0)


@cache
def _machinery():
    from altgrad.jit import threads as cpu_threads
    from altgrad.quantization.kernels.cpu import loops as cpu_loops

    return cpu_loops, cpu_threads.run


@cache
def _plan(
    fmt: FloatFormat,
    rounding: Rounding,
    overflow: Overflow,
    clamp: bool,
    random_bits: int,
    dtype: torch.dtype,
    values: bool,
    codes: bool,
    stats: bool,
) -> tuple:
    """(runner, address of the loop, address of its table, code dtype) for one set of options."""
    loops, run = _machinery()
    wide = dtype == torch.float64 or not float32_arithmetic_suffices(fmt)
    plain = not stats and settles_plainly(fmt, rounding, overflow)
    family = family_of(fmt, rounding, overflow, random_bits, wide, plain)
    code_bytes = code_dtype(fmt).itemsize if codes else 0
    loop = loops.compiled(
        loops.Variant(_KINDS[dtype], int(family), wide, values, code_bytes, stats, plain and family in SETTLED_ALIKE)
    )
    table = grid_table(fmt, rounding, overflow, clamp, random_bits, wide)
    return run, loop, table.ctypes.data, code_dtype(fmt)


def is_dense(x: Tensor) -> bool:
    """Whether x's elements fill one stretch of memory, each once, in any order of its axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _scale_layout(source: Tensor, scale: Tensor | float) -> tuple[Tensor | None, float, int, int]:
    """(scales, scale, inner, channels): element i in memory order has scales[i // inner % channels]."""
    count = source.numel()
    if not isinstance(scale, Tensor):
        return None, scale, count, 1
    if scale.numel() == 1:
        return scale, 1.0, count, 1
    axes = [d - scale.ndim for d, n in enumerate(scale.shape) if n > 1]
    last = axes[-1]
    adjacent = axes == list(range(axes[0], last + 1)) and source.is_contiguous()
    if len(axes) == 1 or adjacent:
        return scale.contiguous(), 1.0, source.stride(last), scale.numel()
    spread = torch.empty_like(source, dtype=scale.dtype).copy_(scale)
    return spread, 1.0, 1, count


def process(
    x: Tensor,
    fmt: FloatFormat,
    scale: Tensor | float,
    *,
    rounding: Rounding,
    overflow: Overflow,
    key: tuple[int, int] | None = None,
    random_bits: int = 24,
    clamp: bool = False,
    out: Tensor | None = None,
    values: bool = True,
    codes: bool = False,
    stats: bool = False,
) -> Outputs:
    """One pass: quantized values, codes and statistics, as asked for.

    Args:
        x: CPU tensor of a dtype that holds `fmt` (checked by the caller, as is all else).
        scale: a float, or a tensor of x's compute dtype that broadcasts to x.
        key: (seed, stream) as signed 64-bit integers, for stochastic rounding.
        out: where the values go; x's shape and dtype; may be x.
    """
    run, loop, table, codes_dtype = _plan(fmt, rounding, overflow, clamp, random_bits, x.dtype, values, codes, stats)
    source = x
    if not x.is_contiguous() and (key is not None or not is_dense(x)):
        source = x.contiguous()  # random bits belong to elements in logical order
    target = coded = partials = result = None
    if values:
        fits = out is not None and out.stride() == source.stride()
        target = out if fits else torch.empty_like(source)
    if codes:
        coded = torch.empty_like(source, dtype=codes_dtype)
    count = source.numel()
    if stats:
        loops = _machinery()[0]
        tiles = -(-count // loops.STATS_TILE)
        partials = torch.empty(tiles * loops.PARTIAL_BYTES // 8, dtype=torch.float64)
        result = torch.empty(_STATS_FIELDS, dtype=torch.float64)
    problems = 0
    if count:
        scales, number, inner, channels = _scale_layout(source, scale)
        seed, stream = key or _NO_KEY
        problems = run(
            loop,
            count,
            table,
            source.data_ptr(),
            0 if target is None else target.data_ptr(),
            0 if coded is None else coded.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            number,
            inner,
            channels,
            seed,
            stream,
            0 if partials is None else partials.data_ptr(),
        )
    if stats:
        loops.total(partials.data_ptr(), tiles, count, result.data_ptr())
    if out is not None and target is not out:
        out.copy_(target)
        target = out
    return Outputs(target, coded, result, problems)


def decode(codes: Tensor, fmt: FloatFormat, scale: Tensor | float, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """scale * value(code) in `dtype`; the codes (uint8 or int32, in range) and the scale are the caller's to check."""
    loops, run = _machinery()
    source = codes if codes.is_contiguous() or is_dense(codes) else codes.contiguous()
    if source.dtype not in (torch.uint8, torch.int32):
        source = source.to(torch.int32)
    fits = out is not None and out.stride() == source.stride()
    target = out if fits else torch.empty_like(source, dtype=dtype)
    count = source.numel()
    if count:
        table, entries = _decoding_table(fmt, dtype == torch.float64)
        loop = loops.compiled_decode(loops.DecodeVariant(_KINDS[dtype], source.dtype.itemsize))
        scales, number, inner, channels = _scale_layout(source, scale)
        run(
            loop,
            count,
            table,
            source.data_ptr(),
            target.data_ptr(),
            0,
            0 if scales is None else scales.data_ptr(),
            number,
            inner,
            channels,
            entries,
            0,
            0,
        )
    if out is not None and target is not out:
        out.copy_(target)
        return out
    return target


@cache
def _decoding_table(fmt: FloatFormat, wide: bool) -> tuple[int, int]:
    values = value_table(fmt).astype("float64" if wide else "float32")
    _tables.append(values)
    return values.ctypes.data, len(values)


_tables: list = []  # decoding tables live as long as the process: loops hold their addresses


def amax(x: Tensor) -> Tensor:
    """Largest finite magnitude of a whole tensor, 0-d, float32 (float64 for float64); 0 if there is none."""
    loops, run = _machinery()
    source = x if x.is_contiguous() or is_dense(x) else x.contiguous()
    count = source.numel()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not count:
        return torch.zeros((), dtype=dtype)
    partials = torch.empty(-(-count // loops.STATS_TILE), dtype=torch.float64)
    loop = loops.compiled_amax(loops.AmaxVariant(_KINDS[x.dtype]))
    run(loop, count, 0, source.data_ptr(), 0, 0, 0, 0.0, 0, 0, 0, 0, partials.data_ptr())
    return partials.amax().to(dtype)
