"""What the block loops are made of: parameters, the scale of an amax, and runs of elements under known scales.

The functions with an underscore are templates: `kernels.cpu.block_loops.py` binds the constants in capitals before they are
compiled.
"""

# ruff: noqa: F821  (names are bound to the templates)
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from altgrad.jit.grid_rounding import by_chance, by_rule, by_short_chance, code_of, nearest_even, random_word, settled
from altgrad.jit.grid_table import Family
from altgrad.jit.machine import add, band, below, bits_of, bor, bxor, float_of, in_wide_vectors, low_word, shr, widened
from altgrad.jit.memory import load, store, store_code, store_word, stored, table_reader
from altgrad.jit.storage import FLOAT32, from_storage
from altgrad.jit.template import called, inlined

BY_ADDITION, BY_RULE, BY_SHORT_CHANCE = int(Family.BY_ADDITION), int(Family.BY_RULE), int(Family.BY_SHORT_CHANCE)
POWER_OF_TWO, PLAIN_FLOAT, ROUNDED = 0, 1, 2  # kinds of scale

CALL_PARAMETERS = ("x", "out", "codes", "scales", "partials", "seed", "stream", "upper")  # the others stay for a shape
PARAMETERS = (
    *CALL_PARAMETERS,
    "element_table",
    "scale_table",
    "rows",
    "columns",
    "tile_rows",
    "tile_columns",
    "emax",
    "up_from",
    "smallest_scale",  # bits of the smallest positive scale of a rounded scale format
    "plain",  # finite elements need neither policy nor sign of zero: max and sign do
    "poison",  # a NaN makes the scale NaN
    "group",  # units per partial sum of the statistics
    "element_max",  # float64, as is upper
)
Parameters = NamedTuple("Parameters", [(name, int) for name in PARAMETERS])
_FLOATS = ("element_max", "upper")


def parameter_reader(row: type) -> Any:
    """A compiled function (like, table) -> `row`, of a table of integers, addresses and the floats among them."""
    return table_reader(row, floats=_FLOATS)


read_parameters = parameter_reader(Parameters)


@intrinsic(prefer_literal=True)
def run_amax(typing_context, address, index, kind, count):
    """Largest magnitude bits (uint32, as of float32) of `count` elements (a constant power of two), by vectors."""
    length, storage = count.literal_value, kind.literal_value
    width = 32 if storage == FLOAT32 else 16

    def generate(context, builder, signature, args):
        item = ir.IntType(width)
        vector = ir.VectorType(item, length)
        pointer = builder.gep(builder.inttoptr(args[0], item.as_pointer()), [args[1]], inbounds=True)
        loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=width // 8)
        magnitudes = builder.and_(loaded, ir.Constant(vector, [2 ** (width - 1) - 1] * length))
        name = f"llvm.vector.reduce.umax.v{length}i{width}"
        reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(item, [vector]), name)
        largest = builder.call(reduce, [magnitudes])
        return (
            largest
            if storage == FLOAT32
            else builder.bitcast(from_storage(context, builder, largest, storage), ir.IntType(32))
        )

    return types.uint32(types.int64, types.int64, kind, count), generate


@intrinsic
def peek(typing_context, address, index):
    """Entry `index` of a float32 table that is written and read back (`load` says that inputs are not written)."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.FloatType().as_pointer())
        return builder.load(builder.gep(pointer, [args[1]], inbounds=True))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def poke(typing_context, address, index, value):
    """Write entry `index` of a float32 table that `peek` reads."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.FloatType().as_pointer())
        builder.store(args[2], builder.gep(pointer, [args[1]], inbounds=True))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


# -- scales -----------------------------------------------------------------------------------------------------------


@inlined
def power_of_two(exponent):
    """2^exponent as float32, for -149 <= exponent <= 127."""
    if exponent >= -126:
        return float_of(np.uint32((exponent + 127) << 23))
    return float_of(np.uint32(1 << (exponent + 149)))


def _scale(amax, poisoned, scale_grid, p):
    """(stored scale as bits, multiplier, reciprocal where multiplying by it is exact) of a tile's amax bits."""
    if SCALE == POWER_OF_TWO:
        bits, lift = amax, 127
        if amax < np.uint32(1 << 23):  # subnormal: lift it, exactly
            bits, lift = bits_of(float_of(amax) * np.float32(2.0**32)), 159
        exponent = np.int64(bits >> np.uint32(23)) - lift
        if np.int64(bits & np.uint32(0x7FFFFF)) >= p.up_from:
            exponent += 1
        exponent = min(max(exponent - p.emax, -127), 127)
        if amax == np.uint32(0):
            exponent = -127
        if poisoned:
            return np.uint32(255), np.float32(np.nan), np.float32(np.nan)
        return np.uint32(exponent + 127), power_of_two(exponent), power_of_two(-exponent)
    largest = np.float32(p.element_max)
    if SCALE == PLAIN_FLOAT:
        s = (float_of(amax) if amax > np.uint32(0) else np.float32(1.0)) / largest
        s = max(s, np.float32(2.0**-126))
        if poisoned:
            s = np.float32(np.nan)
        return bits_of(s), s, s
    ideal = float_of(amax) / largest
    ideal = ideal / np.float32(p.upper)
    rounded = by_rule(min(bits_of(ideal), scale_grid.clamp_bits), False, scale_grid)
    rounded = max(min(rounded, scale_grid.max_bits), np.uint32(p.smallest_scale))
    s = np.float32(p.upper) * float_of(rounded)
    if poisoned:
        return scale_grid.nan_code, np.float32(np.nan), np.float32(np.nan)
    return code_of(rounded, scale_grid)[0], s, s


