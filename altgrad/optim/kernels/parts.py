"""What the fused CPU steps are made of: the table of a step's numbers, small arithmetic and counting."""

# ruff: noqa: F821  (names are bound to the templates, and Numba compiles what is plain)
from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from altgrad.jit.machine import band, below, bits_of, counted, float_of, low_word, shl
from altgrad.jit.memory import kept, reload
from altgrad.jit.storage import FLOAT32
from altgrad.jit.threads import CHUNK

TILE = 512  # elements whose temporaries stay in the first-level cache: few, so that memory is read all the time
COUNT_TILE = CHUNK  # elements per row of counts
COUNT_FIELDS = 6  # attempted, flips, stalled, sign flips, clipped, saturated


class Rule(IntEnum):
    """How weights are moved."""

    ADAM = 0
    GRID_STEPS = 1
    LION = 2
    SIGN = 3
    MADAM = 4
    LNS = 5
    GATHER = 6  # nothing but the momentum of GRID_STEPS


class Landing(IntEnum):
    """What becomes of the attempted weights."""

    NONE = 0  # they are written as they are
    ROUND = 1  # rounded to the grid, and counted
    KAHAN = 2  # rounded; the error goes to a bfloat16 buffer
    ECO = 3  # rounded; the error goes to the first moment


class Pull(IntEnum):
    """What GRID_STEPS steps along."""

    MOMENTUM = 0
    NESTEROV = 1  # gradient and momentum
    READY = 2  # what the first moment's address holds, over `Field.RMS`


class Field(IntEnum):
    """Words of a step's table: addresses, bit patterns, then float64 numbers."""

    SECOND = 0  # address: second moment
    EXTRA = 1  # address: Kahan's buffer
    ROUND_TABLE = 2  # address: the grid, as the quantization kernels know it
    EMIN_BITS = 3  # float32 bits of 2^emin
    EMIN_FIELD = 4  # float64 exponent field of 2^emin
    MANTISSA_FIELD = 5  # M in float64's exponent field
    RELATIVE = 6  # 2^-M
    LIMIT = 7  # the format's max
    KEEP = 8  # share of the new value in the first moment; momentum (grid_steps)
    BETA2 = 9
    REST2 = 10  # 1 - beta2; share of the new value in Lion's average
    ROOT = 11  # sqrt(1 - beta2^t) (Adam); 1 - beta^t (Madam)
    EPS = 12
    SIZE = 13  # -lr / (1 - beta1^t) (Adam), -lr
    DECAYED = 14  # 1 - rate of decay; rate (grid_steps, Kahan)
    CLIP = 15  # largest |grid_steps|; largest normalised gradient (Madam)
    SHARE = 16  # ECO: (1 - beta1^t) / lr * (1 - 1 / beta1)
    BOUND = 17  # Madam: largest |w|
    RMS = 18  # size of the momentum that counts as one


class Variant(NamedTuple):
    """What one compiled step does: the constants of its template."""

    RULE: int
    LANDING: int = Landing.NONE
    SPACING: int = 0  # 0 none, 1 by exponent, 2 uniform
    ON_GRADIENT: bool = False  # spacing times gradient goes into the moments
    ON_STEP: bool = False  # spacing times the step
    STOCHASTIC: bool = False  # of rules that round by themselves
    FAMILY: int = 0  # rounding arithmetic of the other rules
    PLAIN: bool = False  # of the other rules: beyond max is max, -0 stays (`jit.grid_table.settles_plainly`)
    PULL: int = 0  # of GRID_STEPS
    POWER: bool = False  # every scale is a power of two: divide by multiplying
    FMA: bool = False  # fused multiply-add where torch's kernels have it


@intrinsic
def llvm_fma(typing_context, a, b, c):
    """a * b + c, rounded once."""

    def generate(context, builder, signature, args):
        return builder.fma(*args)

    return a(a, a, a), generate


@intrinsic
def floor(typing_context, x):
    """Largest whole number <= x, as one vector instruction."""

    def generate(context, builder, signature, args):
        kind = ir.FloatType() if x == types.float32 else ir.DoubleType()
        function = builder.module.declare_intrinsic("llvm.floor", [kind])
        return builder.call(function, args)

    return x(x), generate


@intrinsic
def threshold(typing_context, word):
    """1 - word / 2^32 as float64, exactly: a fraction f goes up iff f >= it, that is floor(f * 2^32) + word >= 2^32."""

    def generate(context, builder, signature, args):
        i64, double = ir.IntType(64), ir.DoubleType()
        placed = builder.shl(builder.zext(args[0], i64), ir.Constant(i64, 20))
        above_one = builder.bitcast(builder.or_(placed, ir.Constant(i64, 0x3FF0000000000000)), double)
        return builder.fsub(ir.Constant(double, 2.0), above_one)

    return types.float64(types.uint32), generate


