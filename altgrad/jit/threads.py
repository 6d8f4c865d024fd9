"""Runs a compiled loop on as many threads as torch uses, in the same floating-point environment on every one.

A thread may flush subnormal numbers to zero (`torch.set_flush_denormal`), or round otherwise than to nearest; threads of
a pool have what they were started with. A loop runs as IEEE 754 says, and the thread's own setting is put back after it.
The callee is only known by its address, so no arithmetic of it can be moved out of the pair of settings.

The threads are torch's own: a loop is a parallel region of the GNU OpenMP that torch is linked with, entered by its
address. A second pool would wake and wait beside torch's on the same cores, and waiting threads of OpenMP spin for
milliseconds before they sleep: beside other busy programs that was most of what a step cost. Where torch runs on
another OpenMP (macOS, Windows), the threads are Numba's. The calling thread works alone for tensors too small to pay
for a fork of threads, inside torch's data-loader processes, and after any fork (GNU OpenMP cannot start threads in a
forked child).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache, partial

import numba
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from altgrad.jit.template import LOOP, Plain, called, function, loop

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

_ARGUMENTS = LOOP.args[:-2]  # all but the range


@njit
def _share(count, grain, threads):
    """Units of each of `threads` shares, a multiple of `grain`."""
    return ((count + threads - 1) // threads + grain - 1) // grain * grain


@function(types.int64(types.int64, *_ARGUMENTS, types.int64, types.int64))
def run_range(function, table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop):
    """Units start .. stop - 1 on this thread; the addresses are those of unit 0."""
    return call_loop(  # pyright: ignore[reportCallIssue]  (Numba hands in the typing context)
        function, (table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop)
    )


# -- on torch's threads -----------------------------------------------------------------------------------------------

_JOB = types.Tuple((types.int64, *_ARGUMENTS, types.int64, types.int64))
"""(address of the loop, its arguments up to partials, units in all, units of one share)."""


def _record(context):
    """The job in memory: the first unit that nobody has taken, the flags so far, and the words of `_JOB`."""
    return ir.LiteralStructType([_I64, _I64, *(context.get_value_type(kind) for kind in _JOB)])


def _word(builder, record, index: int):
    return builder.gep(record, [ir.Constant(_I32, 0), ir.Constant(_I32, index)], inbounds=True)


@intrinsic
def _run_region(typing_context, enter, work, job):
    """Enter a parallel region by `GOMP_parallel`'s address, where every thread calls `work` on the job; returns its flags.

    The region has as many threads as torch's own, so that OpenMP keeps them from one to the next.
    """

    def generate(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        record = cgutils.alloca_once(builder, _record(context))
        values = [ir.Constant(_I64, 0)] * 2 + [builder.extract_value(args[2], i) for i in range(len(_JOB))]
        for i, value in enumerate(values):
            builder.store(value, _word(builder, record, i))
        prototype = ir.FunctionType(ir.VoidType(), [byte, byte, _I32, _I32])
        place = builder.bitcast(record, byte)
        given = [builder.inttoptr(args[1], byte), place, ir.Constant(_I32, 0), ir.Constant(_I32, 0)]
        builder.call(builder.inttoptr(args[0], prototype.as_pointer()), given)
        return builder.load(_word(builder, record, 1))

    return types.int64(types.int64, types.int64, _JOB), generate


@intrinsic
def _job_at(typing_context, place):
    """The job whose record is at an address."""

    def generate(context, builder, signature, args):
        record = builder.inttoptr(args[0], _record(context).as_pointer())
        words = [builder.load(_word(builder, record, 2 + i)) for i in range(len(_JOB))]
        return context.make_tuple(builder, _JOB, words)

    return _JOB(types.int64), generate


@intrinsic(prefer_literal=True)
def _add(typing_context, place, index, value):
    """Add to one of the two counters of a job's record as one indivisible step; returns what it was."""
    which = index.literal_value

    def generate(context, builder, signature, args):
        record = builder.inttoptr(args[0], _record(context).as_pointer())
        return builder.atomic_rmw("add", _word(builder, record, which), args[2], "seq_cst")

    return types.int64(types.int64, index, types.int64), generate


def _take_shares(place):
    """One thread's part in a region: takes the next share until none is left, so that no share waits for a late thread."""
    job = _job_at(place)  # pyright: ignore[reportCallIssue]
    count, share = job[-2], job[-1]
    start = _add(place, 0, share)  # pyright: ignore[reportCallIssue]
    while start < count:
        flags = call_loop(job[0], (*job[1:-2], start, min(start + share, count)))  # pyright: ignore[reportCallIssue]
        _add(place, 1, flags)  # pyright: ignore[reportCallIssue]
        start = _add(place, 0, share)  # pyright: ignore[reportCallIssue]


