"""Bins of magnitude, and the mean squared error, overflow and underflow of elements spread evenly over an interval."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from altgrad.formats.rounding import Rounding
from altgrad.formats.scalar import FloatFormat

PER_BINADE = 16
FINITE = 255 * PER_BINADE
"""Number of bins of finite magnitudes: bin = bits of |x| >> 19."""

EDGES = (np.arange(FINITE + 1, dtype=np.uint32) << np.uint32(19)).view(np.float32).astype(np.float64)
"""Lower edge of each bin, and the upper edge of the last, 2^128."""
EDGES[-1] = 2.0**128
EDGES.setflags(write=False)


def bins_of(magnitudes: np.ndarray) -> np.ndarray:
    """Bin of each finite magnitude, float32."""
    return (np.ascontiguousarray(magnitudes, dtype=np.float32).view(np.uint32) >> np.uint32(19)).astype(np.int64)


def bin_means(bins: np.ndarray) -> np.ndarray:
    """Middle of each bin."""
    return (EDGES[bins] + EDGES[bins + 1]) / 2


def spacing(fmt: FloatFormat, x: np.ndarray) -> np.ndarray:
    """Grid spacing at |x|, of the binade of x, as if the format had no largest value."""
    exponent = np.maximum(np.frexp(x)[1] - 1, fmt.emin)
    exponent = np.where(x == 0, fmt.emin, exponent)
    if fmt.bias is None:
        return np.full(np.shape(x), 2.0**-fmt.mantissa_bits)
    step = np.ldexp(1.0, exponent - fmt.mantissa_bits)
    return step if fmt.has_subnormals else np.where(x < fmt.min_normal, fmt.min_normal, step)


class Errors(NamedTuple):
    """Per interval: mean squared error, chance of overflow, chance that a nonzero element becomes zero."""

    mse: np.ndarray
    over: np.ndarray
    under: np.ndarray


def mean_square_errors(
    fmt: FloatFormat,
    rounding: Rounding,
    low: np.ndarray,
    high: np.ndarray,
    *,
    negative: bool = False,
    bits: int | None = None,
) -> Errors:
    """Of elements spread evenly over [low, high] (one point where both are equal), in units of the format's grid.

    Args:
        negative: the elements are -t for t in the interval, which matters to directed rounding.
        bits: mantissa bits that the elements use at most; None: as many as they like.
    """
    high = np.maximum(high, low)
    mode = _toward(rounding, negative)
    width = high - low
    flat = width <= 1e-9 * high
    safe = np.where(flat, 1.0, width)
    top, below = fmt.max, np.minimum(high, fmt.max)
    inner = _integral(fmt, mode, below) - _integral(fmt, mode, np.minimum(low, top))
    outer = (np.maximum(high - top, 0) ** 3 - np.maximum(low - top, 0) ** 3) / 3
    if bits is not None:
        inner = inner * _discrete(fmt, mode, low, high, bits)
    point = _point(fmt, mode, (low + high) / 2)
    if bits is not None:
        point = np.where(_on_grid(fmt, (low + high) / 2, bits), 0.0, point)
    mse = np.where(flat, point, (inner + outer) / safe)
    step = float(spacing(fmt, np.array([top]))[0])
    first = float(spacing(fmt, np.zeros(1))[0])
    over = _beyond(low, high, top, step, mode)
    under = 1 - _beyond(low, high, 0.0, first, mode)
    return Errors(np.maximum(mse, 0.0), over, np.where(high > 0, under, 0.0))


def _toward(rounding: Rounding, negative: bool) -> str:
    """nearest, zero, away, chance or odd: the rounding as magnitudes see it."""
    if rounding in (Rounding.UP, Rounding.DOWN):
        return "away" if (rounding is Rounding.UP) != negative else "zero"
    return {
        Rounding.TOWARD_ZERO: "zero",
        Rounding.STOCHASTIC: "chance",
        Rounding.ODD: "odd",
    }.get(rounding, "nearest")


def _integral(fmt: FloatFormat, mode: str, x: np.ndarray) -> np.ndarray:
    """Integral of the squared rounding error from the start of x's binade to x, plus that of all binades below it."""
    m = fmt.mantissa_bits
    share = {"nearest": 12.0, "chance": 6.0}.get(mode, 3.0)  # a whole cell's integral is u^3 / share
    if fmt.bias is None:
        u = np.full(np.shape(x), 2.0**-m)
        return _cells(mode, x, u, share)
    exponent = np.frexp(x)[1] - 1
    subnormal = (exponent < fmt.emin) | (x == 0)
    exponent = np.maximum(exponent, fmt.emin)
    start = np.ldexp(1.0, exponent)
    u = np.ldexp(1.0, exponent - m)
    first = fmt.min_subnormal
    lowest = 2.0**fmt.emin
    below = lowest * first**2 / share  # all of [0, 2^emin)
    # sum of 2^j u_j^2 / share over binades j = emin .. exponent - 1: a geometric series of ratio 8
    with np.errstate(over="ignore"):
        series = (np.ldexp(1.0, 3 * exponent - 2 * m) - np.ldexp(1.0, 3 * fmt.emin - 2 * m)) / (7 * share)
        inside = _cells(mode, x - start, u, share, odd=m == 0)
    normal = below + series + inside
    return np.where(subnormal, _cells(mode, x, np.full(np.shape(x), first), share), normal)


