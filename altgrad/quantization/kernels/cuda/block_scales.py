"""Scales of blocks in Triton, from the bits of a block's amax, as `kernels.cpu.block_parts` finds them."""

from __future__ import annotations

import triton
import triton.language as tl

from altgrad.quantization.kernels.cuda.bits import NEAREST_EVEN, code_of, read_grid, round_magnitude

POWER_OF_TWO, PLAIN_FLOAT, ROUNDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def power_of_two(exponent):
    """2^exponent as float32, for int32 -149 <= exponent <= 127."""
    normal = (exponent + 127) << 23
    shift = tl.where(exponent < -126, exponent + 149, 0)
    subnormal = (exponent * 0 + 1) << shift
    return tl.where(exponent >= -126, normal, subnormal).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(
    amax,
    poisoned,
    scale_table,
    upper,
    emax,
    up_from,
    element_max,
    smallest,
    SCALE: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
):
    """(stored scale as uint32, multiplier, reciprocal where multiplying by it is exact, the block's own scale) of amax bits.

    Amax bits are uint32. The multiplier is the block's own scale times the tensor's.
    """
    if SCALE == POWER_OF_TWO:
        subnormal = amax < 0x800000
        lifted = (amax.to(tl.float32, bitcast=True) * 4294967296.0).to(tl.uint32, bitcast=True)
        bits = tl.where(subnormal, lifted, amax).to(tl.int32)
        exponent = (bits >> 23) - tl.where(subnormal, 159, 127)
        exponent = exponent + tl.where((bits & 0x7FFFFF) >= up_from, 1, 0) - emax
        exponent = tl.where(exponent > 127, 127, tl.where(exponent < -127, -127, exponent))
        exponent = tl.where(amax == 0, -127, exponent)
        raw = tl.where(poisoned, 255, exponent + 127).to(tl.uint32)
        multiplier = tl.where(poisoned, float("nan"), power_of_two(exponent))
        return raw, multiplier, tl.where(poisoned, float("nan"), power_of_two(-exponent)), multiplier
    largest = element_max + tl.zeros_like(amax.to(tl.float32, bitcast=True))
    if SCALE == PLAIN_FLOAT:
        found = tl.where(amax > 0, amax.to(tl.float32, bitcast=True), 1.0)
        multiplier = tl.math.div_rn(found, largest)
        multiplier = tl.where(multiplier < 1.1754943508222875e-38, 1.1754943508222875e-38, multiplier)
        multiplier = tl.where(poisoned, float("nan"), multiplier)
        return multiplier.to(tl.uint32, bitcast=True), multiplier, multiplier, multiplier
    ideal = tl.math.div_rn(amax.to(tl.float32, bitcast=True), largest)
    level = largest * 0 + 1
    if TWO_LEVELS:
        level = tl.load(upper) + tl.zeros_like(largest)
        ideal = tl.math.div_rn(ideal, level)
    grid = read_grid(scale_table, False)
    bits = ideal.to(tl.uint32, bitcast=True)
    bits = tl.where(bits < grid.clamp_bits, bits, grid.clamp_bits)
    rounded = round_magnitude(bits, bits * 0, bits, bits, grid, NEAREST_EVEN, False)
    rounded = tl.where(rounded < grid.max_bits, rounded, grid.max_bits)
    least = tl.full((), smallest, tl.float32).to(tl.uint32, bitcast=True)
    rounded = tl.where(rounded > least, rounded, least)
    own = tl.where(poisoned, float("nan"), rounded.to(tl.float32, bitcast=True))
    multiplier = level * own
    code, _ = code_of(rounded, grid, False)
    return tl.where(poisoned, grid.nan_code, code), multiplier, multiplier, own
