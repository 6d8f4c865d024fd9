"""Products by matrix units (Intel's AMX), in LLVM: 32 x 32 sums in four matrix registers of 16 x 16.

A register holds 16 rows of 16 words. One instruction adds the product of two of them to a third: `tdpbssd` of words of 4
signed bytes, `tdpbf16ps` of 2 bf16. From the left it takes 16 rows of an operand, each with 16 words along the reduction
side by side: a panel (`panels`) lies as [blocks of 16 words, 32 rows, 16 words], after the 32 words that sums of vector
units start from. From the right it takes words along the reduction as rows, as panels have them anyway. What is short of 16
words is filled with zeros.

The order of sums is that of Intel's manual (TDPBF16PS): of the 16 words the even products one after the other and the odd
ones, each rounded once, then these two, then the sum that is there. Where the instructions are lacking, or on demand, the
same sums are spelled out.
"""

# ruff: noqa: F821  (names are bound to the templates)
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from altgrad.jit.memory import scratch
from altgrad.jit.template import inlined, part
from altgrad.quantization.products.tiles import (
    FLOATS,
    LANES,
    PANEL_ROWS,
    VECTORS,
    WORDS,
    broadcast,
    products_of_words,
    put_word,
    scaled,
)
from altgrad.quantization.products.units import Unit

_I8, _I64, _NOTHING = ir.IntType(8), ir.IntType(64), ir.VoidType()
_PLACE = _I8.as_pointer()
HALVES = PANEL_ROWS // LANES  # registers of a panel's rows
REGISTER_BYTES = 4 * LANES * LANES
BLOCK_BYTES = HALVES * REGISTER_BYTES  # of a panel's 16 words along the reduction
ROW_BYTES = 4 * PANEL_ROWS
_SUMS, _LEFTS, _RIGHTS = 0, HALVES * HALVES, HALVES * HALVES + HALVES  # the first register of each kind
_DOTS = {Unit.AMX_INT8: "llvm.x86.tdpbssd", Unit.AMX_BF16: "llvm.x86.tdpbf16ps"}


