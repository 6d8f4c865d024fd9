"""The fused CPU kernel of `measure_update`: one pass over before, gradient, attempted and after.

This module is the torch side and the two loops that are run: one measures, chunk by chunk, one puts the chunks together.
The arithmetic is in `diagnostics.kernels.tiles` and `diagnostics.kernels.careful`. Work is cut into chunks by the number
of elements alone, so results do not depend on the number of threads.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor

from altgrad.diagnostics.fields import BINS, UPDATE_FIELDS
from altgrad.diagnostics.kernels.careful import tile_with_care
from altgrad.diagnostics.kernels.tiles import (
    COPIES,
    HISTOGRAM,
    SCRATCH_ROW,
    STEPS,
    TILE,
    ULPS,
    UPDATES,
    WEIGHTS,
    F,
    Grid,
    tile,
)
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.machine import bits_of, float_of, shl
from altgrad.jit.memory import load, pointer, scratch, store, table_reader
from altgrad.jit.storage import FLOAT32
from altgrad.jit.template import Plain, called, inlined, loop
from altgrad.jit.threads import run_table, threads_for

CHUNK = 32768  # elements
FIELDS = len(UPDATE_FIELDS)
_SCRATCH_BYTES = 4 * SCRATCH_ROW
_SCALES_BYTES = 4 * TILE
_MAXIMA = (F.w_amax, F.g_amax, F.pair_s_max, F.pair_g_max, F.error_max, F.u_amax, F.steps_max, F.ulp_max)
_MINIMA = (F.pair_s_min, F.pair_g_min)


class Job(NamedTuple):
    """One measurement, as a table of 64-bit words."""

    w: int  # addresses
    g: int
    a: int
    z: int
    partial: int  # float64 [chunks, FIELDS]
    histograms: int  # int32 [parts, COPIES, 4, HISTOGRAM]
    rows_used: int  # uint8 [parts, rows] and [parts, columns]
    columns_used: int
    vector: int  # float64 [FIELDS]
    kept: int  # int64 [2, BINS]
    scales: int  # element i has scales[i // inner], or `scale` if inner is 0
    parts: int  # of the work, one for each thread
    count: int
    rows: int
    columns: int
    inner: int
    has_gradient: int
    units: int  # whether rows and columns without gradient are counted
    magnitudes: int  # which histograms are wanted: of weights and updates, of steps, of ULPs
    steps: int
    ulps: int
    mantissa_bits: int
    emin_field: int
    stiffness_field: int  # of a grid whose spacing is one; else 0
    own: int  # float32's own grid
    largest: float  # float64, as are the following
    scale: float
    near_zero: float


_NUMBERS = ("largest", "scale", "near_zero")


_read_job = table_reader(Job, floats=_NUMBERS)


@called
def _mark_used(g, position, count, columns, none_zero, used_rows, used_columns):
    """Mark the rows and columns that have a nonzero gradient among `count` elements from `position` on."""
    done = 0
    while done < count:
        row, column = (position + done) // columns, (position + done) % columns
        length = min(count - done, columns - column)
        for i in range(length):
            if none_zero or load(g, done + i, FLOAT32) != 0:
                used_rows[row] = 1
                used_columns[column + i] = 1
        done += length


@called
def _chunk(p, job, at, count, histograms, used_rows, used_columns):
    """`count` elements from element `at` on, into one row of partial results."""
    grid = Grid(
        np.uint32(job.mantissa_bits),
        np.uint32(job.emin_field),
        np.float32(job.largest),
        np.uint32(job.stiffness_field),
        job.own != 0,
    )
    scale, near_zero, inner = np.float32(job.scale), bits_of(np.float32(job.near_zero)), job.inner
    counts = job.magnitudes != 0, job.magnitudes != 0, job.steps != 0, job.ulps != 0
    has_gradient = job.has_gradient != 0
    bins, tile_scales = scratch(_SCRATCH_BYTES), scratch(_SCALES_BYTES)
    # Multiplying by the reciprocal of a power of two is dividing.
    divides = inner > 0 or bits_of(scale) & 0x7FFFFF != 0 or not 2.0**-126 <= scale <= 2.0**126
    if inner == 0 and divides:
        for i in range(min(count, TILE)):
            store(tile_scales, i, scale, FLOAT32)
    for start in range(at, at + count, TILE):
        n, here = min(TILE, at + count - start), 4 * start
        if inner > 0:
            for i in range(n):
                store(tile_scales, i, load(job.scales, (start + i) // inner, FLOAT32), FLOAT32)
        tensors = job.w + here, job.g + here, job.a + here, job.z + here
        zeros = p[F.g_zero]
        if not tile(
            p, tensors, tile_scales, scale, divides, near_zero, has_gradient, counts, grid, n, bins, histograms
        ):
            tile_with_care(p, tensors, tile_scales, scale, divides, near_zero, has_gradient, grid, n, histograms)
        if job.units:
            _mark_used(job.g + here, start, n, job.columns, p[F.g_zero] == zeros, used_rows, used_columns)


@inlined
def _arrays(job):
    """(partial, histograms, rows_used, columns_used) at their addresses."""
    chunks = (job.count + CHUNK - 1) // CHUNK
    return (
        carray(pointer(job.partial), (chunks, FIELDS), np.float64),
        carray(pointer(job.histograms), (job.parts, COPIES, 4, HISTOGRAM), np.int32),
        carray(pointer(job.rows_used), (job.parts, job.rows if job.units else 0), np.uint8),
        carray(pointer(job.columns_used), (job.parts, job.columns if job.units else 0), np.uint8),
    )


def _measure(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """The parts start .. stop - 1 of the job in the table; each has a histogram of its own."""
    job = _read_job(0, table)
    partial, histograms, rows_used, columns_used = _arrays(job)
    chunks = len(partial)
    each = (chunks + job.parts - 1) // job.parts
    for p in range(start, stop):
        for c in range(p * each, min((p + 1) * each, chunks)):
            for f in range(FIELDS):
                partial[c, f] = 0.0
            partial[c, F.pair_s_min] = partial[c, F.pair_g_min] = np.inf
            partial[c, F.pair_s_max] = partial[c, F.pair_g_max] = -np.inf
            here = c * CHUNK
            count = min(CHUNK, job.count - here)
            _chunk(partial[c], job, here, count, histograms[p], rows_used[p], columns_used[p])
    return np.int64(0)


@called
def _count(histograms, kind, b):
    """What one bin of a histogram counted, over all threads and copies."""
    total = np.int64(0)
    for part in range(len(histograms)):
        for copy in range(COPIES):
            total += histograms[part, copy, kind, b]
    return total


@called
def _median(histograms, kind, counted, total, moved):
    """Lower edge of the bin that holds the lower median of `total` numbers, `moved` of them not zero.

    NaN for none; -1 if the histogram was not counted and is needed.
    """
    if total == 0:
        return np.nan
    wanted, below = (total + 1) // 2, total - moved
    if below >= wanted:
        return 0.0
    if not counted:
        return -1.0
    b = 0
    while below < wanted and b < BINS - 1:
        b += 1
        below += _count(histograms, kind, b)
    return np.float64(float_of(shl(np.uint32(b), np.uint32(21))))


def _merge(table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Combine the chunks, in order, and the parts, whose counts are whole numbers; 1 if a median is missing."""
    job = _read_job(0, table)
    partial, histograms, rows_used, used = _arrays(job)
    vector = carray(pointer(job.vector), (FIELDS,), np.float64)
    for f in range(FIELDS):
        vector[f] = partial[0, f]
    for c in range(1, len(partial)):
        for f in range(FIELDS):
            if f in _MAXIMA:
                vector[f] = max(vector[f], partial[c, f])
            elif f in _MINIMA:
                vector[f] = min(vector[f], partial[c, f])
            else:
                vector[f] += partial[c, f]
    moves = np.int64(vector[F.moves])
    medians = (STEPS, job.steps, F.flips, F.steps_median), (ULPS, job.ulps, F.moved, F.ulp_median)
    for kind, counted, moved, field in medians:
        vector[field] = _median(histograms, kind, counted != 0, moves, np.int64(vector[moved]))
    vector[F.dead_rows] = vector[F.dead_columns] = np.nan
    if job.units:
        vector[F.dead_rows], vector[F.dead_columns] = _unused(rows_used), _unused(used)
    if job.magnitudes:
        kept = carray(pointer(job.kept), (2, BINS), np.int64)
        for kind in (WEIGHTS, UPDATES):
            for b in range(BINS):
                kept[kind, b] = _count(histograms, kind, b)
    missing = vector[F.steps_median] < 0 or vector[F.ulp_median] < 0
    return np.int64(missing)