def _cells(mode: str, x: np.ndarray, u: np.ndarray, share: float, *, odd: bool = False) -> np.ndarray:
    """Integral from a grid point to the point x above it, with constant spacing u; `odd`: the point's own index is odd."""
    if mode == "nearest":
        n = np.rint(x / u)
        return n * u**3 / share + (x - n * u) ** 3 / 3
    n = np.floor(x / u)
    r = x - n * u
    whole = n * u**3 / share
    if mode == "chance":
        return whole + u * r**2 / 2 - r**3 / 3
    if mode == "zero":
        return whole + r**3 / 3
    away = (u**3 - (u - r) ** 3) / 3
    return whole + (away if mode == "away" else np.where(n % 2 == odd, away, r**3 / 3))


def _point(fmt: FloatFormat, mode: str, x: np.ndarray) -> np.ndarray:
    """Squared error (its mean, where chance decides) at a point."""
    u = spacing(fmt, np.minimum(x, fmt.max))
    n = np.floor(x / u)
    r = x - n * u
    square = {
        "nearest": np.minimum(r, u - r) ** 2,
        "zero": r**2,
        "away": np.where(r == 0, 0.0, (u - r) ** 2),
        "chance": r * (u - r),
        "odd": np.where(n % 2 == 0, np.where(r == 0, 0.0, (u - r) ** 2), r**2),
    }[mode]
    return np.where(x > fmt.max, (x - fmt.max) ** 2, square)


def _discrete(fmt: FloatFormat, mode: str, low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    """Correction for elements that lie on a grid themselves, k of its steps to one of the format's: none is left where
    k <= 1; else a mean over k points instead of an integral, (1 + 2 / k^2) of it for nearest."""
    k = _steps(fmt, np.minimum((low + high) / 2, fmt.max), bits)
    factor = 1 + 2 / np.maximum(k, 1) ** 2 if mode == "nearest" else np.ones_like(k)
    return np.where(k <= 1, 0.0, factor)


def _steps(fmt: FloatFormat, x: np.ndarray, bits: int) -> np.ndarray:
    """Grid spacing of the format at x in steps of numbers with so many mantissa bits."""
    return spacing(fmt, x) / np.ldexp(1.0, np.frexp(x)[1] - 1 - bits)


def _on_grid(fmt: FloatFormat, x: np.ndarray, bits: int) -> np.ndarray:
    """Whether every such number about x is a value of the format."""
    return (_steps(fmt, np.minimum(x, fmt.max), bits) <= 1) & (x <= fmt.max)


def _beyond(low: np.ndarray, high: np.ndarray, value: float, step: float, mode: str) -> np.ndarray:
    """Chance that an element of the interval is rounded beyond a grid value whose spacing above is `step`."""
    width = high - low
    flat = width <= 1e-9 * high
    if mode == "chance":
        a, b = np.clip((low - value) / step, 0, None), np.clip((high - value) / step, 0, None)
        mean = (np.minimum(b, 1) ** 2 - np.minimum(a, 1) ** 2) / 2 + np.maximum(b, 1) - np.maximum(a, 1)
        return np.where(flat, np.clip(a, 0, 1), mean / np.where(flat, 1.0, width / step))
    index = 1 if step == 0 else round(value / step)
    edge = {"nearest": 0.5, "zero": 1.0, "away": 0.0}.get(mode, 0.0 if index % 2 == 0 else 1.0) * step + value
    above = high - np.maximum(low, edge)
    return np.where(flat, (low > edge).astype(np.float64), np.clip(above / np.where(flat, 1.0, width), 0, 1))
