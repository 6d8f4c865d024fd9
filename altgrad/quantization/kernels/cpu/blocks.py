"""Block formats on the CPU: chooses, feeds and runs the compiled loops over blocks, on as many threads as torch uses."""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from altgrad.formats.block import BlockFormat
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit import threads as cpu_threads
from altgrad.jit.grid_table import GRID_FIELDS, INF_PROBLEM, family_of, float32_arithmetic_suffices, grid_table
from altgrad.jit.machine import BFLOAT16, FLOAT16, FLOAT32, call_loop
from altgrad.quantization.block_layout import BlockLayout
from altgrad.quantization.codec import code_dtype
from altgrad.quantization.kernels.block_result import BlockResult
from altgrad.quantization.kernels.cpu.block_loops import PARTIAL_BYTES, STRIP, Variant, compiled
from altgrad.quantization.kernels.cpu.block_parts import PARAMETERS, PLAIN_FLOAT, POWER_OF_TWO, ROUNDED
from altgrad.quantization.kernels.cpu.loops import total

_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_GROUP_ELEMENTS = 8192  # elements per partial sum of the statistics, about


def supports(dtype: torch.dtype, fmt: BlockFormat) -> bool:
    """Whether these loops cover the case: float32, bf16 and fp16 tensors, formats that float32's bits can work on."""
    scale = fmt.scale_format
    scale_fits = fmt.power_of_two or fmt.has_float_scale or float32_arithmetic_suffices(scale)
    return dtype in _KINDS and float32_arithmetic_suffices(fmt.element) and scale_fits


@njit(nogil=True, cache=True, error_model="numpy")
def _serial(function, table, units):
    return call_loop(function, (table, 0, units))


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _parallel(function, table, units, grain, threads):
    chunk = (units + threads - 1) // threads
    chunk = (chunk + grain - 1) // grain * grain
    problems = 0
    for thread in prange(threads):
        start = min(thread * chunk, units)
        problems += call_loop(function, (table, start, min(start + chunk, units)))
    return problems


def _element_table(fmt: BlockFormat, element: FloatFormat, rounding: Rounding, overflow: Overflow, random_bits: int):
    """The element's grid; under `native` finite elements saturate (OCP MX 1.0, 6.3) and inf keeps its code."""
    table = grid_table(element, rounding, overflow, fmt.has_float_scale, random_bits, False)
    if overflow is Overflow.NATIVE and element.has_inf:
        table = table.copy()
        for name in ("overflow_positive", "overflow_negative"):
            table[GRID_FIELDS.index(name)] = table[GRID_FIELDS.index("max_bits")]
    return table


def run(
    x: Tensor,
    fmt: BlockFormat,
    layout: BlockLayout,
    element: FloatFormat,
    upper: Tensor | None,
    *,
    rounding: Rounding,
    overflow: Overflow,
    key: Tensor | None,
    random_bits: int,
    values: bool = True,
    codes: bool = False,
    stats: bool = False,
    out: Tensor | None = None,
) -> BlockResult:
    """Quantize x in blocks and, as asked, return values, codes and statistics; as `kernels.eager.blocks.run`, bit for bit."""
    x = x.contiguous()
    direct = out is not None and out.is_contiguous()
    written = out if direct else torch.empty_like(x) if values else None
    code_kind, scale_kind = code_dtype(element), torch.float32 if fmt.has_float_scale else code_dtype(fmt.scale_format)
    code_tensor = torch.empty(x.shape, dtype=code_kind) if codes else None
    scales = torch.empty(layout.scale_shape, dtype=scale_kind)
    family = int(family_of(element, rounding, overflow, random_bits, False))
    strips = layout.tile_columns == 1 and layout.columns > 1
    whole = layout.tile_columns in (16, 32) and layout.columns % layout.tile_columns == 0
    variant = Variant(
        KIND=_KINDS[x.dtype],
        FAMILY=family,
        SCALE=POWER_OF_TWO if fmt.power_of_two else PLAIN_FLOAT if fmt.has_float_scale else ROUNDED,
        VALUES=values,
        CODE_BYTES=code_kind.itemsize if codes else 0,
        SCALE_BYTES=scale_kind.itemsize,
        STATS=stats,
        BLOCK=layout.tile_columns if whole and not strips else 0,
    )
    outer, down, across = layout.grid
    units = outer * down * (-(-layout.columns // STRIP) if strips else across)
    group = 1 if strips else max(1, _GROUP_ELEMENTS // (layout.tile_rows * layout.tile_columns))
    partials = np.empty((-(-units // group) if stats else 0, PARTIAL_BYTES // 8))
    element_table = _element_table(fmt, element, rounding, overflow, random_bits)
    scale_grid = fmt.element if fmt.power_of_two or fmt.has_float_scale else fmt.scale_format
    scale_table = grid_table(scale_grid, Rounding.NEAREST_EVEN, Overflow.SATURATE, False, 24, False)
    seed, stream = (0, 0) if key is None else (int(word) for word in key.tolist())
    smallest = np.float32(fmt.scale_format.min_subnormal).view(np.uint32)
    facts = {
        "x": x.data_ptr(),
        "out": 0 if written is None else written.data_ptr(),
        "codes": 0 if code_tensor is None else code_tensor.data_ptr(),
        "scales": scales.data_ptr(),
        "element_table": element_table.ctypes.data,
        "scale_table": scale_table.ctypes.data,
        "partials": partials.ctypes.data,
        "seed": seed,
        "stream": stream,
        "rows": layout.rows,
        "columns": layout.columns,
        "tile_rows": layout.tile_rows,
        "tile_columns": layout.tile_columns,
        "emax": fmt.element_emax,
        "up_from": fmt.round_up_from(23),
        "smallest_scale": int(smallest),
        "plain": int(overflow in (Overflow.NATIVE, Overflow.SATURATE) and element.has_negative_zero),
        "poison": int(not element.has_nan),
        "group": group,
    }
    table = np.array([facts[name] for name in PARAMETERS[: len(facts)]] + [0, 0], dtype=np.int64)
    table[len(facts) :].view(np.float64)[:] = fmt.element.max, 1.0 if upper is None else float(upper)
    problems = _run_units(compiled(variant, strips), table, units, group, x.numel())
    if stats:
        vector = torch.empty(7, dtype=torch.float64)
        total(partials.ctypes.data, len(partials), x.numel(), vector.data_ptr())
    if out is not None and not direct:
        written = out.copy_(written)
    missing = torch.tensor(int(problems & INF_PROBLEM != 0)) if codes else None
    return BlockResult(written, code_tensor, scales, vector if stats else None, missing)


def _run_units(function: int, table: np.ndarray, units: int, grain: int, elements: int) -> int:
    threads = cpu_threads.threads_for(elements)
    if threads == 1:
        return _serial(function, table.ctypes.data, units)
    found = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        return _parallel(function, table.ctypes.data, units, grain, threads)
    finally:
        numba.set_num_threads(found)