@function(types.int64(types.int64, types.int64, types.int64, *_ARGUMENTS, types.int64, types.int64, types.int64))
def _region(
    enter,
    work,
    function,
    table,
    x,
    out,
    codes,
    scales,
    scale,
    inner,
    channels,
    seed,
    stream,
    partials,
    count,
    grain,
    threads,
):
    """The loop in one share per thread, taken by torch's threads."""
    arguments = (table, x, out, codes, scales, scale, inner, channels, seed, stream, partials)
    return _run_region(enter, work, (function, *arguments, count, _share(count, grain, threads)))  # pyright: ignore


CREW = types.UniTuple(types.int64, 3)
"""Who shares a loop in compiled code: the address of `GOMP_parallel`, that of `_take_shares`, and how many threads."""
ALONE = (0, 0, 1)


@called
def shared(crew, loop, arguments, count, grain):
    """A compiled loop over `count` units, `grain` of which stay on one thread, in compiled code; returns its flags.

    crew: as `crew_of` says. arguments: those of the loop up to partials.
    """
    if crew[2] <= 1 or count <= grain:
        return call_loop(loop, (*arguments, 0, count))  # pyright: ignore[reportCallIssue]
    job = (loop, *arguments, count, _share(count, grain, crew[2]))
    return _run_region(crew[0], crew[1], job)  # pyright: ignore[reportCallIssue]


@cache
def _torchs_crew() -> tuple[int, int] | None:
    enter = _torchs_openmp()
    return None if enter is None else (enter, loop(_take_shares, Plain(), types.void(types.int64)))


def crew_of(threads: int) -> tuple[int, int, int] | None:
    """So many of torch's threads for compiled code; None where it has no way to them but by Python."""
    if threads <= 1:
        return ALONE
    found = _torchs_crew()
    return None if found is None else (*found, threads)


# -- on Numba's threads -----------------------------------------------------------------------------------------------

if not numba.config.THREADING_LAYER or numba.config.THREADING_LAYER == "default":  # pyright: ignore
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # pyright: ignore

_not_thread_safe = threading.Lock()


@function(types.int64(types.int64, *_ARGUMENTS, types.int64, types.int64, types.int64), parallel=True)
def _parallel(
    function, table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, count, grain, threads
):
    """The loop in one share per thread of Numba's."""
    each = _share(count, grain, threads)
    problems = 0
    for thread in prange(threads):
        start = min(thread * each, count)
        stop = min(start + each, count)
        problems += call_loop(  # pyright: ignore[reportCallIssue]
            function, (table, x, out, codes, scales, scale, inner, channels, seed, stream, partials, start, stop)
        )
    return problems


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def threads_for(count: int) -> int:
    """How many threads a loop over `count` elements runs on, by torch's setting."""
    if count < 2 * ELEMENTS_PER_THREAD or _forked:
        return 1
    return min(torch.get_num_threads(), count // ELEMENTS_PER_THREAD)


def run(loop: int, count: int, *arguments) -> int:
    """Run the loop at an address over `count` elements.

    Args:
        loop: of `jit.template.loop`; its flags on several threads are added up.
        arguments: those of the loop (`jit.template.LOOP`) up to partials.
    """
    threads = threads_for(count)
    if threads == 1:
        return run_range()(loop, *arguments, 0, count)
    return _on_threads()(loop, *arguments, count, CHUNK, threads)


def run_table(loop: int, table: int, units: int, *, grain: int = 1, threads: int = 1) -> int:
    """Run a loop that finds all it needs in its table over `units` of work, `grain` of which stay on one thread."""
    arguments = (table, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0)
    if threads == 1:
        return run_range()(loop, *arguments, 0, units)
    return _on_threads()(loop, *arguments, units, grain, threads)


@cache
def _on_threads() -> Callable[..., int]:
    """What runs (loop, arguments up to partials, count, grain, threads) on several threads."""
    found = _torchs_crew()
    return _on_numbas_threads if found is None else partial(_region(), *found)


def _torchs_openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP that torch is linked with; None if that has no such entry."""
    try:
        entry = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # found through the libraries that torch has loaded
    except (AttributeError, OSError):
        return None
    return ctypes.cast(entry, ctypes.c_void_p).value


def _on_numbas_threads(*arguments) -> int:
    parallel, safe = _numbas_threads()
    found, threads = numba.get_num_threads(), min(arguments[-1], numba.config.NUMBA_NUM_THREADS)  # pyright: ignore
    if found != threads:
        numba.set_num_threads(threads)
    try:
        if safe:
            return parallel(*arguments)
        with _not_thread_safe:
            return parallel(*arguments)
    finally:
        if found != threads:
            numba.set_num_threads(found)  # the caller's own setting


@cache
def _numbas_threads():
    """(the compiled driver, whether several threads may start it at once: not under Numba's `workqueue` layer)."""
    parallel = _parallel()  # which loads the layer
    return parallel, numba.threading_layer() != "workqueue"