@inlined
def _unused(used):
    """How many units no thread marked."""
    unused = 0
    for i in range(used.shape[1]):
        marked = False
        for part in range(used.shape[0]):
            marked = marked or used[part, i] != 0
        unused += not marked
    return unused


@cache
def _loops() -> tuple[int, int]:
    """Addresses of (`_measure`, `_merge`)."""
    return loop(_measure, Plain()), loop(_merge, Plain())


def _scale_layout(scale: Tensor | float, like: Tensor) -> tuple[Tensor | None, float, int]:
    """(scales, scale, inner): element i in memory order has scales[i // inner], or `scale` if inner is 0."""
    if not isinstance(scale, Tensor):
        return None, scale, 0
    scale = scale.detach()
    if scale.numel() == 1:
        return None, scale.item(), 0
    if like.ndim == 2 and scale.shape == (like.shape[0], 1):
        return scale.contiguous(), 1.0, like.shape[1]
    return scale.expand(like.shape).contiguous(), 1.0, 1


def supports(fmt: FloatFormat, scale, before, gradient, attempted, after) -> bool:
    """Whether the kernel takes these tensors: contiguous float32 on the CPU, a scale per tensor, row or element, and a
    grid with gradual underflow of at most 22 mantissa bits whose values are at most 2^104 (or float32's own)."""
    for t in (before, gradient, attempted, after):
        if t is not None and not (t.dtype == torch.float32 and t.is_contiguous() and t.is_cpu):
            return False
    if isinstance(scale, Tensor) and scale.dtype != torch.float32:
        return False
    return _fits(fmt)


