"""The fused CPU kernel of `measure_update`: one pass over before, gradient, attempted and after.

This module is the torch side and the threads; the arithmetic is in `diagnostics.kernels.tiles` and `diagnostics.kernels.careful`. Work is cut
into chunks by the number of elements alone, so results do not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from altgrad.diagnostics import fields
from altgrad.diagnostics.fields import BINS, UPDATE_FIELDS
from altgrad.diagnostics.kernels import careful as diagnose_careful
from altgrad.diagnostics.kernels import tiles as diagnose_tiles
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
    inline,
    strict,
    tile,
)
from altgrad.formats.scalar import FloatFormat
from altgrad.jit import machine as cpu_llvm
from altgrad.jit import threads as cpu_threads
from altgrad.jit.machine import FLOAT32, bits_of, float_of, load, scratch, shl, store

CHUNK = 32768  # elements
FIELDS = len(UPDATE_FIELDS)
_SOURCES = [Path(module.__file__) for module in (cpu_llvm, diagnose_tiles, diagnose_careful, fields)]
_STAMP = hashlib.sha256(b"".join(path.read_bytes() for path in [*_SOURCES, Path(__file__)])).hexdigest()[:12]
_SCRATCH_BYTES = 4 * SCRATCH_ROW
_SCALES_BYTES = 4 * TILE
_MAXIMA = (F.w_amax, F.g_amax, F.pair_s_max, F.pair_g_max, F.error_max, F.u_amax, F.steps_max, F.ulp_max)
_MINIMA = (F.pair_s_min, F.pair_g_min)


class Job(NamedTuple):
    """One measurement, as the compiled functions take it."""

    w: int  # addresses
    g: int
    a: int
    z: int
    count: int
    rows: int
    columns: int
    scales: int  # address; element i has scales[i // inner], or `scale` if inner is 0
    scale: float
    inner: int
    near_zero: float
    has_gradient: bool
    units: bool  # whether rows and columns without gradient are counted
    magnitudes: bool  # which histograms are wanted: of weights and updates, of steps, of ULPs
    steps: bool
    ulps: bool
    mantissa_bits: int
    emin_field: int
    stiffness_field: int  # of a grid whose spacing is one; else 0
    largest: float
    own: bool  # float32's own grid


@strict
def _mark_used(g, position, count, columns, none_zero, used_rows, used_columns):
    """Mark the rows and columns that have a nonzero gradient among `count` elements from `position` on."""
    done = 0
    while done < count:
        row, column = (position + done) // columns, (position + done) % columns
        length = min(count - done, columns - column)
        if none_zero:
            used_rows[row] = 1
            used_columns[column : column + length] = 1
        else:
            for i in range(length):
                if load(g, done + i, FLOAT32) != 0:
                    used_rows[row] = 1
                    used_columns[column + i] = 1
        done += length


@strict
def _chunk(p, job, at, count, histograms, used_rows, used_columns):
    """`count` elements from element `at` on, into one row of partial results."""
    grid = Grid(
        np.uint32(job.mantissa_bits),
        np.uint32(job.emin_field),
        np.float32(job.largest),
        np.uint32(job.stiffness_field),
        job.own,
    )
    scale, near_zero, inner = np.float32(job.scale), bits_of(np.float32(job.near_zero)), job.inner
    counts = job.magnitudes, job.steps, job.ulps
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
            p, tensors, tile_scales, scale, divides, near_zero, job.has_gradient, counts, grid, n, bins, histograms
        ):
            tile_with_care(p, tensors, tile_scales, scale, divides, near_zero, job.has_gradient, grid, n, histograms)
        if job.units:
            _mark_used(job.g + here, start, n, job.columns, p[F.g_zero] == zeros, used_rows, used_columns)


@inline
def _prepared(job, parts):
    """Empty partial results: fields of each chunk; histograms, used rows and used columns of each thread."""
    partial = np.zeros(((job.count + CHUNK - 1) // CHUNK, FIELDS))
    for c in range(len(partial)):
        partial[c, F.pair_s_min] = partial[c, F.pair_g_min] = np.inf
        partial[c, F.pair_s_max] = partial[c, F.pair_g_max] = -np.inf
    histograms = np.zeros((parts, COPIES, 4, HISTOGRAM), np.int32)
    rows_used = np.zeros((parts, job.rows if job.units else 0), np.uint8)
    return partial, histograms, rows_used, np.zeros((parts, job.columns if job.units else 0), np.uint8)


@inline
def _part(part, parts, job, partial, histograms, rows_used, used):
    """The chunks of one thread."""
    chunks = len(partial)
    each = (chunks + parts - 1) // parts
    for c in range(part * each, min((part + 1) * each, chunks)):
        here = c * CHUNK
        _chunk(partial[c], job, here, min(CHUNK, job.count - here), histograms[part], rows_used[part], used[part])


@strict
def _add_up(histograms, kind, into):
    """The counts of one histogram over all threads and copies."""
    for part in range(len(histograms)):
        for copy in range(COPIES):
            for b in range(BINS):
                into[b] += histograms[part, copy, kind, b]


@strict
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
    summed = np.zeros(BINS, np.int64)
    _add_up(histograms, kind, summed)
    b = 0
    while below < wanted and b < BINS - 1:
        b += 1
        below += summed[b]
    return np.float64(float_of(shl(np.uint32(b), np.uint32(21))))


@strict
def _merge(partial, histograms, rows_used, used, job, vector, kept):
    """Combine the chunks, in order, and the threads, whose counts are whole numbers; False if a median is missing."""
    vector[:] = partial[0]
    for c in range(1, len(partial)):
        for f in range(FIELDS):
            if f in _MAXIMA:
                vector[f] = max(vector[f], partial[c, f])
            elif f in _MINIMA:
                vector[f] = min(vector[f], partial[c, f])
            else:
                vector[f] += partial[c, f]
    moves = np.int64(vector[F.moves])
    vector[F.steps_median] = _median(histograms, STEPS, job.steps, moves, np.int64(vector[F.flips]))
    vector[F.ulp_median] = _median(histograms, ULPS, job.ulps, moves, np.int64(vector[F.moved]))
    vector[F.dead_rows] = vector[F.dead_columns] = np.nan
    if job.units:
        vector[F.dead_rows], vector[F.dead_columns] = _unused(rows_used), _unused(used)
    if job.magnitudes:
        kept[:] = 0
        _add_up(histograms, WEIGHTS, kept[0])
        _add_up(histograms, UPDATES, kept[1])
    return (vector[F.steps_median] >= 0 and vector[F.ulp_median] >= 0) or moves == 0


@inline
def _unused(used):
    """How many units no thread marked."""
    unused = 0
    for i in range(used.shape[1]):
        unused += used[:, i].max() == 0
    return unused


def _stamped(function):
    """The function under a name that carries its sources', so that Numba's cache on disk knows when they change."""
    function.__qualname__ = f"{function.__name__}_{_STAMP}"
    return function


@njit(nogil=True, cache=True, error_model="numpy")
@_stamped
def _serial(job, parts, vector, kept):
    """Measure on this thread."""
    partial, histograms, rows_used, used = _prepared(job, parts)
    for part in range(parts):
        _part(part, parts, job, partial, histograms, rows_used, used)
    return _merge(partial, histograms, rows_used, used, job, vector, kept)


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
@_stamped
def _parallel(job, parts, vector, kept):
    """Measure on as many threads as there are parts."""
    partial, histograms, rows_used, used = _prepared(job, parts)
    for part in prange(parts):
        _part(part, parts, job, partial, histograms, rows_used, used)
    return _merge(partial, histograms, rows_used, used, job, vector, kept)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Numba's pool set to `count` threads, and left as found."""
    found = numba.get_num_threads()
    lock = nullcontext() if cpu_threads._layer_is_thread_safe() else cpu_threads._not_thread_safe
    with lock:
        numba.set_num_threads(count)
        try:
            yield
        finally:
            numba.set_num_threads(found)


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
    vector = np.empty(FIELDS)
    kept = np.empty((2 if magnitudes else 0, BINS), dtype=np.int64)
    addresses = tuple((before if t is None else t).data_ptr() for t in (before, gradient, attempted, after))
    where = 0 if scales is None else scales.data_ptr(), float(number), inner
    parts = min(-(-count // CHUNK), cpu_threads.threads_for(count))
    facts = _facts(fmt)
    # A median of what mostly did not move is 0, without a histogram. Weights between the values of a grid do move.
    free = addresses[2] == addresses[3]
    for counts in ((magnitudes, free and fmt.name == "FP32", free), (magnitudes, True, True)):
        job = Job(*addresses, count, rows, columns, *where, near_zero, gradient is not None, units, *counts, *facts)
        if parts == 1:
            complete = _serial(job, parts, vector, kept)
        else:
            with _threads(parts):
                complete = _parallel(job, parts, vector, kept)
        if complete:
            break
    return torch.from_numpy(vector), torch.from_numpy(kept) if magnitudes else None
