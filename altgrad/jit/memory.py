"""Memory by address: loads and stores of tensors of any storage kind, of codes, of tables and of scratch space.

Loads and stores say that reads of the input and writes of the output do not depend on each other across elements, which
holds in place as well (an element is read before it is written) and lets the loop be vectorized without a check.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from altgrad.jit.machine import llvm_float
from altgrad.jit.storage import FLOAT64, from_storage, stored_type, to_storage


@intrinsic(prefer_literal=True)
def compute_zero(typing_context, kind):
    """0.0 in the type that arithmetic on the constant storage kind is done in: float64 for FLOAT64, else float32."""
    result = types.float64 if kind.literal_value == FLOAT64 else types.float32

    def generate(context, builder, signature, args):
        return ir.Constant(llvm_float(result), 0.0)

    return result(kind), generate


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

    def generate(context, builder, signature, args):
        value = builder.load(_element(builder, args[0], args[1], stored_type(storage)))
        if independent:
            _mark(builder, value, "input", ("output", "codes"))
        return from_storage(context, builder, value, storage)

    return result(types.int64, types.int64, kind), generate


@intrinsic(prefer_literal=True)
def load(typing_context, address, index, kind):
    """Element `index` of the input at `address`, of the constant storage kind, as float32 (float64 for FLOAT64)."""
    return _loader(address, index, kind, independent=True)


@intrinsic(prefer_literal=True)
def reload(typing_context, address, index, kind):
    """As `load`, of memory that the same function has written."""
    return _loader(address, index, kind, independent=False)


@intrinsic(prefer_literal=True)
def stored(typing_context, value, kind):
    """A float as it reads back from the constant storage kind."""
    storage = kind.literal_value

    def generate(context, builder, signature, args):
        return from_storage(context, builder, to_storage(context, builder, args[0], storage), storage)

    return value(value, kind), generate


@intrinsic(prefer_literal=True)
def store(typing_context, address, index, value, kind):
    """Write a float to element `index` of the output, rounded once (ties to even) to the constant storage kind."""
    storage = kind.literal_value
    given = types.float64 if storage == FLOAT64 else types.float32

    def generate(context, builder, signature, args):
        value = to_storage(context, builder, args[2], storage)
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


def table_reader(row: type, *, floats: Collection[str] = (), alike: bool = False) -> Any:
    """A function (like, table) of compiled code -> the named tuple `row`, from a table of 8-byte words.

    Args:
        row: the named tuple.
        floats: its fields that are float64; the others are int64.
        alike: all fields have the type of `like` instead (uint32 or uint64).
    """
    named = [types.float64 if name in floats else types.int64 for name in row._fields]

    @intrinsic
    def read(typing_context, like, table):
        kinds = [like] * len(named) if alike else named

        def generate(context, builder, signature, args):
            words = []
            for i, kind in enumerate(kinds):
                stored = ir.DoubleType() if kind == types.float64 else ir.IntType(64)
                word = builder.load(_element(builder, args[1], ir.Constant(ir.IntType(64), i), stored))
                words.append(word if kind.bitwidth == 64 else builder.trunc(word, ir.IntType(kind.bitwidth)))
            return context.make_tuple(builder, signature.return_type, words)

        return types.BaseTuple.from_types(kinds, row)(like, table), generate

    return read


@intrinsic
def store_word(typing_context, address, index, word):
    """Write entry `index` of a table of 8-byte words, an int64 or a float64."""
    if word not in (types.int64, types.float64):
        raise TypeError(f"a table has int64 and float64, not {word}")

    def generate(context, builder, signature, args):
        builder.store(args[2], _element(builder, args[0], args[1], args[2].type))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, word), generate


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
def pointer(typing_context, address):
    """An address as a pointer that `numba.carray` takes."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate
