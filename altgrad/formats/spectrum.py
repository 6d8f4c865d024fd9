"""Spectrum: how a tensor's magnitudes are spread, from which follows what any format and scale would do to it.

A spectrum counts elements by sign and by bins of magnitude, 16 to a binade of float32 (bin = bits of |x| >> 19), and keeps
what a histogram cannot give: zeros, NaN and inf apart, the exact amax and sum of squares, and how many mantissa bits any
element uses. Two spectra add up to that of both tensors together. Within a bin elements count as evenly spread; the mean
squared error of a bin is then an integral that is known in closed form: with grid spacing u, n the nearest grid index of x
and d = x - n u,

    integral from 0 to x of (t - round(t))^2 dt  =  n u^3 / 12 + d^3 / 3        (round to nearest)

How far a prediction may be off is part of it (`Prediction.spread_db`): elements are not spread evenly but drawn, and a
squared rounding error has a standard deviation of 0.9 of its mean. Blocks need more than magnitudes, namely how far each
element lies below the largest of its block: `BlockSpectrum`. This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from altgrad.errors import FormatError, OptionError
from altgrad.formats.block import BlockFormat
from altgrad.formats.block_spectrum import BlockSpectrum
from altgrad.formats.catalog import get_format
from altgrad.formats.magnitudes import EDGES, FINITE, bin_means, mean_square_errors, spacing
from altgrad.formats.rounding import Rounding, as_option
from altgrad.formats.scalar import FloatFormat

STORAGES = ("nearest", "stochastic", "master")
"""Where an update can be lost: a weight on the grid rounded to nearest or stochastically, or a float32 master's code."""

Block = int | tuple[int, int]


