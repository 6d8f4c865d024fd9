"""What recipes of MXFP4 add to blocks under powers of two: other scales (Quartet), elements chosen by an average (TetraJet).

    deviation  scale 2^floor(log2(d * sigma + 1e-8)), elements clipped, ties to the smaller magnitude
    gain       scale 2^(floor(log2 amax) - emax) / g: nothing is clipped, so that stochastic rounding has no bias
    Q-EMA      of the two neighbours of w / s the upper one where the average of w has passed their midpoint

Sources: IST-DASLab/Quartet 00ccd38e (arXiv 2505.14669), its Triton emulation; thu-ml/TetraJet-MXFP4Training bbe9bd67
(arXiv 2502.20853).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from altgrad.errors import OptionError
from altgrad.formats.block import BlockFormat
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization.cast import cast_for
from altgrad.quantization.powers import leading_power

_SMALLEST, _LARGEST = 2.0**-127, 2.0**127  # of E8M0
_ADDED = 1e-8  # to the deviation, in Quartet's code


class PowerBlocks(NamedTuple):
    """A matrix in blocks under scales of this module.

    values: payload * scale * factor, in one rounding of scale / gain. payload: [rows, columns] element values. scales:
    [rows, blocks] powers of two. factor: what dequantizes beside them. inside: where |x / scale| is below the element's
    largest value.
    """

    values: Tensor
    payload: Tensor
    scales: Tensor
    factor: float
    inside: Tensor


def power_blocks(
    x: Tensor,
    fmt: BlockFormat,
    *,
    deviation: float = 0.0,
    gain: float = 1.0,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    key: Tensor | None = None,
) -> PowerBlocks:
    """A float32 matrix [rows, columns] in blocks along its last axis, scaled by their deviation or with a gain.

    A short last block counts as filled up with zeros. NaN and inf stay where they are and have no part in the scales. An
    empty deviation or amax gives the smallest scale.

    Args:
        deviation: d; the mean is removed, and the variance is mean(x^2) - mean(x)^2, or 1 where rounding makes that
            negative. Nearest rounding takes ties to the smaller magnitude.
        gain: g, where deviation is 0.
        key: of stochastic rounding.
    """
    across, element = fmt.tile[1], fmt.element
    finite = x.isfinite()
    kept = torch.where(finite, x, 0)
    blocks = pad(kept, (0, -x.shape[1] % across)).unflatten(-1, (-1, across))
    if deviation:
        squares, mean = (blocks * blocks).sum(-1) / across, blocks.sum(-1) / across
        variance = squares - mean * mean
        sigma = torch.where(variance >= 0, variance.clamp(min=0).sqrt(), 1.0)
        scales = leading_power((deviation * sigma + _ADDED).double())
    else:
        scales = leading_power(blocks.abs().amax(-1).double()) / 2.0**fmt.element_emax
    scales = scales.clamp(_SMALLEST, _LARGEST).float()
    spread = scales.repeat_interleave(across, 1)[:, : x.shape[1]] / gain
    scaled = kept / spread
    if deviation and rounding is not Rounding.STOCHASTIC:
        towards_zero = torch.nextafter(scaled, torch.zeros(()).to(scaled))
        payload = cast_for(element, Rounding.NEAREST_AWAY, Overflow.SATURATE)(towards_zero).values
    else:
        payload = cast_for(element, rounding, Overflow.SATURATE)(scaled, key=key).values
    assert payload is not None
    values = torch.where(finite, payload * spread, x)
    return PowerBlocks(values, torch.where(finite, payload, x), scales, 1 / gain, scaled.abs() < element.max)


@dataclass(frozen=True)
class EmaRounding:
    """Q-EMA: how an average of the master weight decides between the two neighbours of a weight on the grid.

    After each optimizer step e = decay * e + (1 - decay) * w, from e = w before the first; from the `start`-th step on the
    weight takes the upper neighbour where e / s has reached the midpoint, and before that the nearest. A weight on the grid
    stays.

    Args:
        decay: in (0, 1). start: how many steps are averaged first, at least 0.

    Raises:
        OptionError: a value out of range.
    """

    decay: float = 0.9983
    start: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0 < self.decay < 1:
            raise OptionError(f"decay {self.decay!r} of an averaged weight is outside (0, 1); TetraJet has 0.9983")
        if isinstance(self.start, bool) or not isinstance(self.start, int) or not 0 <= self.start <= 10**9:
            raise OptionError(f"start {self.start!r} of an averaged weight is no number of steps; TetraJet has 10")

    def moved(self, average: Tensor, weight: Tensor) -> Tensor:
        """The average after a step that left this weight; pure."""
        return average * self.decay + weight * (1 - self.decay)


def between_neighbours(scaled: Tensor, average: Tensor, element: FloatFormat) -> Tensor:
    """Values on the element's grid: of the two neighbours of each scaled number the one on whose side its average lies.

    Args:
        scaled: w / s, at most the element's largest value in magnitude. average: e / s, of the same shape.
    """
    size = scaled.abs()
    low = cast_for(element, Rounding.TOWARD_ZERO, Overflow.SATURATE)(size).values
    high = cast_for(element, Rounding.UP, Overflow.SATURATE)(size).values
    assert low is not None
    assert high is not None
    toward = torch.where(scaled < 0, -average, average)
    chosen = torch.where(toward >= (low + high) / 2, high, low)
    return torch.where(scaled.isfinite(), torch.copysign(chosen, scaled), scaled)
