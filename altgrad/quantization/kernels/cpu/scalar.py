"""The CPU kernel: one fused pass over a tensor's memory, compiled by Numba on first use.

This module is the torch side: it finds a memory order to walk, describes the scale to the loop, allocates results and
nothing else. The arithmetic is in `jit.grid_rounding`, the loops are in `kernels.cpu.loops`, threads in `jit.threads`;
those import Numba and are loaded on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import SETTLED_ALIKE, family_of, float32_arithmetic_suffices, grid_table, settles_plainly
from altgrad.jit.storage import KINDS
from altgrad.jit.subnormals import gradual_underflow
from altgrad.quantization.codec import code_dtype, value_table
from altgrad.quantization.plan import Plan
from altgrad.quantization.quantized import Quantized
from altgrad.quantization.stats import FIELDS, QuantStats

_NO_KEY = (0, 0)
_tuple = tuple.__new__  # as `Quantized(...)`, at half its cost
COUNTS_PAYLOADS = True  # an overflow of the last step, scale * payload in the tensor's own dtype, is not counted
ONE_THREAD = 4096  # elements below which no driver is asked on how many threads to run


@cache
def _machinery():
    """(the loops, what drives them on torch's threads, their driver on this thread), which import Numba."""
    from altgrad.jit import threads
    from altgrad.quantization.kernels.cpu import loops

    assert ONE_THREAD <= 2 * threads.ELEMENTS_PER_THREAD
    return loops, threads, threads.run_range()


def prepare(plan: Plan) -> tuple:
    """(address of the loop, address of its table, code dtype, the driver on this thread), kept in the plan."""
    loops, _, run_here = _machinery()
    fmt, rounding, overflow = plan.grid, plan.rounding, plan.overflow
    wide = plan.dtype == torch.float64 or not float32_arithmetic_suffices(fmt)
    plain = not plan.stats and settles_plainly(fmt, rounding, overflow)
    family = family_of(fmt, rounding, overflow, plan.random_bits, wide, plain)
    code_bytes = code_dtype(fmt).itemsize if plan.codes else 0
    alike = plain and family in SETTLED_ALIKE
    loop = loops.compiled(
        loops.Variant(KINDS[plan.dtype], int(family), wide, plan.values or plan.stats, code_bytes, plan.stats, alike)
    )
    table = grid_table(fmt, rounding, overflow, plan.clamp, plan.random_bits, wide)
    plan.prepared = (loop, table.ctypes.data, code_dtype(fmt), run_here)
    return plan.prepared


def _drive(loop: int, *arguments) -> int:
    """As the driver on this thread, on as many as torch uses."""
    *given, _, count = arguments
    return _machinery()[1].run(loop, count, *given)


def is_dense(x: Tensor) -> bool:
    """Whether x's elements fill one stretch of memory, each once, in any order of its axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _scale_layout(source: Tensor, scale: Tensor | float, count: int) -> tuple[Tensor | None, float, int, int]:
    """(scales, scale, inner, channels): element i in memory order has scales[i // inner % channels]."""
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


def run(plan: Plan, x: Tensor, scale: Tensor | float, key: tuple[int, int] | None, out: Tensor | None) -> Quantized:
    """One pass: values, codes and statistics, as the plan wants them.

    Args:
        x: CPU tensor (the plan has checked its dtype; the caller all else).
        scale: a float, or a tensor of x's compute dtype that broadcasts to x.
        key: (seed, stream) as signed 64-bit integers, where the plan draws.
        out: where the values go; x's shape and dtype; may be x.
    """
    loop, table, code_kind, run_here = plan.prepared or prepare(plan)
    source = x
    if not x.is_contiguous() and (plan.draws or not is_dense(x)):
        source = x.contiguous()  # random bits belong to elements in logical order
    target = coded = partials = stats = None
    target_address = coded_address = partials_address = problems = 0
    if plan.values:
        target = out if out is not None and out.stride() == source.stride() else torch.empty_like(source)
        target_address = target.data_ptr()
    if plan.codes:
        coded = torch.empty_like(source, dtype=code_kind)
        coded_address = coded.data_ptr()
    count = source.numel()
    if plan.stats:
        partials, stats = _sums(count)
        partials_address = partials.data_ptr()
    if count:
        scales, scales_address, number, inner, channels = None, 0, scale, count, 1
        if type(scale) is not float:
            scales, number, inner, channels = _scale_layout(source, scale, count)
            scales_address = 0 if scales is None else scales.data_ptr()
        seed, stream = key or _NO_KEY
        drive = run_here if count < ONE_THREAD else _drive
        problems = drive(
            loop,
            table,
            source.data_ptr(),
            target_address,
            coded_address,
            scales_address,
            number,
            inner,
            channels,
            seed,
            stream,
            partials_address,
            0,
            count,
        )
    if stats is not None:
        assert partials is not None
        _machinery()[0].total(partials_address, len(partials), count, stats.data_ptr())
        stats = QuantStats(stats)
    if out is not None and target is not out:
        assert target is not None
        target = out.copy_(target)
    return _tuple(Quantized, (target, coded, None, stats, None, problems))


def encode_by_amax(
    plan: Plan, x: Tensor, power_of_two: bool, scale_of: Callable[[float, float, bool], float]
) -> tuple[Tensor, float, int] | None:
    """(codes, scale, problems) of x by its amax; None for an empty one. In one compiled call where torch's threads
    can be had there.

    Args:
        plan: wants codes alone, and draws nothing.
        scale_of: `scaling.host_scale`.
    """
    loops, threads, _ = _machinery()
    count = x.numel()
    if not count:
        return None
    loop, table, code_kind, _ = plan.prepared or prepare(plan)
    source = x if x.is_contiguous() or is_dense(x) else x.contiguous()
    codes = torch.empty_like(source, dtype=code_kind)
    crew = threads.crew_of(threads.threads_for(count))
    if crew is None:
        scale = scale_of(float(_amaxes(source).max()), plan.grid.max, power_of_two)
        given = (table, source.data_ptr(), 0, codes.data_ptr(), 0, scale, count, 1, 0, 0, 0)
        return codes, scale, threads.run(loop, count, *given)
    partials = torch.empty(loops.amax_words(count), dtype=torch.float64, device="cpu")
    scale, problems = loops.encode_by_amax()(
        crew,
        loops.compiled_amax(KINDS[plan.dtype]),
        loop,
        table,
        source.data_ptr(),
        codes.data_ptr(),
        partials.data_ptr(),
        count,
        plan.grid.max,
        power_of_two,
    )
    return codes, scale, problems


def _sums(count: int) -> tuple[Tensor, Tensor]:
    """(a row of partial sums per tile of elements, the vector of statistics), both to be written by the loops."""
    loops = _machinery()[0]
    rows = -(-count // loops.STATS_TILE)
    return (
        torch.empty((rows, loops.PARTIAL_BYTES // 8), dtype=torch.float64, device="cpu"),
        torch.empty(len(FIELDS), dtype=torch.float64, device="cpu"),
    )


def decode(plan: Plan, codes: Tensor, scale: Tensor | float, upper: None, out: Tensor | None) -> Tensor:
    """scale * value(code) in the plan's dtype; the codes (integers in range) and the scale are the caller's to check."""
    loops, threads, _ = _machinery()
    source = codes if codes.is_contiguous() or is_dense(codes) else codes.contiguous()
    if source.dtype not in (torch.uint8, torch.int32):
        source = source.to(torch.int32)
    target = out if out is not None and out.stride() == source.stride() else torch.empty_like(source, dtype=plan.dtype)
    count = source.numel()
    if count:
        table, entries = _decoding_table(plan.format, plan.dtype == torch.float64)
        loop = loops.compiled_decode(loops.DecodeVariant(KINDS[plan.dtype], source.dtype.itemsize))
        scales, number, inner, channels = _scale_layout(source, scale, count)
        threads.run(
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
        return out.copy_(target)
    return target


@cache
def _decoding_table(fmt: FloatFormat, wide: bool) -> tuple[int, int]:
    with gradual_underflow():
        values = value_table(fmt).astype("float64" if wide else "float32")
    values = np.pad(values, (0, max(256 - len(values), 0)), constant_values=np.nan)  # whatever a byte can name
    _tables.append(values)
    return values.ctypes.data, len(values)


_tables: list = []  # decoding tables live as long as the process: loops hold their addresses


def amax(x: Tensor) -> Tensor:
    """Largest finite magnitude of a whole tensor, 0-d, float32 (float64 for float64); 0 if there is none."""
    source = x if x.is_contiguous() or is_dense(x) else x.contiguous()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not source.numel():
        return torch.zeros((), dtype=dtype, device="cpu")
    partials, result = _amaxes(source), torch.empty((), dtype=dtype, device="cpu")
    _machinery()[0].largest(partials.data_ptr(), len(partials), KINDS[x.dtype], result.data_ptr())
    return result


def _amaxes(source: Tensor) -> Tensor:
    """Largest finite magnitude of each STATS_TILE of a dense tensor's elements, as float64."""
    loops, threads, _ = _machinery()
    count = source.numel()
    partials = torch.empty(-(-count // loops.STATS_TILE), dtype=torch.float64, device="cpu")
    loop = loops.compiled_amax(KINDS[source.dtype])
    threads.run(loop, count, 0, source.data_ptr(), 0, 0, 0, 0.0, 0, 0, 0, 0, partials.data_ptr())
    return partials
