"""The kinds of storage that compiled loops tell apart, and how stored numbers become floats for arithmetic, and back.

These functions emit LLVM for one value or a vector of them. fp16 is converted by the processor where the target has
instructions for it, else by integers, with the same bits.
"""

from __future__ import annotations

import torch
from llvmlite import ir

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = 0, 1, 2, 3
ITEM_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, FLOAT64: 8}
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float64: FLOAT64}


_STORED = {FLOAT32: ir.FloatType(), FLOAT64: ir.DoubleType(), FLOAT16: ir.IntType(16), BFLOAT16: ir.IntType(16)}


def stored_type(kind: int, lanes: int = 0):
    """LLVM type of a value of that kind in memory (of a vector of `lanes`)."""
    return ir.VectorType(_STORED[kind], lanes) if lanes else _STORED[kind]


def converts_half(context) -> bool:
    """Whether the target converts fp16 in vectors: x86 does so with F16C, every other target of Numba by itself."""
    triple, _, features = context.codegen().magic_tuple()
    return not triple.startswith(("x86_64", "i386", "i686")) or "+f16c" in features


def from_storage(context, builder, value, kind: int):
    """A stored value as the float that arithmetic is done in: float32, for FLOAT64 float64."""
    if kind == BFLOAT16:
        wide = builder.shl(builder.zext(value, _as(value, ir.IntType(32))), _number(value, ir.IntType(32), 16))
        return builder.bitcast(wide, _as(value, ir.FloatType()))
    if kind == FLOAT16 and converts_half(context):
        return builder.fpext(builder.bitcast(value, _as(value, ir.HalfType())), _as(value, ir.FloatType()))
    return _half_to_float(builder, value) if kind == FLOAT16 else value


def to_storage(context, builder, value, kind: int):
    """A float as it is stored: rounded once, ties to even."""
    if kind == BFLOAT16:
        return _float_to_bfloat(builder, value)
    if kind == FLOAT16 and converts_half(context):
        return builder.bitcast(builder.fptrunc(value, _as(value, ir.HalfType())), _as(value, ir.IntType(16)))
    return _float_to_half(builder, value) if kind == FLOAT16 else value


def _as(value, element):
    """`element`, or a vector of it where the value is one."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def _number(value, element, number):
    kind = _as(value, element)
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def _float_to_bfloat(builder, value):
    def word(number):
        return _number(value, ir.IntType(32), number)

    bits = builder.bitcast(value, _as(value, ir.IntType(32)))
    last = builder.and_(builder.lshr(bits, word(16)), word(1))
    rounded = builder.add(bits, builder.add(last, word(0x7FFF)))
    quiet = builder.or_(bits, word(0x400000))
    kept = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(kept, word(16)), _as(value, ir.IntType(16)))


def _half_to_float(builder, value):
    """By integers: the exponent is moved; float32's own subtraction normalises fp16's subnormals, exactly."""
    i32, f32 = _as(value, ir.IntType(32)), _as(value, ir.FloatType())

    def word(number):
        return _number(value, ir.IntType(32), number)

    wide = builder.zext(value, i32)
    sign = builder.shl(builder.and_(wide, word(0x8000)), word(16))
    magnitude = builder.and_(wide, word(0x7FFF))
    moved = builder.add(builder.shl(magnitude, word(13)), word(112 << 23))
    raised = builder.bitcast(builder.add(moved, word(1 << 23)), f32)
    small = builder.bitcast(builder.fsub(raised, builder.bitcast(word(113 << 23), f32)), i32)
    special = builder.add(moved, word(112 << 23))
    special = builder.select(
        builder.icmp_unsigned(">", magnitude, word(0x7C00)), builder.or_(special, word(1 << 22)), special
    )
    bits = builder.select(builder.icmp_unsigned("<", magnitude, word(0x400)), small, moved)
    bits = builder.select(builder.icmp_unsigned(">=", magnitude, word(0x7C00)), special, bits)
    return builder.bitcast(builder.or_(bits, sign), f32)


def _float_to_half(builder, value):
    """By integers: the remainder is added to round; next to 1/2 floats are as far apart as fp16's subnormals."""
    i32, f32 = _as(value, ir.IntType(32)), _as(value, ir.FloatType())

    def word(number):
        return _number(value, ir.IntType(32), number)

    bits = builder.bitcast(value, i32)
    magnitude = builder.and_(bits, word(0x7FFFFFFF))
    sign = builder.lshr(builder.sub(bits, magnitude), word(16))
    odd = builder.and_(builder.lshr(magnitude, word(13)), word(1))
    rounded = builder.add(builder.add(magnitude, word((0xFFF - (112 << 23)) & 0xFFFFFFFF)), odd)
    normal = builder.lshr(rounded, word(13))
    half = word(126 << 23)
    raised = builder.fadd(builder.bitcast(magnitude, f32), builder.bitcast(half, f32))
    small = builder.sub(builder.bitcast(raised, i32), half)
    nan = builder.or_(word(0x7E00), builder.and_(builder.lshr(magnitude, word(13)), word(0x3FF)))
    large = builder.select(builder.icmp_unsigned(">", magnitude, word(0x7F800000)), nan, word(0x7C00))
    found = builder.select(builder.icmp_unsigned("<", magnitude, word(113 << 23)), small, normal)
    found = builder.select(builder.icmp_unsigned(">=", magnitude, word(0x47800000)), large, found)
    return builder.trunc(builder.or_(found, sign), _as(value, ir.IntType(16)))
