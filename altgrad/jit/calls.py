"""The call of a compiled loop by its address, in the same floating-point environment on every thread.

A thread may flush subnormal numbers to zero (`torch.set_flush_denormal`), or round otherwise than to nearest; threads of
a pool have what they were started with. A loop runs as IEEE 754 says, and the thread's own setting is put back after it.
The callee is only known by its address, so no arithmetic of it can be moved out of the pair of settings.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

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
