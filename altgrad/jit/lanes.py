"""Sums of squares in a fixed number of lanes, so that they have the same bits on every processor.

A compiler that may reorder a sum does so by the target's vectors: four lanes here, sixteen there. These sums are spelled
in vectors of `LANES`, which narrower targets take in pieces: element i goes to lane i mod LANES, lanes are added in a
fixed tree, and no product is fused with its sum.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from altgrad.jit.storage import FLOAT64, ITEM_BYTES, from_storage, stored_type

LANES = 16
LANE_BYTES = 2 * 8 * LANES  # two rows of lanes, of errors and of squares

_I64, _FLOAT, _DOUBLE = ir.IntType(64), ir.FloatType(), ir.DoubleType()


def _summed_in(kind: int, careful: bool):
    return _DOUBLE if careful or kind == FLOAT64 else _FLOAT


def _rows(builder, lanes, element):
    """Pointers to the two rows of lanes."""
    vector = ir.VectorType(element, LANES).as_pointer()
    return [builder.inttoptr(builder.add(lanes, ir.Constant(_I64, row * 8 * LANES)), vector) for row in (0, 1)]


def _read(context, builder, address, index, kind, careful, lanes):
    """`lanes` elements (0: one) from `index` on, as what they are summed in."""
    first = builder.gep(builder.inttoptr(address, stored_type(kind).as_pointer()), [index], inbounds=True)
    pointer = builder.bitcast(first, stored_type(kind, lanes).as_pointer())
    value = from_storage(context, builder, builder.load(pointer, align=ITEM_BYTES[kind]), kind)
    if careful and kind != FLOAT64:
        value = builder.fpext(value, ir.VectorType(_DOUBLE, lanes) if lanes else _DOUBLE)
    return value


def _squares(context, builder, x, q, index, kind, careful, lanes):
    """((x - q)^2, x^2) of `lanes` elements (0: one), where careful 0 unless both are finite."""
    value = _read(context, builder, x, index, kind, careful, lanes)
    error = builder.fsub(value, _read(context, builder, q, index, kind, careful, lanes))
    if careful:
        ends = [ir.Constant(error.type, [end] * lanes if lanes else end) for end in (float("-inf"), float("inf"))]
        both = builder.and_(builder.fcmp_ordered(">", error, ends[0]), builder.fcmp_ordered("<", error, ends[1]))
        zero = ir.Constant(error.type, [0.0] * lanes if lanes else 0.0)
        error, value = builder.select(both, error, zero), builder.select(both, value, zero)
    return builder.fmul(error, error), builder.fmul(value, value)


@intrinsic(prefer_literal=True)
def add_squares(typing_context, lanes, x, q, count, kind, careful):
    """Add (x - q)^2 and x^2 of the `count` elements at two addresses to the lanes at a third.

    In the type that arithmetic on the constant storage kind is done in; with the constant `careful` in float64, and of
    elements only that are finite on both sides.
    """
    storage, with_care = kind.literal_value, careful.literal_value

    def generate(context, builder, signature, args):
        at, x, q, count = args[:4]
        element = _summed_in(storage, with_care)
        vector = ir.VectorType(element, LANES)
        rows = _rows(builder, at, element)
        sums = [cgutils.alloca_once(builder, vector) for _ in rows]
        for row, total in zip(rows, sums, strict=True):
            builder.store(builder.load(row, align=8), total)
        whole = builder.and_(count, ir.Constant(_I64, -LANES))
        with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), whole, ir.Constant(_I64, LANES), _I64) as (i, _):
            for total, square in zip(sums, _squares(context, builder, x, q, i, storage, with_care, LANES), strict=True):
                builder.store(builder.fadd(builder.load(total), square), total)
        for row, total in zip(rows, sums, strict=True):
            builder.store(builder.load(total), row, align=8)
        with cgutils.for_range_slice(builder, whole, count, ir.Constant(_I64, 1), _I64) as (i, _):
            lane = builder.sub(i, whole)
            for row, square in zip(rows, _squares(context, builder, x, q, i, storage, with_care, 0), strict=True):
                place = builder.gep(builder.bitcast(row, element.as_pointer()), [lane], inbounds=True)
                builder.store(builder.fadd(builder.load(place), square), place)
        return context.get_dummy_value()

    return types.void(lanes, x, q, count, kind, careful), generate


@intrinsic(prefer_literal=True)
def lane_sums(typing_context, lanes, kind, careful):
    """(sum of squared errors, sum of squares) in float64 of the lanes that `add_squares` filled; clears them."""
    storage, with_care = kind.literal_value, careful.literal_value
    pair = types.UniTuple(types.float64, 2)

    def generate(context, builder, signature, args):
        element = _summed_in(storage, with_care)
        found = []
        for row in _rows(builder, args[0], element):
            total = builder.load(row, align=8)
            builder.store(ir.Constant(total.type, None), row, align=8)
            if element == _FLOAT:
                total = builder.fpext(total, ir.VectorType(_DOUBLE, LANES))
            width = LANES
            while width > 1:
                width //= 2
                low, high = (
                    builder.shuffle_vector(total, total, ir.Constant(ir.VectorType(ir.IntType(32), width), list(part)))
                    for part in (range(width), range(width, 2 * width))
                )
                total = builder.fadd(low, high)
            found.append(builder.extract_element(total, ir.Constant(ir.IntType(32), 0)))
        return context.make_tuple(builder, signature.return_type, found)

    return pair(lanes, kind, careful), generate


@intrinsic
def clear_lanes(typing_context, lanes):
    """Set all lanes at an address to zero."""

    def generate(context, builder, signature, args):
        for row in _rows(builder, args[0], _DOUBLE):
            builder.store(ir.Constant(ir.VectorType(_DOUBLE, LANES), None), row, align=8)
        return context.get_dummy_value()

    return types.void(lanes), generate