@cache
def _fits(fmt: FloatFormat) -> bool:
    gradual = fmt.has_subnormals or fmt.mantissa_bits == 0
    grid = gradual and fmt.has_zero and fmt.mantissa_bits <= 22 and fmt.emax + 23 - fmt.mantissa_bits <= 126
    return fmt.name == "FP32" or grid


@cache
def _facts(fmt: FloatFormat) -> tuple:
    own = fmt.name == "FP32"
    stiffness_field = 127 - fmt.mantissa_bits if fmt.bias is None else 0
    return fmt.mantissa_bits, 0 if own else fmt.emin + 127, stiffness_field, fmt.max, own


def measure(
    fmt: FloatFormat, scale, near_zero: float, before, gradient, attempted, after, magnitudes: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(vector of UPDATE_FIELDS, int64 [2, BINS] histograms of |w / scale| and |update / scale| if asked for)."""
    count = before.numel()
    rows, columns = before.shape if before.ndim == 2 else (1, count)
    units = before.ndim == 2 and gradient is not None
    scales, number, inner = _scale_layout(scale, before)
    parts = min(-(-count // CHUNK), threads_for(count))
    vector, partial = np.empty(FIELDS), np.empty((-(-count // CHUNK), FIELDS))
    kept = np.empty((2 if magnitudes else 0, BINS), dtype=np.int64)
    used = [np.zeros((parts, n if units else 0), dtype=np.uint8) for n in (rows, columns)]
    mantissa_bits, emin_field, stiffness_field, largest, own = _facts(fmt)
    addresses = tuple((before if t is None else t).data_ptr() for t in (before, gradient, attempted, after))
    measure_loop, merge_loop = _loops()
    # A median of what mostly did not move is 0, without a histogram. Weights between the values of a grid do move.
    free = addresses[2] == addresses[3]
    for steps, ulps in ((free and own, free), (True, True)):
        histograms = np.zeros((parts, COPIES, 4, HISTOGRAM), dtype=np.int32)
        results = (partial, histograms, *used, vector, kept)
        whole = (
            *addresses,
            *(array.ctypes.data for array in results),
            0 if scales is None else scales.data_ptr(),
            *(parts, count, rows, columns, inner, gradient is not None, units, magnitudes, steps, ulps),
            *(mantissa_bits, emin_field, stiffness_field, own),
        )
        table = np.array([*whole, 0, 0, 0], dtype=np.int64)
        table[len(whole) :].view(np.float64)[:] = largest, number, near_zero
        run_table(measure_loop, table.ctypes.data, parts, threads=parts)
        if not run_table(merge_loop, table.ctypes.data, 1):
            break
    return torch.from_numpy(vector), torch.from_numpy(kept) if magnitudes else None
