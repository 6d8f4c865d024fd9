"""The oracle: rounding by search among the format's enumerated values, to judge the kernels by.

It shares no algorithm with them. The non-negative values are listed in a sorted table, with one virtual value beyond
max, where the format would go on if its exponent were unbounded. A quotient x / scale is placed between its two
neighbours by binary search, and the mode picks one of them. All of it runs in float64, where a neighbour, its distance
to the quotient and the ratio to the gap are exact, so comparisons are comparisons of real numbers.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from altgrad.errors import KernelError
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import INF_PROBLEM, NAN_PROBLEM
from altgrad.quantization.codec import code_dtype, value_table
from altgrad.quantization.plan import Plan
from altgrad.quantization.quantized import Quantized
from altgrad.quantization.stats import QuantStats
from altgrad.randomness import random_bits as draw_bits

_WIDEST = 19  # bits of the widest format whose values are listed


@cache
def _ladder(fmt: FloatFormat) -> np.ndarray:
    """Non-negative values in order, and the one virtual value beyond max."""
    if fmt.bits > _WIDEST:
        raise KernelError(
            f"the reference kernel lists values of at most {_WIDEST} bits, {fmt} has {fmt.bits}; use 'eager'"
        )
    values = fmt.values()
    values = values[values >= 0]
    top_step = values[-1] - values[-2] if len(values) > 2 else values[-1]
    exponent = np.frexp(values[-1])[1] - 1
    if fmt.mantissa_bits == 0 or values[-1] == np.ldexp(1.0, exponent):  # the gap below a power of two is the smaller
        top_step = np.ldexp(1.0, exponent - fmt.mantissa_bits)
    return np.append(values, values[-1] + top_step)


def _chosen(y: np.ndarray, fmt: FloatFormat, rounding: Rounding, words: np.ndarray | None, bits: int) -> np.ndarray:
    """Magnitude that each finite y rounds to, possibly the virtual value beyond max (also for all that is larger)."""
    ladder = _ladder(fmt)
    magnitude = np.abs(y)
    above = np.searchsorted(ladder, magnitude, side="left").clip(max=len(ladder) - 1)
    exact = ladder[above] == magnitude
    beyond = magnitude > ladder[-1]
    below = np.where(exact, above, np.maximum(above - 1, 0))
    low, high = ladder[below], ladder[above]
    gap = np.where(exact | beyond, 1.0, high - low)
    fraction = np.where(exact | beyond, 0.0, magnitude - low) / gap
    low_is_odd = np.remainder(low / gap, 2) == 1
    negative = np.signbit(y)
    match rounding:
        case Rounding.NEAREST_EVEN:
            up = (fraction > 0.5) | ((fraction == 0.5) & low_is_odd)
        case Rounding.NEAREST_AWAY:
            up = fraction >= 0.5
        case Rounding.TOWARD_ZERO:
            up = np.zeros_like(negative)
        case Rounding.UP:
            up = (fraction > 0) & ~negative
        case Rounding.DOWN:
            up = (fraction > 0) & negative
        case Rounding.ODD:
            up = (fraction > 0) & ~low_is_odd
        case Rounding.STOCHASTIC:
            assert words is not None
            up = np.floor(fraction * 2.0**bits) + words >= 2.0**bits
    return np.where(up, high, np.where(beyond, ladder[-1], low))


def _beyond_max(fmt: FloatFormat, rounding: Rounding, overflow: Overflow, negative: np.ndarray) -> np.ndarray:
    """What an overflow becomes, as a magnitude: the table of policies, written out."""
    if overflow is Overflow.NAN:
        return np.full(negative.shape, np.nan)
    if overflow is Overflow.INF:
        return np.full(negative.shape, np.inf)
    if overflow in (Overflow.SATURATE, Overflow.SATURATE_FINITE) or not fmt.has_inf:
        return np.full(negative.shape, fmt.max)
    inward = {
        Rounding.TOWARD_ZERO: np.ones_like(negative),
        Rounding.ODD: np.ones_like(negative),
        Rounding.UP: negative,
        Rounding.DOWN: ~negative,
    }.get(rounding, np.zeros_like(negative))
    return np.where(inward, fmt.max, np.inf)


def round_by_search(
    y: np.ndarray,
    x: np.ndarray,
    fmt: FloatFormat,
    rounding: Rounding,
    overflow: Overflow,
    words: np.ndarray | None = None,
    bits: int = 24,
    clamp: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(payload, overflowed) of quotients y of inputs x; float64 arrays of one shape."""
    if clamp:
        y = np.where(np.isfinite(x), np.clip(y, -fmt.max, fmt.max), y)
    finite = np.isfinite(y)
    rounded = _chosen(np.where(finite, y, 0.0), fmt, rounding, words, bits)
    negative = np.signbit(y)
    over = np.isfinite(x) & ((finite & (rounded > fmt.max)) | np.isinf(y))
    if overflow in (Overflow.SATURATE, Overflow.NAN):
        over |= np.isinf(x)
    magnitude = np.where(over, _beyond_max(fmt, rounding, overflow, negative), rounded)
    magnitude = np.where(np.isinf(x) & ~over, np.inf, magnitude)
    magnitude = np.where(np.isnan(y), np.nan, magnitude)
    payload = np.copysign(magnitude, y)
    return (payload if fmt.has_negative_zero else payload + 0.0), over


