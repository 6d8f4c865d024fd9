"""BlockSpectrum: how far each element lies below the largest of its block, from which any rule of block scales follows.

Rows are bins of a block's amax, columns the elements' distance below it in bins; the largest element of each block is
counted apart, since its place under the scale is known exactly. Scale rules are those of `altgrad.formats.block`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from altgrad.errors import OptionError
from altgrad.formats.block import BlockFormat
from altgrad.formats.magnitudes import EDGES, PER_BINADE, bins_of, mean_square_errors
from altgrad.formats.rounding import Rounding
from altgrad.formats.scalar import FloatFormat

DEPTH = 48 * PER_BINADE
"""Elements further below their block's amax count as that far."""
_PLACES = 4  # of an amax within its bin


class Totals(NamedTuple):
    """Sums over all elements: squared errors, their squares, overflows, underflows; squared errors of the last two."""

    sse: float
    squares: float
    over: float
    under: float
    saturation: float
    flushed: float


@dataclass(frozen=True, eq=False)
class BlockSpectrum:
    """Counts of elements by their block's amax and their distance below it; added with `+`.

    first: bin of the lowest row. below: int64 [rows, DEPTH]. maxima: int64 [rows], blocks by the bin of their amax.
    """

    first: int
    below: np.ndarray
    maxima: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, block: int | tuple[int, int], axis: int = -1) -> BlockSpectrum:
        """Of a float32 array, blocks along `axis` (a tile: of the last two axes); short blocks count as they are.

        Raises:
            OptionError: no axis, or a tile of an array with fewer than two.
        """
        need = 2 if isinstance(block, tuple) else 1
        if x.ndim < need:
            raise OptionError(f"blocks of {block} of an array with {x.ndim} axes; it needs {need}")
        magnitude = np.abs(np.where(np.isfinite(x), x, np.float32(0)))
        rows = _tiles(magnitude, block) if isinstance(block, tuple) else _runs(np.moveaxis(magnitude, axis, -1), block)
        largest = rows.max(axis=1, initial=0)
        rows, largest = rows[largest > 0], largest[largest > 0]
        if not len(rows):
            return cls(0, np.zeros((0, DEPTH), np.int64), np.zeros(0, np.int64))
        at = bins_of(largest)
        first = int(at.min())
        height = int(at.max()) - first + 1
        bins = bins_of(rows)
        away = np.minimum(at[:, None] - bins, DEPTH - 1)
        index = (at - first)[:, None] * DEPTH + away
        is_max = np.zeros(rows.shape, bool)
        is_max[np.arange(len(rows)), rows.argmax(axis=1)] = True
        counted = np.bincount(index[(rows > 0) & ~is_max], minlength=height * DEPTH).reshape(height, DEPTH)
        return cls(first, counted, np.bincount(at - first, minlength=height))

    def __add__(self, other: BlockSpectrum) -> BlockSpectrum:
        """The spectrum of both together."""
        if not len(self.maxima) or not len(other.maxima):
            return self if len(self.maxima) else other
        first = min(self.first, other.first)
        height = max(self.first + len(self.maxima), other.first + len(other.maxima)) - first
        below, maxima = np.zeros((height, DEPTH), np.int64), np.zeros(height, np.int64)
        for one in (self, other):
            rows = slice(one.first - first, one.first - first + len(one.maxima))
            below[rows] += one.below
            maxima[rows] += one.maxima
        return BlockSpectrum(first, below, maxima)

    def errors(
        self,
        fmt: BlockFormat,
        tensor_amax: float,
        rounding: Rounding = Rounding.NEAREST_EVEN,
        mantissa_bits: int | None = None,
    ) -> Totals:
        """The sums for a block format (up and down are taken as for positive elements).

        Args:
            mantissa_bits: that the elements use at most; None: as many as they like.
        """
        bits = mantissa_bits if fmt.power_of_two else None
        deepest = int(np.flatnonzero(self.below.any(axis=0)).max(initial=0)) + 1
        total = np.zeros(6)
        offsets = np.arange(deepest)
        for row in np.flatnonzero(self.maxima):
            a = self.first + int(row)
            some = np.flatnonzero(self.below[row, :deepest])
            bins = np.maximum(a - offsets[some], 0)
            n = self.below[row, some].astype(np.float64) / _PLACES
            lo, hi = EDGES[a], EDGES[a + 1]
            places = lo + (np.arange(_PLACES) + 0.5) / _PLACES * (hi - lo)
            scales = block_scale(fmt, places, tensor_amax)
            low = (EDGES[bins][None] / scales[:, None]).ravel()
            high = (np.minimum(EDGES[bins + 1][None], places[:, None]) / scales[:, None]).ravel()
            # an amax lies anywhere in its part of the bin, but under a float scale exactly at the element's max
            half = 0.0 if fmt.has_float_scale else (hi - lo) / _PLACES / 2
            low = np.concatenate([low, (places - half) / scales])
            high = np.concatenate([high, (places + half) / scales])
            count = np.concatenate([np.tile(n, _PLACES), np.full(_PLACES, self.maxima[row] / _PLACES)])
            square = np.concatenate([np.repeat(scales, len(some)), scales]) ** 2
            found = mean_square_errors(fmt.element, rounding, low, high, bits=bits)
            error = count * found.mse * square
            total += [
                error.sum(),
                (count * (found.mse * square) ** 2).sum(),
                (count * found.over).sum(),
                (count * found.under).sum(),
                error[found.over > 0.5].sum(),
                error[found.under > 0.5].sum(),
            ]
        return Totals(*(float(value) for value in total))


def block_scale(fmt: BlockFormat, amax: np.ndarray, tensor_amax: float) -> np.ndarray:
    """The scale of blocks with these amaxes, by the rules of `altgrad.formats.block`."""
    if fmt.power_of_two:
        mantissa, exponent = np.frexp(amax)
        up = (2 * mantissa - 1) * 2.0**23 >= fmt.round_up_from(23)
        return np.ldexp(1.0, np.clip(exponent - 1 - fmt.element_emax + up, -127, 127))
    scale = amax / fmt.element.max
    if fmt.has_float_scale:
        return np.maximum(scale, 2.0**-126)
    above = 1.0
    if fmt.tensor_scale:
        above = max(tensor_amax / (fmt.element.max * fmt.scale_format.max), 2.0**-126)
    return above * _on_grid(fmt.scale_format, scale / above)


def _on_grid(fmt: FloatFormat, x: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, between the smallest positive value and the largest."""
    step = fmt.ulp(x)
    return np.clip(np.rint(x / step) * step, fmt.min_subnormal, fmt.max)


def _runs(x: np.ndarray, block: int) -> np.ndarray:
    """Blocks of the last axis as rows, the last one of each line filled with zeros."""
    short = -x.shape[-1] % block
    if short:
        x = np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, short)])
    return np.ascontiguousarray(x).reshape(-1, block)


def _tiles(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Tiles of the last two axes as rows, filled with zeros at the edges."""
    down, across = block
    pad = [*[(0, 0)] * (x.ndim - 2), (0, -x.shape[-2] % down), (0, -x.shape[-1] % across)]
    x = np.pad(x, pad)
    lead = math.prod(x.shape[:-2])
    cut = x.reshape(lead, x.shape[-2] // down, down, x.shape[-1] // across, across)
    return np.ascontiguousarray(cut.transpose(0, 1, 3, 2, 4)).reshape(-1, down * across)