@intrinsic
def exponent_as_double(typing_context, bits):
    """The exponent field (a uint64 below 2^52) of float64 bits, as float64."""

    def generate(context, builder, signature, args):
        i64 = ir.IntType(64)
        field = builder.lshr(args[0], ir.Constant(i64, 52))
        high = builder.or_(field, ir.Constant(i64, 0x4330000000000000))
        return builder.fsub(builder.bitcast(high, ir.DoubleType()), ir.Constant(ir.DoubleType(), 2.0**52))

    return types.float64(types.uint64), generate


@intrinsic
def power_of_two(typing_context, exponent):
    """2^exponent for a whole float64 exponent of a normal float64, by its bits; NaN gives garbage."""

    def generate(context, builder, signature, args):
        i64, double = ir.IntType(64), ir.DoubleType()
        shifted = builder.fadd(
            args[0], ir.Constant(double, 1023.0 + 1.5 * 2.0**52)
        )  # low bits hold the biased exponent
        bits = builder.shl(builder.bitcast(shifted, i64), ir.Constant(i64, 52))
        return builder.bitcast(bits, double)

    return types.float64(types.float64), generate


def _multiply_add(a, b, c):
    """a * b + c, rounded once where torch's kernels do so."""
    return fma(a, b, c) if FMA else a * b + c


def _lerp(start, end, share):
    """start + share * (end - start) for share < 0.5, else end - (end - start) * (1 - share), as torch's lerp."""
    half = np.float32(0.5)
    base = start if share < half else end
    part = share if share < half else share - np.float32(1)
    return multiply_add(part, end - start, base)


def _spacing(w, s, emin_bits, relative):
    """scale * 2^(max(floor(log2|w / s|), emin) - M)."""
    if SPACING == 2:
        return s * relative
    bits = band(bits_of(w * (np.float32(1) / s) if POWER else w / s), low_word(emin_bits, np.uint64(0x7F800000)))
    bits = emin_bits if below(bits, emin_bits) else bits
    return float_of(bits) * relative * s


def _exponential(x):
    """e^x to about an ulp, in vector lanes: 2^n * e^r with |r| <= log(2) / 2; coefficients of Cephes' expf (Moshier)."""
    y = np.float32(88) if x > np.float32(88) else (np.float32(-87) if x < np.float32(-87) else x)
    n = floor(y * np.float32(1.44269504088896341) + np.float32(0.5))
    r = y - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * r + np.float32(1.3981999507e-3)
    series = series * r + np.float32(8.3334519073e-3)
    series = series * r + np.float32(4.1665795894e-2)
    series = series * r + np.float32(1.6666665459e-1)
    series = series * r + np.float32(5.0000001201e-1)
    series = series * r * r + r + np.float32(1)
    placed = bits_of(n + np.float32(127 + 1.5 * 2**23))  # the low bits hold the biased exponent
    value = series * float_of(shl(placed, np.uint32(23)))
    return value if x == x else x


def _normalised(pull, second, root, clip):
    """g / sqrt(v / (1 - beta^t)), limited to +-clip; 0 where v is."""
    size = np.sqrt(second / root)
    size = np.float32(np.inf) if size == np.float32(0) else size
    pull = pull / size
    pull = clip if pull > clip else pull
    return -clip if pull < -clip else pull


def _within(aim, limit):
    """`aim` without what lies beyond +-limit."""
    return limit if aim > limit else (-limit if aim < -limit else aim)


def _no_counts():
    """Zero (attempted, unmoved, stalled, sign flips, saturated), in the 32-bit lanes that `_with_weight` adds to."""
    zero = np.uint32(0)
    return zero, zero, zero, zero, zero


def _with_weight(counts, tried, before, landed, over):
    """The counts after one more weight."""
    attempted, unmoved, stalled, crossed, beyond = counts
    still = landed == before
    return (
        counted(attempted, tried),
        counted(unmoved, still),
        counted(stalled, tried & still),
        counted(crossed, before * landed < np.float32(0)),
        counted(beyond, over),
    )


def _tally(before, moves, w, count):
    """Counts of a tile of a rule that rounds by itself; `moves` holds steps. The last count is the rule's to make."""
    counts = no_counts()
    for i in range(count):
        tried = kept(moves, i) != np.float32(0)
        counts = with_weight(counts, tried, kept(before, i), reload(w, i, FLOAT32), False)
    return counts
