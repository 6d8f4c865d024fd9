"""The arithmetic that Numba lacks: integer operations that keep their type, bit patterns of floats, selects, sums.

Numba widens 32-bit integers to 64 bits in every expression, which halves the vector width; these operations keep the
type of their operands, so one function serves float32 (uint32 bits) and float64 (uint64 bits).
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_BITS = {types.float32: types.uint32, types.float64: types.uint64}
_FLOATS = {types.uint32: types.float32, types.uint64: types.float64}


def llvm_float(numba_type):
    return ir.FloatType() if numba_type == types.float32 else ir.DoubleType()


def _same_type(name: str):
    """An intrinsic for one LLVM integer instruction on two operands of one unsigned type."""

    @intrinsic
    def operation(typing_context, a, b):
        if a not in _FLOATS or a != b:
            raise TypeError(f"{name} takes two uint32 or two uint64, not {a} and {b}")

        def generate(context, builder, signature, args):
            return getattr(builder, name)(*args)

        return a(a, b), generate

    return operation


add = _same_type("add")
sub = _same_type("sub")
mul = _same_type("mul")
shl = _same_type("shl")
shr = _same_type("lshr")
band = _same_type("and_")
bor = _same_type("or_")
bxor = _same_type("xor")


@intrinsic
def below(typing_context, a, b):
    """a < b for bit patterns of magnitudes (sign bit clear), compared as signed: one vector instruction on x86."""

    def generate(context, builder, signature, args):
        return builder.icmp_signed("<", *args)

    return types.boolean(a, a), generate


@intrinsic
def pick(typing_context, condition, a, b):
    """a where the condition holds, else b: one select, where `a if c else b` starts as a branch."""

    def generate(context, builder, signature, args):
        bit = builder.trunc(args[0], ir.IntType(1)) if args[0].type.width != 1 else args[0]
        return builder.select(bit, args[1], args[2])

    return a(condition, a, b), generate


@intrinsic
def counted(typing_context, total, condition):
    """total + 1 if the condition holds, else total, for an unsigned total."""

    def generate(context, builder, signature, args):
        return builder.add(args[0], builder.zext(builder.trunc(args[1], ir.IntType(1)), args[0].type))

    return total(total, condition), generate


@intrinsic
def plus_square(typing_context, total, x):
    """total + x * x for floats; the sum may be fused with the product and taken in any order of a loop's lanes."""

    def generate(context, builder, signature, args):
        square = builder.fmul(args[1], args[1], flags=("contract",))
        return builder.fadd(args[0], square, flags=("reassoc", "contract"))

    return total(total, total), generate


@intrinsic
def plus(typing_context, total, x):
    """total + x for floats, summed in any order of a loop's lanes."""

    def generate(context, builder, signature, args):
        return builder.fadd(*args, flags=("reassoc",))

    return total(total, total), generate


@intrinsic
def plus_product(typing_context, total, a, b):
    """total + a * b for floats; the sum may be fused with the product and taken in any order of a loop's lanes."""

    def generate(context, builder, signature, args):
        product = builder.fmul(args[1], args[2], flags=("contract",))
        return builder.fadd(args[0], product, flags=("reassoc", "contract"))

    return total(total, total, total), generate


@intrinsic
def in_wide_vectors(typing_context):
    """Have the calling function's loops work on vectors of 64 bytes where the processor has them.

    LLVM takes 32 on Intel's, whose clock went down for wide ones until Ice Lake; on those before it, this changes nothing.
    Not for loops with sums of floats in any order: there the vectors' width decides the bits.
    """

    def generate(context, builder, signature, args):
        _, _, features = context.codegen().magic_tuple()
        if "+avx512vbmi2" in features.split(","):
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite knows flags alone
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def small_integer(typing_context, like, x):
    """A uint32 or uint64 below 2^31 as the float whose bits are the unsigned type of `like`'s width."""
    result = _FLOATS[like]

    def generate(context, builder, signature, args):
        return builder.sitofp(args[1], llvm_float(result))

    return result(like, x), generate


@intrinsic
def truncated(typing_context, like, x):
    """Integer part of a float in 0 <= x < 2^31, as the unsigned type of `like`."""

    def generate(context, builder, signature, args):
        return builder.fptosi(args[1], ir.IntType(like.bitwidth))

    return like(like, x), generate


@intrinsic
def whole_part(typing_context, x):
    """A float without its fraction (toward zero), as one vector instruction; inf and NaN stay."""

    def generate(context, builder, signature, args):
        function = builder.module.declare_intrinsic("llvm.trunc", [llvm_float(x)])
        return builder.call(function, args)

    return x(x), generate


@intrinsic
def bits_of(typing_context, x):
    """The bit pattern of a float32 or float64."""
    result = _BITS[x]

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(result.bitwidth))

    return result(x), generate


@intrinsic
def float_of(typing_context, bits):
    """The float whose bit pattern is given."""
    result = _FLOATS[bits]

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], llvm_float(result))

    return result(bits), generate


@intrinsic
def low_word(typing_context, like, x):
    """A uint32 or uint64 `x` in the unsigned type of `like` (cut or zero-extended)."""

    def generate(context, builder, signature, args):
        to = ir.IntType(like.bitwidth)
        if x.bitwidth == like.bitwidth:
            return args[1]
        return (builder.zext if x.bitwidth < like.bitwidth else builder.trunc)(args[1], to)

    return like(like, x), generate


@intrinsic(prefer_literal=True)
def widened(typing_context, x, wide):
    """x as float64 if the constant `wide` is true, else as it is."""
    result = types.float64 if wide.literal_value else x

    def generate(context, builder, signature, args):
        return args[0] if result == x else builder.fpext(args[0], ir.DoubleType())

    return result(x, wide), generate


@intrinsic
def narrowed(typing_context, like, x):
    """x in the float type of `like` (exact where the caller knows it is)."""

    def generate(context, builder, signature, args):
        return args[1] if like == x else builder.fptrunc(args[1], llvm_float(like))

    return like(like, x), generate