def _call(builder, name: str, *args) -> None:
    kind = ir.FunctionType(_NOTHING, [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _register(index: int):
    return ir.Constant(_I8, index)


def _at(builder, address, bytes_):
    offset = ir.Constant(_I64, bytes_) if isinstance(bytes_, int) else bytes_
    return builder.inttoptr(builder.add(address, offset), _PLACE)


def _multiplied(unit: Unit):
    """The intrinsic that multiplies two panels into 32 rows of 32 sums, see `_sums`."""

    @intrinsic
    def _sums(typing_context, left, right, words, sums):
        """left, right: addresses of the panels' first words; words: along the reduction; sums: 4096 bytes."""

        def generate(context, builder, signature, args):
            left, right, words, sums = args
            for i in range(HALVES * HALVES):
                _call(builder, "llvm.x86.tilezero", _register(_SUMS + i))
            blocks = builder.lshr(builder.add(words, ir.Constant(_I64, LANES - 1)), ir.Constant(_I64, 4))
            with cgutils.for_range(builder, blocks) as loop:
                block = builder.mul(loop.index, ir.Constant(_I64, BLOCK_BYTES))
                for operand, registers, half_bytes, line_bytes in (
                    (left, _LEFTS, REGISTER_BYTES, 4 * LANES),
                    (right, _RIGHTS, 4 * LANES, ROW_BYTES),
                ):
                    first = builder.add(operand, block)
                    for half in range(HALVES):
                        place = _at(builder, first, half * half_bytes)
                        stride = ir.Constant(_I64, line_bytes)
                        _call(builder, "llvm.x86.tileloadd64", _register(registers + half), place, stride)
                for i in range(HALVES):
                    for j in range(HALVES):
                        given = (_SUMS + i * HALVES + j, _LEFTS + i, _RIGHTS + j)
                        _call(builder, _DOTS[unit], *map(_register, given))
            for i in range(HALVES):
                for j in range(HALVES):
                    place = _at(builder, sums, LANES * ROW_BYTES * i + 4 * LANES * j)
                    stride = ir.Constant(_I64, ROW_BYTES)
                    _call(builder, "llvm.x86.tilestored64", _register(_SUMS + i * HALVES + j), place, stride)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return _sums


def _line(builder, address, v: int, bytes_: int = 0):
    """Pointer to vector v of a line of 32 words."""
    return builder.bitcast(_at(builder, address, bytes_ + 4 * LANES * v), WORDS.as_pointer())


def _added(unit: Unit):
    """The intrinsic that adds products of one word to two lines of 32 sums, see `_add`."""
    sums = WORDS if unit.sums_integers else FLOATS

    @intrinsic
    def _add(typing_context, lines, left, right):
        """lines: 256 bytes, for bf16 the even and the odd products; left: address of a word; right: of 32 of them."""

        def generate(context, builder, signature, args):
            lines, left, right = args
            word = builder.load(builder.bitcast(_at(builder, left, 0), ir.IntType(32).as_pointer()), align=4)
            for v in range(VECTORS):
                products = products_of_words(
                    builder, unit, broadcast(builder, word), builder.load(_line(builder, right, v))
                )
                for i, product in enumerate(products):
                    line = _line(builder, lines, v, i % 2 * ROW_BYTES)
                    total = builder.bitcast(builder.load(line), sums)
                    total = (builder.add if unit.sums_integers else builder.fadd)(total, product)
                    builder.store(builder.bitcast(total, WORDS), line)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return _add


def _gathered(unit: Unit):
    """The intrinsic that adds two lines of 32 sums to a third, see `_gather`."""

    @intrinsic
    def _gather(typing_context, line, lines):
        """line += lines[0] + lines[1], and lines = 0."""

        def generate(context, builder, signature, args):
            line, lines = args
            sums = WORDS if unit.sums_integers else FLOATS
            add = builder.add if unit.sums_integers else builder.fadd
            for v in range(VECTORS):
                places = [_line(builder, line, v), _line(builder, lines, v), _line(builder, lines, v, ROW_BYTES)]
                total, even, odd = (builder.bitcast(builder.load(place), sums) for place in places)
                builder.store(builder.bitcast(add(total, add(even, odd)), WORDS), places[0])
                for place in places[1:]:
                    builder.store(ir.Constant(WORDS, None), place)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return _gather


def _ended(unit: Unit):
    """The intrinsic that ends a row of 32 sums, see `_end`."""
    sums = WORDS if unit.sums_integers else FLOATS

    @intrinsic
    def _end(typing_context, row, out, adds, last, factor, bias):
        """`tiles._tile`'s end, for one row at `row`."""

        def generate(context, builder, signature, args):
            row, out, adds, last, factor, bias = args

            def holds(flag):
                return builder.icmp_unsigned("!=", flag, ir.Constant(_I64, 0))

            for v in range(VECTORS):
                target = _line(builder, out, v)
                total = cgutils.alloca_once_value(builder, builder.load(_line(builder, row, v), align=64))
                with builder.if_then(holds(adds)):
                    parts = [builder.bitcast(one, sums) for one in (builder.load(total), builder.load(target, align=4))]
                    found = (builder.add if unit.sums_integers else builder.fadd)(*parts)
                    builder.store(builder.bitcast(found, WORDS), total)
                with builder.if_then(holds(last)):
                    value = scaled(builder, builder.bitcast(builder.load(total), sums), factor, unit)
                    builder.store(builder.bitcast(value, WORDS), total)
                    with builder.if_then(holds(bias)):
                        value = builder.fadd(
                            value, builder.bitcast(builder.load(_line(builder, bias, v), align=4), FLOATS)
                        )
                        builder.store(builder.bitcast(value, WORDS), total)
                builder.store(builder.load(total), target, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4, types.float64, types.int64), generate

    return _end


@intrinsic
def _take(typing_context, found):
    """Keep this thread's set-up of matrix registers at `found`, 64 bytes, and set up eight of 16 rows of 64 bytes."""

    def generate(context, builder, signature, args):
        _call(builder, "llvm.x86.sttilecfg", _at(builder, args[0], 0))
        with builder.goto_entry_block():
            wanted = builder.alloca(ir.ArrayType(ir.IntType(32), 16))
            wanted.align = 64
        # bytes: 0 the palette, 16 .. 31 bytes of a row, as words of 16 bits, 48 .. 55 rows
        words = [1, 0, 0, 0, *[0x00400040] * 4, 0, 0, 0, 0, *[0x10101010] * 2, 0, 0]
        builder.store(ir.Constant(wanted.type.pointee, words), wanted)
        _call(builder, "llvm.x86.ldtilecfg", builder.bitcast(wanted, _PLACE))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _give_back(typing_context, found):
    """Set the matrix registers up as `_take` found them: a library that keeps its own set-up in them finds it."""

    def generate(context, builder, signature, args):
        palette = builder.load(_at(builder, args[0], 0))
        with builder.if_else(builder.icmp_unsigned("==", palette, ir.Constant(_I8, 0))) as (unused, used):
            with unused:
                _call(builder, "llvm.x86.tilerelease")
            with used:
                _call(builder, "llvm.x86.ldtilecfg", _at(builder, args[0], 0))
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _sums_emulated(left, right, words, sums):
    """As `_multiplied`, spelled out."""
    lines = scratch(LINES_BYTES)
    for i in range(LINES_BYTES // 4):
        put_word(lines, i, np.uint32(0))
    for row in range(PANEL):
        line = sums + row * ROW
        for i in range(PANEL):
            put_word(line, i, np.uint32(0))
        for block in range((words + SIDE - 1) // SIDE):
            at = block * BLOCK
            for word in range(SIDE):
                add(lines, left + at + (row * SIDE + word) * 4, right + at + word * ROW)
            gather(line, lines)


def _tile(left, right, words, out, stride, adds, last, factor, bias):
    """As `tiles._tile`, of all 32 rows of the panel whose first word is at `left`."""
    sums = scratch(SUMS_BYTES)
    multiply(left, right + ROW, words, sums)
    for row in range(PANEL):
        end(sums + row * ROW, out + 4 * row * stride, adds, last, factor, bias)


def tile(unit: Unit, variant: NamedTuple, *, emulated: bool) -> Any:
    """The part that multiplies two panels, see `_tile`; the variant tells it from others."""
    constants = {
        "PANEL": PANEL_ROWS,
        "ROW": ROW_BYTES,
        "SIDE": LANES,
        "BLOCK": BLOCK_BYTES,
        "LINES_BYTES": 2 * ROW_BYTES,
        "SUMS_BYTES": PANEL_ROWS * ROW_BYTES,
    }
    if emulated:
        multiply = part(_sums_emulated, variant, add=_added(unit), gather=_gathered(unit), **constants)
    else:
        multiply = _multiplied(unit)
    return part(_tile, variant, multiply=multiply, end=_ended(unit), **constants)


def _leave(found):
    """Nothing, for units that need no matrix registers."""


def registers(*, taken: bool) -> dict[str, Any]:
    """What a loop calls before its first product and after its last."""
    if taken:
        return {"take_registers": _take, "give_registers_back": _give_back}
    return dict.fromkeys(("take_registers", "give_registers_back"), inlined(_leave))
