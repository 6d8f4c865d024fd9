"""What every block kernel returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockResult(NamedTuple):
    """Values or codes, the stored scales, and what was asked for beside.

    scales: stored scales of shape `BlockLayout.scale_shape`. stats: the vector of `QuantStats`. missing: 0-d, nonzero
    where an element had no code (it got code 0).
    """

    values: Tensor | None
    codes: Tensor | None
    scales: Tensor
    stats: Tensor | None
    missing: Tensor | None