def codes_by_search(payload: np.ndarray, fmt: FloatFormat) -> tuple[np.ndarray, int]:
    """(codes, problems): the code whose value is the payload, by search in the table of all codes."""
    table = value_table(fmt)
    positive = np.arange(len(table)) < 2**fmt.magnitude_bits
    codes = np.zeros(payload.shape, np.int64)
    problems = 0
    for sign, side in ((False, positive), (True, ~positive)):
        mine = np.flatnonzero(np.isfinite(table) & side & (np.abs(table) <= fmt.max))
        order = mine[np.argsort(table[mine], kind="stable")]
        here = np.isfinite(payload) & (np.signbit(payload) == sign)
        if sign and not fmt.has_negative_zero:
            here &= payload != 0
        if here.any():
            codes[here] = order[np.searchsorted(table[order], payload[here])]
    for special, found, problem in (
        (np.isnan(payload), np.flatnonzero(np.isnan(table)), NAN_PROBLEM),
        (payload == np.inf, np.flatnonzero(table == np.inf), INF_PROBLEM),
        (payload == -np.inf, np.flatnonzero(table == -np.inf), INF_PROBLEM),
    ):
        if special.any() and not len(found):
            problems |= problem
        elif special.any():
            # several NaN codes: the positive quiet one, with only the top significand bit set
            nans = [c for c in found if c < 2**fmt.magnitude_bits] or list(found)
            half = 2 ** (fmt.mantissa_bits - 1) if fmt.mantissa_bits else 0
            codes[special] = next((c for c in nans if c % 2**fmt.mantissa_bits == half), nans[0])
    return codes, problems


def run(plan: Plan, x: Tensor, scale: Tensor | float, key: tuple[int, int] | None, out: Tensor | None) -> Quantized:
    """One pass: values, codes and statistics, as the plan wants them. Slow: for tests."""
    work = x.detach().to(plan.compute_dtype)
    wide = work.double().numpy()
    words = None
    if key is not None:
        drawn = draw_bits(torch.tensor(key, dtype=torch.int64, device="cpu"), x.numel(), plan.random_bits)
        words = drawn.view(x.shape).numpy().astype(np.float64)
    payload, over = round_by_search(
        (work / scale).double().numpy(),
        wide,
        plan.grid,
        plan.rounding,
        plan.overflow,
        words,
        plan.random_bits,
        plan.clamp,
    )
    value = (torch.from_numpy(np.asarray(payload)).to(plan.compute_dtype) * scale).to(x.dtype)
    stats = None
    if plan.stats:
        result = value.double().numpy()
        kept = np.isfinite(wide) & np.isfinite(result)
        fields = (
            np.abs(wide[np.isfinite(wide)]).max(initial=0.0),
            wide.size,
            (over | (np.isfinite(wide) & np.isinf(result))).sum(),
            ((wide != 0) & (result == 0)).sum(),
            (~np.isfinite(wide)).sum(),
            ((wide[kept] - result[kept]) ** 2).sum(),
            (wide[kept] ** 2).sum(),
        )
        stats = QuantStats(torch.tensor([float(f) for f in fields], dtype=torch.float64, device="cpu"))
    coded, problems = None, 0
    if plan.codes:
        found, problems = codes_by_search(np.asarray(payload), plan.grid)
        coded = torch.from_numpy(found).to(code_dtype(plan.grid))
    if out is not None:
        value = out.copy_(value)
    return Quantized(value if plan.values else None, coded, None, stats, None, problems)


def decode(plan: Plan, codes: Tensor, scale: Tensor | float, upper: None, out: Tensor | None) -> Tensor:
    """scale * value(code), by indexing the table of values."""
    values = torch.from_numpy(np.asarray(value_table(plan.format)[codes.numpy()])).to(plan.compute_dtype)
    result = (values * scale).to(plan.dtype)
    return result if out is None else out.copy_(result)
