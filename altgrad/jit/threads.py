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
from numba import prange, types

from altgrad.jit.calls import call_loop
from altgrad.jit.template import LOOP, function

ELEMENTS_PER_THREAD = 32768  # below this a second thread costs more than it saves
CHUNK = 8192  # elements; borders between threads are multiples of it, and sums are taken chunk by chunk

if not numba.config.THREADING_LAYER or numba.config.THREADING_LAYER == "default":  # pyright: ignore
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # pyright: ignore

_ARGUMENTS = LOOP.args[:-2]  # all but the range


@function(types.int64(types.int64, *_ARGUMENTS, types.int64, types.int64))
def run_range(function, table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Units start .. stop - 1 on this thread; the addresses are those of unit 0."""
    return call_loop(  # pyright: ignore[reportCallIssue]  (Numba hands in the typing context)
        function, (table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop)
    )


@function(types.int64(types.int64, *_ARGUMENTS, types.int64, types.int64, types.int64), parallel=True)
def _parallel(
    function, table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, count, grain, threads
):
    """The loop in one range per thread."""
    each = (count + threads - 1) // threads
    each = (each + grain - 1) // grain * grain
    problems = 0
    for thread in prange(threads):
        start = min(thread * each, count)
        stop = min(start + each, count)
        problems += call_loop(  # pyright: ignore[reportCallIssue]
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


def run(loop: int, count: int, *arguments) -> int:
    """Run the loop at an address over `count` elements.

    Args:
        loop: of `jit.template.loop`; its flags on several threads are added up.
        arguments: those of the loop (`jit.template.LOOP`) up to partials.
    """
    threads = threads_for(count)
    if threads == 1:
        return run_range()(loop, *arguments, 0, count)
    return _on_threads(threads, loop, *arguments, count, CHUNK)


def run_table(loop: int, table: int, units: int, *, grain: int = 1, threads: int = 1) -> int:
    """Run a loop that finds all it needs in its table over `units` of work, `grain` of which stay on one thread."""
    arguments = (table, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0)
    if threads == 1:
        return run_range()(loop, *arguments, 0, units)
    return _on_threads(threads, loop, *arguments, units, grain)


def _on_threads(threads: int, *arguments) -> int:
    parallel, safe = _started()
    found = numba.get_num_threads()
    if found != threads:
        numba.set_num_threads(threads)
    try:
        if safe:
            return parallel(*arguments, threads)
        with _not_thread_safe:
            return parallel(*arguments, threads)
    finally:
        if found != threads:
            numba.set_num_threads(found)  # the caller's own setting


@cache
def _started():
    """(the compiled driver, whether several threads may start it at once: not under Numba's `workqueue` layer)."""
    parallel = _parallel()  # which loads the layer
    return parallel, numba.threading_layer() != "workqueue"