@dataclass(frozen=True)
class Prediction:
    """What a format does to a tensor.

    sqnr_db: 10 log10(sum of squares / sum of squared errors); inf without error, NaN where every element is zero.
    overflow, underflow: fractions of all elements, as `QuantStats` counts them.
    spread_db: one standard deviation of `sqnr_db` by chance, for elements that are spread evenly within bins; where they
        gather on a few values (a grid of their own, Adam's first updates), a decibel more is open.
    saturation, flushed: shares of the squared error from elements beyond the largest value, and from those that become 0.
    """

    sqnr_db: float
    overflow: float
    underflow: float
    spread_db: float = 0.0
    saturation: float = 0.0
    flushed: float = 0.0

    @property
    def noise(self) -> float:
        """Squared error in units of the signal's: 10^(-sqnr_db / 10); 0 without error or signal."""
        return 0.0 if not math.isfinite(self.sqnr_db) else 10.0 ** (-self.sqnr_db / 10)

    @property
    def limit(self) -> str:
        """What makes up most of the squared error: "range above", "range below", "resolution", or "exact"."""
        if self.noise == 0:
            return "exact"
        shares = {"range above": self.saturation, "range below": self.flushed}
        most = max(shares, key=lambda name: shares[name])
        return most if shares[most] > 0.5 else "resolution"


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Counts of a tensor's elements by sign and magnitude; frozen, added with `+`.

    counts: int64 [2, FINITE] of nonzero finite elements, positive and negative, by bin of magnitude.
    zeros, nonfinite: elements that are 0, and that are NaN or inf.
    amax, sum_sq: largest magnitude and sum of squares over finite elements.
    mantissa_bits: the most mantissa bits that any element uses (0: powers of two; 23: float32's own).
    blocks: by block shape, where it was asked for.
    """

    counts: np.ndarray
    zeros: int = 0
    nonfinite: int = 0
    amax: float = 0.0
    sum_sq: float = 0.0
    mantissa_bits: int = 0
    blocks: Mapping[Block, BlockSpectrum] = field(default_factory=dict)

    @classmethod
    def of(cls, x: Any, *, blocks: tuple[Block, ...] = (), axis: int = -1) -> Spectrum:
        """The spectrum of an array.

        Args:
            x: array of numbers, taken as float32 (float64 is rounded to it; finite numbers beyond its range count as inf).
            blocks: block sizes along `axis`, or (rows, columns) of tiles of the last two axes, for block formats.
        """
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(np.asarray(x), dtype=np.float32)
        bits = array.reshape(-1).view(np.uint32)
        raw = np.bincount(bits >> np.uint32(19), minlength=2 * 256 * 16)
        finite = array.reshape(-1)
        if raw[FINITE : 256 * 16].any() or raw[256 * 16 + FINITE :].any():
            finite = np.where(np.isfinite(finite), finite, np.float32(0))
        amax = float(np.abs(finite).max()) if finite.size else 0.0
        used = int(np.bitwise_or.reduce(finite.view(np.uint32))) if finite.size else 0
        made = cls.from_histogram(
            raw,
            zeros=(_count(bits, 0) if raw[0] else 0, _count(bits, 1 << 31) if raw[256 * 16] else 0),
            amax=amax,
            sum_sq=float(np.square(finite, dtype=np.float64).sum()),
            used_bits=used,
        )
        if not blocks:
            return made
        return replace(made, blocks={shape: BlockSpectrum.of(array, shape, axis) for shape in dict.fromkeys(blocks)})

    @classmethod
    def from_histogram(
        cls, raw: Any, *, zeros: tuple[int, int], amax: float, sum_sq: float, used_bits: int
    ) -> Spectrum:
        """From counts by the upper 13 bits of float32 (sign, exponent, 4 of the mantissa), int64 [8192].

        Args:
            zeros: how many of them are +0, and -0. used_bits: bitwise or of all finite elements' bits.
        """
        both = np.asarray(raw, dtype=np.int64).reshape(2, 256 * 16)
        counts = both[:, :FINITE].copy()
        nonfinite = int(both[:, FINITE:].sum())
        counts[:, 0] -= zeros
        mantissa = used_bits & 0x7FFFFF
        bits = 23 - ((mantissa & -mantissa).bit_length() - 1) if mantissa else 0
        counts.setflags(write=False)
        return cls(counts, sum(zeros), nonfinite, amax, sum_sq, bits)

    @property
    def count(self) -> int:
        """All elements."""
        return self.nonzero + self.zeros + self.nonfinite

    @property
    def rms(self) -> float:
        """Root mean square over finite elements; 0 without any."""
        finite = self.nonzero + self.zeros
        return math.sqrt(self.sum_sq / finite) if finite else 0.0

    @cached_property
    def nonzero(self) -> int:
        """Finite elements other than 0."""
        return int(self.counts.sum())

    def __add__(self, other: Spectrum) -> Spectrum:
        """The spectrum of both together; blocks that only one has are dropped."""
        shapes = [shape for shape in self.blocks if shape in other.blocks]
        counts = self.counts + other.counts
        counts.setflags(write=False)
        return Spectrum(
            counts,
            self.zeros + other.zeros,
            self.nonfinite + other.nonfinite,
            max(self.amax, other.amax),
            self.sum_sq + other.sum_sq,
            max(self.mantissa_bits, other.mantissa_bits),
            {shape: self.blocks[shape] + other.blocks[shape] for shape in shapes},
        )

    def scale_for(self, fmt: FloatFormat | str, *, power_of_two: bool = False) -> float:
        """amax / fmt.max as float32, rounded up to a power of two on demand; amax 0 counts as 1."""
        top = _scalar(fmt).max
        scale = max(float(np.float32((self.amax or 1.0) / top)), 2.0**-126)
        if not power_of_two:
            return scale
        mantissa, exponent = math.frexp(scale)
        return math.ldexp(1.0, min(exponent - (mantissa == 0.5), 127))

    def predict(
        self,
        fmt: FloatFormat | BlockFormat | str,
        scale: float | None = None,
        rounding: Rounding | str = Rounding.NEAREST_EVEN,
    ) -> Prediction:
        """What a format does to the tensor; finite values beyond its max saturate.

        Args:
            fmt: a scalar format, or a block format whose block shape was collected.
            scale: of a scalar format; None: the current amax scale (1 for formats with float32's range).
            rounding: any mode.

        Raises:
            FormatError: a scale format, or a block format whose blocks were not collected.
            OptionError: a scale that is not positive and finite, or one for a block format.
        """
        fmt, rounding = get_format(fmt), as_option(Rounding, rounding)
        if isinstance(fmt, BlockFormat):
            if scale is not None:
                raise OptionError(f"{fmt} finds its own scales; leave scale out")
            return self._of_blocks(fmt, rounding)
        fmt = _scalar(fmt)
        if scale is None:
            scale = 1.0 if fmt.emax >= 127 else self.scale_for(fmt)
        if not 0 < scale < math.inf:
            raise OptionError(f"scale {scale} is not positive and finite")
        if not self.nonzero:
            return Prediction(math.nan, 0.0, 0.0)
        low, high = EDGES[:-1] / scale, np.minimum(EDGES[1:], max(self.amax, 2.0**-149)) / scale
        exact_bits = self.mantissa_bits if math.frexp(scale)[0] == 0.5 else None
        totals = np.zeros(5)
        weights = 0.0
        for sign in (0, 1):
            some = np.flatnonzero(self.counts[sign])
            if not len(some):
                continue
            n = self.counts[sign][some].astype(np.float64)
            found = mean_square_errors(fmt, rounding, low[some], high[some], negative=sign == 1, bits=exact_bits)
            error = n * found.mse
            above = n * found.over
            totals += [
                error.sum(),
                above.sum(),
                (n * found.under).sum(),
                error[found.over > 0.5].sum(),
                error[found.under > 0.5].sum(),
            ]
            weights += (n * found.mse**2).sum()
        sse = totals[0] * scale * scale
        spread = 0.0 if sse == 0 else 4.35 * 0.9 * math.sqrt(weights) / totals[0]
        return Prediction(
            math.inf if sse == 0 else 10 * math.log10(self.sum_sq / sse),
            totals[1] / self.count,
            totals[2] / self.count,
            spread,
            totals[3] / totals[0] if totals[0] else 0.0,
            totals[4] / totals[0] if totals[0] else 0.0,
        )

    def _of_blocks(self, fmt: BlockFormat, rounding: Rounding) -> Prediction:
        found = self.blocks.get(fmt.block)
        if found is None:
            had = ", ".join(map(str, self.blocks)) or "none"
            raise FormatError(
                f"{fmt} scales blocks of {fmt.block}, and a histogram of magnitudes does not say which elements share one; "
                f"collect it with blocks=({fmt.block!r},) (collected: {had})"
            )
        if not self.nonzero:
            return Prediction(math.nan, 0.0, 0.0)
        totals = found.errors(fmt, self.amax, rounding, self.mantissa_bits)
        return Prediction(
            math.inf if totals.sse == 0 else 10 * math.log10(self.sum_sq / totals.sse),
            totals.over / self.count,
            totals.under / self.count,
            0.0 if totals.sse == 0 else 4.35 * 0.9 * math.sqrt(totals.squares) / totals.sse,
            totals.saturation / totals.sse if totals.sse else 0.0,
            totals.flushed / totals.sse if totals.sse else 0.0,
        )

    # -- updates that a grid swallows -----------------------------------------------------------------------------

    def stall(
        self,
        updates: Spectrum,
        fmt: FloatFormat | str,
        scale: float | None = None,
        storage: str = "nearest",
        *,
        factor: float = 1.0,
    ) -> float:
        """Fraction of nonzero updates that leave the code of the weight unchanged; self is the weights' spectrum.

        With spacing u at the weight an update d is lost

            nearest      where |d| < u / 2                   the weight lies on the grid and the sum is rounded back
            stochastic   with chance max(0, 1 - |d| / u)     the same, rounded stochastically
            master       with chance max(0, 1 - |d| / u)     a float32 weight lies anywhere between two grid values

        Exact for updates that are independent of the weights they meet.

        Args:
            updates: of what the optimizer attempted.
            fmt, scale: the grid; None: the amax scale, rounded up to a power of two for a stored grid (1 for formats with
                float32's range).
            storage: nearest, stochastic or master.
            factor: multiplies every update, such as the ratio of two learning rates.

        Returns:
            In [0, 1]; NaN where there is no update or no finite weight.

        Raises:
            FormatError: a block format, or a scale format. OptionError: another storage, or a factor below 0.
        """
        fmt = _scalar(fmt)
        if storage not in STORAGES:
            raise OptionError(f"storage {storage!r} is not one of {', '.join(STORAGES)}")
        if not 0 <= factor < math.inf:
            raise OptionError(f"factor {factor} is not a finite number >= 0")
        if scale is None:
            scale = 1.0 if fmt.emax >= 127 else self.scale_for(fmt, power_of_two=storage != "master")
        n_w, n_u = self.counts.sum(0), updates.counts.sum(0)
        if not n_u.sum() or not (n_w.sum() + self.zeros):
            return math.nan
        if factor == 0:
            return 1.0
        at_w, at_u = np.flatnonzero(n_w), np.flatnonzero(n_u)
        means = bin_means(at_w) / scale
        step = spacing(fmt, np.minimum(means, fmt.max)) * scale
        count = n_w[at_w].astype(np.float64)
        if self.zeros:
            step, count = np.append(step, spacing(fmt, np.zeros(1)) * scale), np.append(count, self.zeros)
        steps, where = np.unique(step, return_inverse=True)
        weight = np.bincount(where, count)
        low, high = EDGES[at_u] * factor, np.minimum(EDGES[at_u + 1], updates.amax) * factor
        lost = _lost(steps[:, None], low[None], np.maximum(high, low)[None], storage)
        chance = lost @ n_u[at_u] / n_u.sum()
        return float(chance @ weight / weight.sum())

    # -- as plain data --------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, occupied bins only; blocks are left out."""
        sign, at = np.nonzero(self.counts)
        return {
            "sign": sign.tolist(),
            "bin": at.tolist(),
            "count": self.counts[sign, at].tolist(),
            **{name: getattr(self, name) for name in ("zeros", "nonfinite", "amax", "sum_sq", "mantissa_bits")},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spectrum:
        """Back from `to_dict`.

        Raises:
            OptionError: it is no such data.
        """
        counts = np.zeros((2, FINITE), np.int64)
        try:
            counts[data["sign"], data["bin"]] = data["count"]
            numbers = (data["zeros"], data["nonfinite"], data["amax"], data["sum_sq"], data["mantissa_bits"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise OptionError(f"no spectrum: {error}; pass what Spectrum.to_dict gave") from None
        counts.setflags(write=False)
        return cls(counts, *numbers)


def _count(bits: np.ndarray, value: int) -> int:
    return int((bits == np.uint32(value)).sum())


def _scalar(fmt: Any) -> FloatFormat:
    fmt = get_format(fmt)
    if not isinstance(fmt, FloatFormat):
        raise FormatError(f"{fmt} is a block format; a stored weight's grid and its scale are those of a scalar format")
    if not fmt.has_zero or not fmt.signed:
        raise FormatError(f"{fmt} is a scale format without zero or sign; name an element format such as E4M3")
    return fmt


def _lost(step: np.ndarray, low: np.ndarray, high: np.ndarray, storage: str) -> np.ndarray:
    """Chance that an update spread evenly over [low, high] leaves a weight whose spacing is `step`."""
    width = np.maximum(high - low, 1e-300)
    if storage == "nearest":
        return np.where(high > low, np.clip((step / 2 - low) / width, 0, 1), (low < step / 2).astype(np.float64))
    top = np.clip(high, None, step)
    inside = np.where(low < step, (top - low) - (top**2 - low**2) / (2 * step), 0.0)
    return np.where(high > low, np.clip(inside / width, 0, 1), np.clip(1 - low / step, 0, 1))
