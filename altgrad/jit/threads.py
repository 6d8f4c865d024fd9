"""Runs a compiled loop on as many threads as torch uses, in the same floating-point environment on every one.

A thread may flush subnormal numbers to zero (`torch.set_flush_denormal`), or round otherwise than to nearest; threads of
a pool have what they were started with. A loop runs as IEEE 754 says, and the thread's own setting is put back after it.
The callee is only known by its address, so no arithmetic of it can be moved out of the pair of settings.

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
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from altgrad.jit.template import LOOP, function

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_DEFAULT_MXCSR = 0x1F80  # to nearest, exceptions masked, subnormals neither flushed nor taken as zero


def _exchange_x86(builder):
    """Set the default environment; returns what puts the thread's own back."""
    own, default = cgutils.alloca_once(builder, _I32), cgutils.alloca_once(builder, _I32)
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte])
    save = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.stmxcsr")
    load = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.ldmxcsr")
    builder.call(save, [builder.bitcast(own, byte)])
    builder.store(ir.Constant(_I32, _DEFAULT_MXCSR), default)
    builder.call(load, [builder.bitcast(default, byte)])
    return lambda: builder.call(load, [builder.bitcast(own, byte)])


def _exchange_arm(builder):
    """As `_exchange_x86`, by the control register FPCR, whose default is 0."""
    get = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I64, []), "llvm.aarch64.get.fpcr")
    put = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [_I64]), "llvm.aarch64.set.fpcr"
    )
    own = builder.call(get, [])
    builder.call(put, [ir.Constant(_I64, 0)])
    return lambda: builder.call(put, [own])


@intrinsic
def call_loop(typing_context, function, arguments):
    """Call the compiled loop at address `function` with a tuple of int64 and float64; it returns an int64 of flags."""

    def generate(context, builder, signature, args):
        address, packed = args
        values = [builder.extract_value(packed, i) for i in range(len(arguments))]
        prototype = ir.FunctionType(_I64, [v.type for v in values])
        target = builder.module.triple.partition("-")[0]
        exchange = {"x86_64": _exchange_x86, "aarch64": _exchange_arm, "arm64": _exchange_arm}.get(target)
        restore = exchange(builder) if exchange else None
        found = builder.call(builder.inttoptr(address, prototype.as_pointer()), values)
        if restore:
            restore()
        return found

    return types.int64(types.int64, arguments), generate


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
