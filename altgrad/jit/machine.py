"""The few machine operations that Numba lacks: typed integer arithmetic, raw loads and stores, calls by address.

Numba widens 32-bit integers to 64 bits in every expression, which halves the vector width; these operations keep the
type of their operands, so one function serves float32 (uint32 bits) and float64 (uint64 bits). Loads and stores take an
address and say that reads of the input and writes of the output do not depend on each other across elements, which
holds in place as well (an element is read before it is written) and lets the loop be vectorized without a check.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Storage kinds of tensors, as the loop templates name them.
FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = 0, 1, 2, 3
ITEM_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, FLOAT64: 8}

_BITS = {types.float32: types.uint32, types.float64: types.uint64}
_FLOATS = {types.uint32: types.float32, types.uint64: types.float64}


def _llvm_float(numba_type):
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
def small_integer(typing_context, like, x):
    """A uint32 or uint64 below 2^31 as the float whose bits are the unsigned type of `like`'s width."""
    result = _FLOATS[like]

    def generate(context, builder, signature, args):
        return builder.sitofp(args[1], _llvm_float(result))

    return result(like, x), generate


@intrinsic
def truncated(typing_context, like, x):
    """Integer part of a float in 0 <= x < 2^31, as the unsigned type of `like`."""

    def generate(context, builder, signature, args):
        return builder.fptosi(args[1], ir.IntType(like.bitwidth))

    return like(like, x), generate


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
        return builder.bitcast(args[0], _llvm_float(result))

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
        return args[1] if like == x else builder.fptrunc(args[1], _llvm_float(like))

    return like(like, x), generate


@intrinsic(prefer_literal=True)
def compute_zero(typing_context, kind):
    """0.0 in the type that arithmetic on the constant storage kind is done in: float64 for FLOAT64, else float32."""
    result = types.float64 if kind.literal_value == FLOAT64 else types.float32

    def generate(context, builder, signature, args):
        return ir.Constant(_llvm_float(result), 0.0)

    return result(kind), generate


# -- memory -----------------------------------------------------------------------------------------------------------


def _scope(builder, *names: str):
    domain = builder.module.add_metadata(["altgrad"])
    return builder.module.add_metadata([builder.module.add_metadata([name, domain]) for name in names])


def _mark(builder, instruction, own: str, others: tuple[str, ...]):
    instruction.set_metadata("alias.scope", _scope(builder, own))
    instruction.set_metadata("noalias", _scope(builder, *others))
    return instruction


def _element(builder, address, index, element):
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index], inbounds=True)


def _loader(address, index, kind, independent: bool):
    storage = kind.literal_value
    result = types.float64 if storage == FLOAT64 else types.float32
    element = {
        FLOAT32: ir.FloatType(),
        FLOAT64: ir.DoubleType(),
        FLOAT16: ir.HalfType(),
        BFLOAT16: ir.IntType(16),
    }[storage]

    def generate(context, builder, signature, args):
        value = builder.load(_element(builder, args[0], args[1], element))
        if independent:
            _mark(builder, value, "input", ("output", "codes"))
        return _from_storage(builder, value, storage)

    return result(types.int64, types.int64, kind), generate


@intrinsic(prefer_literal=True)
def load(typing_context, address, index, kind):
    """Element `index` of the input at `address`, of the constant storage kind, as float32 (float64 for FLOAT64)."""
    return _loader(address, index, kind, independent=True)


@intrinsic(prefer_literal=True)
def reload(typing_context, address, index, kind):
    """As `load`, of memory that the same function has written."""
    return _loader(address, index, kind, independent=False)


def _to_storage(builder, value, storage: int):
    """A float as it is stored: rounded once, ties to even."""
    i32 = ir.IntType(32)
    if storage == FLOAT16:
        return builder.fptrunc(value, ir.HalfType())
    if storage == BFLOAT16:
        bits = builder.bitcast(value, i32)
        last = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
        rounded = builder.add(bits, builder.add(last, ir.Constant(i32, 0x7FFF)))
        quiet = builder.or_(bits, ir.Constant(i32, 0x400000))
        kept = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        return builder.trunc(builder.lshr(kept, ir.Constant(i32, 16)), ir.IntType(16))
    return value


def _from_storage(builder, value, storage: int):
    """A stored value as the float that arithmetic is done in."""
    if storage == FLOAT16:
        return builder.fpext(value, ir.FloatType())
    if storage == BFLOAT16:
        wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())
    return value


