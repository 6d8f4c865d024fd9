"""Block formats on the CPU: chooses, feeds and runs the compiled loops over blocks, on as many threads as torch uses."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import types
from torch import Tensor

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.code_table import Decoding, code_table, decoding_of
from altgrad.jit.grid_table import GRID_FIELDS, INF_PROBLEM, family_of, grid_table
from altgrad.jit.memory import load_word, scratch, store_word
from altgrad.jit.storage import KINDS
from altgrad.jit.subnormals import gradual_underflow
from altgrad.jit.template import function
from altgrad.jit.threads import CREW, ELEMENTS_PER_THREAD, crew_of, run_table, shared, threads_for
from altgrad.quantization.codec import code_dtype, stored_scale_dtype, value_table
from altgrad.quantization.kernels.cpu.block_decode import PARAMETERS as DECODING_PARAMETERS
from altgrad.quantization.kernels.cpu.block_decode import STRIP as DECODE_STRIP
from altgrad.quantization.kernels.cpu.block_decode import DecodeVariant
from altgrad.quantization.kernels.cpu.block_decode import compiled as decoding_loop
from altgrad.quantization.kernels.cpu.block_loops import PARTIAL_BYTES, STRIP, Variant, compiled
from altgrad.quantization.kernels.cpu.block_parts import (
    CALL_PARAMETERS,
    PARAMETERS,
    PLAIN_FLOAT,
    POWER_OF_TWO,
    ROUNDED,
)
from altgrad.quantization.kernels.cpu.loops import total
from altgrad.quantization.plan import Plan
from altgrad.quantization.quantized import Quantized
from altgrad.quantization.stats import FIELDS, QuantStats

__all__ = ["blocks_shared", "decode", "prepared", "run"]

_GROUP_ELEMENTS = 8192  # elements per partial sum of the statistics, about
_NO_KEY = (0, 0)
COUNTS_PAYLOADS = True  # as in `cpu.scalar`
_TABLE_BYTES = 8 * len(PARAMETERS)
_WORDS = len(PARAMETERS)
_GIVEN = len(CALL_PARAMETERS)


def blocks_shared(crew, loop, template, x, out, codes, scales, partials, seed, stream, upper, units, group):
    """All units; the table of parameters is that at `template` with the addresses and words of this call."""
    table = scratch(_TABLE_BYTES)
    for i in range(_GIVEN, _WORDS):
        store_word(table, i, np.int64(load_word(np.uint64(0), template, i)))
    store_word(table, 0, x)
    store_word(table, 1, out)
    store_word(table, 2, codes)
    store_word(table, 3, scales)
    store_word(table, 4, partials)
    store_word(table, 5, seed)
    store_word(table, 6, stream)
    store_word(table, 7, upper)
    return shared(crew, loop, (table, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0), units, group)


_run = function(types.int64(CREW, *[types.int64] * 9, types.float64, types.int64, types.int64))(blocks_shared)


class _Prepared(NamedTuple):
    """What a plan comes to for tensors of one shape."""

    loop: int  # address
    template: np.ndarray  # the table of parameters; those of a call are still to be filled in
    address: int  # of the template
    units: int
    group: int  # units per partial sum of the statistics
    threads_matter: bool  # whether the tensor is large enough for more than one
    scale_shape: tuple[int, ...]
    scales: Tensor | None  # to be like, for tensors so small that making a tensor from its shape would cost twice


def _element_table(plan: Plan) -> np.ndarray:
    """The element's grid; under `native` finite elements saturate (OCP MX 1.0, 6.3) and inf keeps its code."""
    clamp = plan.format.has_float_scale
    table = grid_table(plan.grid, plan.rounding, plan.overflow, clamp, plan.random_bits, False)
    if plan.overflow is Overflow.NATIVE and plan.grid.has_inf:
        table = table.copy()
        for name in ("overflow_positive", "overflow_negative"):
            table[GRID_FIELDS.index(name)] = table[GRID_FIELDS.index("max_bits")]
    return table