# -- runs of elements -------------------------------------------------------------------------------------------------


def _element(v, s, reciprocal, index, before, between, grid):
    """(payload bits, overflowed) of one element."""
    y = v * reciprocal if SCALE == POWER_OF_TWO else v / s
    bits = bits_of(y)
    sign = band(bits, grid.sign_mask)
    magnitude = bxor(bits, sign)
    magnitude = magnitude if magnitude < grid.clamp_bits else grid.clamp_bits
    if FAMILY == BY_ADDITION:
        rounded, _ = nearest_even(magnitude, grid)
    elif FAMILY == BY_RULE:
        rounded = by_rule(magnitude, sign != grid.zero, grid)
    elif FAMILY == BY_SHORT_CHANCE:
        rounded, _ = by_short_chance(magnitude, random_word(index, before, between), grid)
    else:
        rounded = by_chance(magnitude, random_word(index, before, between), grid)
    return settled(rounded, bits_of(v), sign, grid)


def _span(grid, x, out, codes, count, s, reciprocal, multipliers, reciprocals, index, before, between):
    """Quantize `count` contiguous elements; (problems, overflows, underflows, nonfinites).

    The scale is s, or with EACH the entry of `multipliers`. Under a NaN scale nothing overflows and any code will do.
    """
    in_wide_vectors()
    problems, overflows, underflows, nonfinites = grid.zero, grid.zero, grid.zero, grid.zero
    for i in range(count):
        v = load(x, i, KIND)
        if EACH:
            s = peek(multipliers, i)
            reciprocal = peek(reciprocals, i)
        payload, over = element(v, s, reciprocal, add(index, low_word(index, i)), before, between, grid)
        r = float_of(payload) * s
        if VALUES or STATS:
            store(out, i, r, KIND)
        if CODE_BYTES:
            code, problem = code_of(payload, grid)
            problems = bor(problems, problem if s == s else grid.zero)
            store_code(codes, i, code if s == s else grid.zero, CODE_BYTES)
        if STATS:
            r = stored(r, KIND)
            overflows = add(overflows, grid.one if over and s == s else grid.zero)
            x_magnitude = band(bits_of(v), grid.magnitude_mask)
            r_magnitude = band(bits_of(r), grid.magnitude_mask)
            vanished = x_magnitude != grid.zero and r_magnitude == grid.zero
            underflows = add(underflows, grid.one if vanished else grid.zero)
            nonfinites = add(nonfinites, grid.one if x_magnitude >= grid.inf_bits else grid.zero)
    return problems, overflows, underflows, nonfinites


def _plain_span(grid, x, out, codes, count, s, reciprocal, multipliers, reciprocals):
    """As `_span`, nearest even, of finite elements that saturate and keep the sign of zero: all have codes."""
    in_wide_vectors()
    for i in range(count):
        v = load(x, i, KIND)
        if EACH:
            s = peek(multipliers, i)
            reciprocal = peek(reciprocals, i)
        bits = bits_of(v * reciprocal if SCALE == POWER_OF_TWO else v / s)
        sign = band(bits, grid.sign_mask)
        magnitude = bxor(bits, sign)
        magnitude = magnitude if magnitude < grid.clamp_bits else grid.clamp_bits
        rounded, code = nearest_even(magnitude, grid)
        if VALUES:
            rounded = rounded if rounded < grid.max_bits else grid.max_bits
            store(out, i, float_of(bor(rounded, sign)) * s, KIND)
        if CODE_BYTES:
            code = grid.max_code if below(grid.max_code, code) else code
            store_code(codes, i, bor(code, shr(sign, grid.code_sign_shift)), CODE_BYTES)


def _row_amax(x, count):
    """(largest magnitude bits, largest finite magnitude bits) of `count` contiguous elements."""
    in_wide_vectors()
    largest = np.uint32(0)
    i = 0
    if BLOCK:
        largest = run_amax(x, 0, KIND, BLOCK)
    else:
        while i + 16 <= count:
            found = run_amax(x, i, KIND, 16)
            largest = found if found > largest else largest
            i += 16
        while i < count:
            found = band(bits_of(load(x, i, KIND)), np.uint32(0x7FFFFFFF))
            largest = found if found > largest else largest
            i += 1
    inf = np.uint32(0x7F800000)
    finite = largest
    if largest >= inf:
        finite = np.uint32(0)
        for j in range(count):
            found = band(bits_of(load(x, j, KIND)), np.uint32(0x7FFFFFFF))
            found = found if found < inf else np.uint32(0)
            finite = found if found > finite else finite
    return largest, finite


@called
def record(place, largest, overflows, underflows, nonfinites, sums):
    """Store the statistics of one group of tiles (`kernels.cpu.loops.total` adds them in order)."""
    store_word(place, 0, widened(float_of(largest), True))
    store_word(place, 1, float(overflows))
    store_word(place, 2, float(underflows))
    store_word(place, 3, float(nonfinites))
    store_word(place, 4, sums[0])
    store_word(place, 5, sums[1])