@intrinsic(prefer_literal=True)
def stored(typing_context, value, kind):
    """A float as it reads back from the constant storage kind."""
    storage = kind.literal_value

    def generate(context, builder, signature, args):
        return _from_storage(builder, _to_storage(builder, args[0], storage), storage)

    return value(value, kind), generate


@intrinsic(prefer_literal=True)
def store(typing_context, address, index, value, kind):
    """Write a float to element `index` of the output, rounded once (ties to even) to the constant storage kind."""
    storage = kind.literal_value
    given = types.float64 if storage == FLOAT64 else types.float32

    def generate(context, builder, signature, args):
        value = _to_storage(builder, args[2], storage)
        target = _element(builder, args[0], args[1], value.type)
        _mark(builder, builder.store(value, target), "output", ("input", "codes"))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, given, kind), generate


@intrinsic
def keep(typing_context, address, index, value):
    """Write a float32 to element `index` of scratch memory, which `kept` reads; it is none of input, output and codes."""

    def generate(context, builder, signature, args):
        target = _element(builder, args[0], args[1], ir.FloatType())
        _mark(builder, builder.store(args[2], target), "scratch", ("input", "output", "codes"))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def kept(typing_context, address, index):
    """The float32 that `keep` wrote to element `index` of scratch memory."""

    def generate(context, builder, signature, args):
        value = builder.load(_element(builder, args[0], args[1], ir.FloatType()))
        return _mark(builder, value, "scratch", ("input", "output", "codes"))

    return types.float32(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def store_code(typing_context, address, index, code, byte_width):
    """Write an unsigned code as uint8 or int32, by the constant width in bytes."""
    element = ir.IntType(8 * byte_width.literal_value)

    def generate(context, builder, signature, args):
        value = args[2]
        if code.bitwidth > element.width:
            value = builder.trunc(value, element)
        target = _element(builder, args[0], args[1], element)
        _mark(builder, builder.store(value, target), "codes", ("input", "output"))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, code, byte_width), generate


@intrinsic(prefer_literal=True)
def load_code(typing_context, address, index, byte_width):
    """A code (uint8 or int32 in memory) as int64."""
    element = ir.IntType(8 * byte_width.literal_value)

    def generate(context, builder, signature, args):
        value = builder.load(_element(builder, args[0], args[1], element))
        _mark(builder, value, "input", ("output", "codes"))
        return builder.zext(value, ir.IntType(64))

    return types.int64(types.int64, types.int64, byte_width), generate


@intrinsic
def reload_code(typing_context, like, address, index):
    """Entry `index` of int32 codes that the same function has written, in the unsigned type of `like`, uint32 or uint64.

    As uint64 it is two entries side by side.
    """

    def generate(context, builder, signature, args):
        return builder.load(_element(builder, args[1], args[2], ir.IntType(like.bitwidth)))

    return like(like, types.int64, types.int64), generate


@intrinsic
def load_word(typing_context, like, address, index):
    """Entry `index` of a table of 8-byte words, in the type of `like` (uint32, uint64 or float64)."""

    def generate(context, builder, signature, args):
        if like == types.float64:
            return builder.load(_element(builder, args[1], args[2], ir.DoubleType()))
        value = builder.load(_element(builder, args[1], args[2], ir.IntType(64)))
        return value if like.bitwidth == 64 else builder.trunc(value, ir.IntType(like.bitwidth))

    return like(like, types.int64, types.int64), generate


@intrinsic
def store_double(typing_context, address, index, value):
    """Write a float64 into a table."""

    def generate(context, builder, signature, args):
        builder.store(args[2], _element(builder, args[0], args[1], ir.DoubleType()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float64), generate


@intrinsic(prefer_literal=True)
def scratch(typing_context, size):
    """Address of `size` bytes (a constant) on this thread's stack, aligned to 64, valid until the function returns."""
    count = size.literal_value

    def generate(context, builder, signature, args):
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(ir.IntType(8), count))
            memory.align = 64
        return builder.ptrtoint(memory, ir.IntType(64))

    return types.int64(size), generate


@intrinsic
def call_loop(typing_context, function, arguments):
    """Call the compiled loop at address `function` with a tuple of int64 and float64; it returns an int64 of flags."""

    def generate(context, builder, signature, args):
        address, packed = args
        values = [builder.extract_value(packed, i) for i in range(len(arguments))]
        prototype = ir.FunctionType(ir.IntType(64), [v.type for v in values])
        return builder.call(builder.inttoptr(address, prototype.as_pointer()), values)

    return types.int64(types.int64, arguments), generate