def _prepare(plan: Plan, x: Tensor) -> _Prepared:
    """The loop and its parameters for tensors of x's shape, kept in the plan."""
    if plan.prepared is None:
        plan.prepared = (_element_table(plan), code_dtype(plan.grid), stored_scale_dtype(plan.format))
    elements, code_kind, scale_kind = plan.prepared
    fmt, layout = plan.format, plan.layout(x.shape)
    strips = layout.tile_columns == 1 and layout.columns > 1
    whole = layout.tile_columns in (16, 32) and layout.columns % layout.tile_columns == 0
    variant = Variant(
        KIND=KINDS[plan.dtype],
        FAMILY=int(family_of(plan.grid, plan.rounding, plan.overflow, plan.random_bits, False)),
        SCALE=POWER_OF_TWO if fmt.power_of_two else PLAIN_FLOAT if fmt.has_float_scale else ROUNDED,
        VALUES=plan.values,
        CODE_BYTES=code_kind.itemsize if plan.codes else 0,
        SCALE_BYTES=scale_kind.itemsize,
        STATS=plan.stats,
        BLOCK=layout.tile_columns if whole and not strips else 0,
    )
    outer, down, across = layout.grid
    units = outer * down * (-(-layout.columns // STRIP) if strips else across)
    group = 1 if strips else max(1, _GROUP_ELEMENTS // (layout.tile_rows * layout.tile_columns))
    scale_grid = fmt.element if fmt.power_of_two or fmt.has_float_scale else fmt.scale_format
    scale_table = grid_table(scale_grid, Rounding.NEAREST_EVEN, Overflow.SATURATE, False, 24, False)
    facts = {
        "element_table": elements.ctypes.data,
        "scale_table": scale_table.ctypes.data,
        "rows": layout.rows,
        "columns": layout.columns,
        "tile_rows": layout.tile_rows,
        "tile_columns": layout.tile_columns,
        "emax": fmt.element_emax,
        "up_from": fmt.round_up_from(23),
        "smallest_scale": int(np.float32(fmt.scale_format.min_subnormal).view(np.uint32)),
        "plain": int(plan.overflow not in (Overflow.INF, Overflow.NAN) and plan.grid.has_negative_zero),
        "poison": int(not plan.grid.has_nan),
        "group": group,
        "element_max": int(np.float64(fmt.element.max).view(np.int64)),
    }
    loop = compiled(variant, strips)
    return plan.keep(x.shape, _prepared(loop, PARAMETERS, facts, units, group, x, layout.scale_shape, scale_kind))


def _prepared(
    loop: int,
    names: tuple[str, ...],
    facts: dict[str, int],
    units: int,
    group: int,
    x: Tensor,
    scale_shape: tuple[int, ...],
    scale_kind: torch.dtype,
) -> _Prepared:
    template = np.zeros(_WORDS, dtype=np.int64)
    template[_GIVEN : len(names)] = [facts[name] for name in names[_GIVEN:]]
    small = x.numel() < ELEMENTS_PER_THREAD * 2
    scales = torch.empty(scale_shape, dtype=scale_kind, device="cpu") if small else None
    return _Prepared(loop, template, template.ctypes.data, units, group, not small, scale_shape, scales)


def prepared(plan: Plan, x: Tensor) -> _Prepared:
    """What a plan comes to for tensors of x's shape; of x itself nothing else is asked."""
    return plan.shapes.get(x.shape) or _prepare(plan, x)


def run(plan: Plan, x: Tensor, scale: Tensor | None, key: tuple[int, int] | None, out: Tensor | None) -> Quantized:
    """One pass, as `kernels.eager.blocks.run`, bit for bit."""
    ready = prepared(plan, x)
    x = x.contiguous()
    _, code_kind, scale_kind = plan.prepared
    written = coded = partials = stats = None
    written_address = coded_address = partials_address = 0
    if plan.values:
        written = out if out is not None and out.is_contiguous() else torch.empty_like(x)
        written_address = written.data_ptr()
    if plan.codes:
        coded = torch.empty_like(x, dtype=code_kind)
        coded_address = coded.data_ptr()
    if plan.stats:
        rows = -(-ready.units // ready.group)
        partials = torch.empty((rows, PARTIAL_BYTES // 8), dtype=torch.float64, device="cpu")
        partials_address = partials.data_ptr()
    if ready.scales is None:
        stored = torch.empty(ready.scale_shape, dtype=scale_kind, device="cpu")
    else:
        stored = torch.empty_like(ready.scales)
    seed, stream = key or _NO_KEY
    upper = 1.0 if scale is None else float(scale)
    call = (x.data_ptr(), written_address, coded_address, stored.data_ptr(), partials_address, seed, stream, upper)
    problems = _call(ready, call, x.numel())
    if partials is not None:
        vector = torch.empty(len(FIELDS), dtype=torch.float64, device="cpu")
        total(partials_address, len(partials), x.numel(), vector.data_ptr())
        stats = QuantStats(vector)
    if out is not None and written is not out:
        assert written is not None
        written = out.copy_(written)
    return Quantized(written, coded, stored, stats, scale, problems & -INF_PROBLEM)  # a NaN has its scale


def _call(prepared: _Prepared, call: tuple, elements: int) -> int:
    """The units in one chunk per thread, under the parameters of this call."""
    threads = threads_for(elements) if prepared.threads_matter else 1
    crew = crew_of(threads)
    if crew is not None:
        return _run()(crew, prepared.loop, prepared.address, *call, prepared.units, prepared.group)
    table = prepared.template.copy()
    table[: _GIVEN - 1] = call[:-1]
    table[_GIVEN - 1 : _GIVEN].view(np.float64)[:] = call[-1]
    return run_table(prepared.loop, table.ctypes.data, prepared.units, grain=prepared.group, threads=threads)


def _prepare_decoding(plan: Plan, codes: Tensor) -> _Prepared:
    """The loop and its parameters for codes of that shape and dtype, kept in the plan."""
    fmt, layout = plan.format, plan.layout(codes.shape)
    strips = layout.tile_columns == 1 and layout.columns > 1
    whole = layout.tile_columns in (16, 32) and layout.columns % layout.tile_columns == 0
    element, code_bytes, scale_kind = fmt.element, codes.dtype.itemsize, stored_scale_dtype(fmt)
    variant = DecodeVariant(
        KIND=KINDS[plan.dtype],
        CODE_BYTES=code_bytes,
        SCALE_BYTES=0 if fmt.has_float_scale else scale_kind.itemsize,
        BLOCK=layout.tile_columns if whole and not strips else 0,
        DECODING=int(decoding_of(element) if code_bytes == 1 else Decoding.BY_TABLE),
    )
    outer, down, across = layout.grid
    units = outer * down * (-(-layout.columns // DECODE_STRIP) if strips else across)
    values, scale_values = _value_table(element), _value_table(element if fmt.has_float_scale else fmt.scale_format)
    facts = {
        "values": values.ctypes.data,
        "scale_values": scale_values.ctypes.data,
        "facts": code_table(element).ctypes.data,
        "last": len(values) - 1,
        "last_scale": len(scale_values) - 1,
        "rows": layout.rows,
        "columns": layout.columns,
        "tile_rows": layout.tile_rows,
        "tile_columns": layout.tile_columns,
    }
    loop = decoding_loop(variant, strips)
    found = _prepared(loop, DECODING_PARAMETERS, facts, units, 1, codes, layout.scale_shape, scale_kind)
    return plan.keep((codes.shape, code_bytes), found)


def decode(plan: Plan, codes: Tensor, scale: Tensor, upper: Tensor | None, out: Tensor | None) -> Tensor:
    """Element values times their block's multiplier; as `kernels.eager.blocks.decode`, bit for bit."""
    if codes.dtype != torch.uint8:
        codes = codes.to(torch.int32)
    codes, scale = codes.contiguous(), scale.contiguous()
    prepared = plan.shapes.get((codes.shape, codes.dtype.itemsize)) or _prepare_decoding(plan, codes)
    direct = out is not None and out.is_contiguous()
    written = out if direct else torch.empty_like(codes, dtype=plan.dtype)
    level = 1.0 if upper is None else float(upper)
    call = (0, written.data_ptr(), codes.data_ptr(), scale.data_ptr(), 0, 0, 0, level)
    _call(prepared, call, codes.numel())
    return written if out is None or direct else out.copy_(written)


@cache
def _value_table(fmt: FloatFormat) -> np.ndarray:
    """Value of each code as float32, a power of two of them and at least what a byte can name; beyond the codes NaN."""
    with gradual_underflow():
        values = value_table(fmt).astype(np.float32)
    return np.pad(values, (0, max(256 - len(values), 0)), constant_values=np.nan)
