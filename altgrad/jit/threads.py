"""Runs a compiled loop on as many threads as torch uses, or on the calling thread alone.

Threads are Numba's `omp` layer where it is there: its waiting threads do not slow torch's own pool. The calling thread
works alone for tensors too small to pay for a fork of threads, inside torch's data-loader processes, and after any
fork (GNU OpenMP cannot start threads in a forked child).
"""

from __future__ import annotations

import os
import threading
from functools import cache

import numba
import torch
from numba import njit, prange, types

from altgrad.jit.machine import call_loop

ELEMENTS_PER_THREAD = 32768  # below this a second thread costs more than it saves
_GRAIN = 8192  # chunk borders are multiples of it: cpu_loops.STATS_TILE

if not numba.config.THREADING_LAYER or numba.config.THREADING_LAYER == "default":  # pyright: ignore
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # pyright: ignore


@njit(nogil=True, cache=True, error_model="numpy")
def _serial(function, table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, count):
    """The whole loop on this thread."""
    return call_loop(function, (table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, 0, count))


@njit(nogil=True, cache=True, error_model="numpy")
def run_range(function, table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Elements start .. stop - 1 on this thread; the addresses are those of element 0."""
    return call_loop(
        function, (table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop)
    )


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _parallel(function, table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, count, threads):
    """The loop in one chunk per thread."""
    chunk = (count + threads - 1) // threads
    chunk = (chunk + _GRAIN - 1) // _GRAIN * _GRAIN
    problems = 0
    for thread in prange(threads):
        start = min(thread * chunk, count)
        stop = min(start + chunk, count)
        problems += call_loop(
            function, (table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop)
        )
    return problems


_forked = False
_not_thread_safe = threading.Lock()


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def threads_for(count: int) -> int:
    """How many threads a loop over `count` elements runs on, by torch's setting."""
    if count < 2 * ELEMENTS_PER_THREAD or _forked:
        return 1
    return min(torch.get_num_threads(), count // ELEMENTS_PER_THREAD, numba.config.NUMBA_NUM_THREADS)  # pyright: ignore


def run(function: int, count: int, *arguments) -> int:
    """Run the loop at address `function` over `count` elements; `arguments` are those of `kernels.cpu.loops` up to partials."""
    threads = threads_for(count)
    if threads == 1:
        return _serial(function, *arguments, count)
    found = numba.get_num_threads()
    if found != threads:
        numba.set_num_threads(threads)
    try:
        if _layer_is_thread_safe():
            return _parallel(function, *arguments, count, threads)
        with _not_thread_safe:
            return _parallel(function, *arguments, count, threads)
    finally:
        if found != threads:
            numba.set_num_threads(found)  # the caller's own setting


@cache
def _layer_is_thread_safe() -> bool:
    """Whether several threads may start parallel loops at once: not under Numba's `workqueue` layer."""
    _parallel.compile(tuple([types.int64] * 6 + [types.float64] + [types.int64] * 7))  # which loads the layer
    return numba.threading_layer() != "workqueue"
